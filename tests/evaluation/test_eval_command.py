"""`qwenvl eval` with the tiny random model, the demo model, stubs, and answers from files; prompts and completions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.cli.main import app
from paddlemix_qwenvl_plugin.demo import score as demo
from paddlemix_qwenvl_plugin.demo.world.draw import draw
from paddlemix_qwenvl_plugin.demo.world.tasks import held_out
from paddlemix_qwenvl_plugin.evaluation import ask
from paddlemix_qwenvl_plugin.evaluation.captions import CaptionRow
from paddlemix_qwenvl_plugin.evaluation.grounding import GroundingRow
from paddlemix_qwenvl_plugin.evaluation.rows import Row
from paddlemix_qwenvl_plugin.evaluation.vqa import VqaRow
from paddlemix_qwenvl_plugin.processing.images import preprocess
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions

Run = Callable[..., Any]

GROUNDING = [
    {"id": "a", "sent": "the red circle", "bbox": [20.0, 20.0, 120.0, 120.0], "width": 256, "height": 256},
    {"id": "b", "sent": "the star", "bbox": [128.0, 64.0, 256.0, 128.0], "width": 256, "height": 256},
]
VQA = [
    {"question_id": 1, "question": "What colour?", "answers": ["red"] * 7 + ["blue"] * 3},
    {"question_id": 2, "question": "How many?", "answers": ["2"] * 10},
]
CAPTIONS = [
    {"image_id": 1, "captions": ["A red circle and a blue star.", "There is a circle."]},
    {"image_id": 2, "captions": ["Two small hearts below a large cross."]},
]
# Completions. The prompt of a grounding row ends in <box>; the coordinate 999 of an answer is the edge of the image.
CORRECT_ANSWERS = {
    "grounding": ["(78,78),(468,468)</box>", "(500,250),(999,500)</box>"],
    "vqa": ["Red.", " two"],
    "captions": ["a red circle and a blue star", "Two small hearts below a large cross"],
}
ROWS = {"grounding": GROUNDING, "vqa": VQA, "captions": CAPTIONS}
ID_KEYS = {"grounding": "id", "vqa": "question_id", "captions": "image_id"}


def require_libraries(task: str) -> None:
    """Skip the test if a library for the task is missing."""
    if task == "captions":
        for library in ("nltk", "pycocoevalcap"):
            pytest.importorskip(
                library, reason=f"{library} is not installed; `pip install -e '.[eval]'` to score captions"
            )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Function that runs `qwenvl eval` in an empty folder and returns the printed JSON."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Any:
        capsys.readouterr()
        assert not app(["eval", *arguments, "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    return call


def write_data(task: str) -> str:
    """Write the data set, with blank lines, and its images to the working directory; return the data set's path."""
    lines = []
    for number, row in enumerate(ROWS[task]):
        draw(held_out(number).scenes[0]).save(f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", **row}))
    Path("data.jsonl").write_text("\n\n".join(lines) + "\n")
    return "data.jsonl"


def write_predictions(task: str, texts: list[str]) -> str:
    """Write a file of answers, in reverse order and with an unknown key, which must not matter; return its path."""
    rows = [{"id": row[ID_KEYS[task]], "text": text, "unknown": 1} for row, text in zip(ROWS[task], texts)]
    rows.reverse()
    Path("given.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return "given.jsonl"


def read_lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def stage_flags(tiny_exported: Path) -> list[str]:
    return [
        *("--first_model_path", str(tiny_exported / "vision" / "vision")),
        *("--second_model_path", str(tiny_exported / "text" / "qwen")),
    ]


def values(task: str, figures: dict[str, Any]) -> list[float]:
    names = {"grounding": ["value"], "vqa": ["value"], "captions": ["CIDEr", "BLEU-4", "ROUGE-L"]}
    return [figures[name] for name in names[task]]


@pytest.mark.parametrize("task", ROWS)
def test_random_model_scores_low(task: str, tiny_exported: Path, run: Run) -> None:
    require_libraries(task)
    figures = run(task, write_data(task), *stage_flags(tiny_exported), "--output", "out.jsonl")
    assert figures["n"] == 2
    assert max(values(task, figures)) < 0.4
    out = read_lines("out.jsonl")
    assert [line["id"] for line in out] == [row[ID_KEYS[task]] for row in ROWS[task]]
    assert all(set(line) == {"id", "text", "score"} for line in out)
    assert any(line["text"] for line in out)
    # The written answers give the same figures, without the model.
    assert run(task, "data.jsonl", "--predictions", "out.jsonl") == figures


@pytest.mark.parametrize("task", ROWS)
def test_correct_answers_score_the_maximum(
    task: str, tiny_exported: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_libraries(task)
    monkeypatch.setattr(ask, "answers", lambda model, requests, options: iter(CORRECT_ANSWERS[task]))
    figures = run(task, write_data(task), *stage_flags(tiny_exported), "--output", "out.jsonl")
    scores = values(task, figures)
    if task == "captions":
        # Less than the maximum of 10, because an answer cannot match both captions of the first image.
        assert 5 < scores.pop(0) < 10
    assert scores == pytest.approx([1.0] * len(scores))
    assert [line["text"] for line in read_lines("out.jsonl")] == CORRECT_ANSWERS[task]
    assert run(task, "data.jsonl", "--predictions", write_predictions(task, CORRECT_ANSWERS[task])) == figures


def test_partially_correct_answers(run: Run) -> None:
    answers = write_predictions("vqa", ["blue", "3"])
    # The mean of 0.9, for an answer that three of ten people gave, and 0.
    assert run("vqa", write_data("vqa"), "--predictions", answers)["value"] == pytest.approx(0.45)
    assert run("vqa", "data.jsonl", "--metric", "exact", "--predictions", answers)["value"] == 0.5
    boxes = write_predictions("grounding", [CORRECT_ANSWERS["grounding"][0], "(500,250),(999,400)</box>"])
    figures = run("grounding", write_data("grounding"), "--predictions", boxes, "--output", "out.jsonl")
    assert (figures["hits"], figures["n"]) == (2, 2)
    assert [line["score"] for line in read_lines("out.jsonl")] == pytest.approx([1.0, 0.6], abs=0.01)


def test_prompts_are_the_official_ones(tiny_exported: Path) -> None:
    """The text after the image is that of eval_mm in the Qwen-VL repository."""
    tokenizer = QwenVL.from_exported(tiny_exported / "vision/vision", tiny_exported / "text/qwen").tokenizer
    cases: list[tuple[Row, str]] = [
        (GroundingRow(image="x.png", **GROUNDING[0]), "<ref>the red circle</ref><box>"),
        (VqaRow(image="x.png", **VQA[0]), "What colour? Answer:"),
        (CaptionRow(image="x.png", **CAPTIONS[0]), "Describe the image in English:"),
    ]
    for row, expected in cases:
        ids = ask.prompt_ids(tokenizer, row.prompt())
        slots = slice(ids.index(tokenizer.img_start_id) + 1, ids.index(tokenizer.img_end_id))
        assert slots.stop - slots.start == 256
        del ids[slots]
        assert ids == [tokenizer.img_start_id, tokenizer.img_end_id, *tokenizer.encode(expected)]


def test_tags_in_a_question_do_not_become_special_tokens(tiny_exported: Path) -> None:
    tokenizer = QwenVL.from_exported(tiny_exported / "vision/vision", tiny_exported / "text/qwen").tokenizer
    row = VqaRow(image="x.png", question_id=1, question="<img>y.png</img> <box> <|im_end|>", answers=["no"])
    special = [token for token in ask.prompt_ids(tokenizer, row.prompt()) if token >= tokenizer.eod_id]
    assert set(special) == {tokenizer.img_start_id, tokenizer.img_end_id, tokenizer.img_pad_id}
    assert special.count(tokenizer.img_start_id) == 1


def test_answers_are_the_completions_of_the_model(tiny_exported: Path) -> None:
    model = QwenVL.from_exported(tiny_exported / "vision/vision", tiny_exported / "text/qwen")
    requests = [
        ask.Question("data:image/png;base64," + image, "What is it? Answer:")
        for image in (BLACK_IMAGE, WHITE_IMAGE)
    ]
    options = GenerationOptions(max_new_tokens=8, min_new_tokens=8)
    texts = list(ask.answers(model, requests, options))
    tokenizer = model.tokenizer
    for request, text in zip(requests, texts):
        ids = ask.prompt_ids(tokenizer, request)
        features = model.encode_images([preprocess(image) for image in model.load_images([request.image])])
        stop_tokens = [tokenizer.eod_id, tokenizer.im_end_id, tokenizer.im_start_id]
        [completion] = model.generate_ids(
            np.array([ids]), features, eos_token_ids=stop_tokens, max_new_tokens=8, min_new_tokens=8
        )
        assert text == tokenizer.decode(completion)
    assert texts[0] != texts[1]


# PNG files of one pixel, in base64.
BLACK_IMAGE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
WHITE_IMAGE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEANl9ngAAAAABJRU5ErkJggg=="


def test_demo_exports_the_shipped_model_and_scores_it(run: Run) -> None:
    figures = run(*("demo", "--first", "5000", "--n", "6", "--export_to", "kept", "--output", "out.jsonl"))
    assert figures["words"]["goal"] == 0.95
    assert figures["words"]["hits"] + figures["boxes"]["hits"] > 0
    assert Path("kept/text/qwen.manifest.json").is_file()
    out = read_lines("out.jsonl")
    assert [line["id"] for line in out] == list(range(5000, 5006))
    for line in out:
        turn = held_out(line["id"]).turns[0]
        assert (line["question"], line["wanted"]) == (turn.question, turn.answer)
        if line["text"] == line["wanted"]:
            assert line["words_right"]
    from_file = run("demo", "--first", "5000", "--n", "6", "--predictions", "out.jsonl")
    assert from_file == figures


@pytest.mark.parametrize("correct", [True, False], ids=["correct", "wrong"])
def test_demo_scores_of_correct_and_wrong_answers(
    correct: bool, tiny_exported: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(sample: Any) -> str:
        expected = sample.turns[0].answer
        if correct:
            return expected
        # Other boxes, and other letters except those of the tags <ref> and <box>.
        with_other_boxes = re.sub(r"\(\d+,\d+\),\(\d+,\d+\)", "(0,0),(9,9)", expected)
        return "".join(chr(ord(c) ^ 1) if c.isalpha() and c not in "refbox" else c for c in with_other_boxes)

    monkeypatch.setattr(demo, "answers", lambda model, samples: map(answer, samples))
    figures = run("demo", "--n", "200", *stage_flags(tiny_exported))
    assert figures["words"]["n"] > 100
    assert figures["boxes"]["n"] > 50
    assert figures["reading"]["n"] > 10
    for name, rate in figures.items():
        assert rate["hits"] == (rate["n"] if correct else 0), name


@pytest.mark.parametrize(
    ("task", "table"),  # `table`: pattern of the complete output
    [
        ("grounding", r"IoU of at least 0\.5 +100\.00 %  \[34\.2, 100\.0\]  2 of 2"),
        ("vqa", r"vqa  100\.00  \(2 questions\)"),
        ("captions", r"CIDEr +\d+\.\d\d\nBLEU-4 +\d+\.\d\d\nROUGE-L +\d+\.\d\d\n\(2 images\)"),
    ],
    ids=list(ROWS),
)
def test_printed_table(
    task: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require_libraries(task)
    monkeypatch.chdir(tmp_path)
    answers = write_predictions(task, CORRECT_ANSWERS[task])
    assert not app(["eval", task, write_data(task), "--predictions", answers], standalone_mode=False)
    assert re.fullmatch(table, capsys.readouterr().out.strip())
