"""Output and files of `qwenvl demo`, with a random model and with the demo model."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from demo_helpers import Page
from engines import HAS_COMPILER
from PIL import Image

from paddlemix_qwenvl_plugin.cli.main import app, main
from paddlemix_qwenvl_plugin.demo import run as run_module
from paddlemix_qwenvl_plugin.demo import score as score_module
from paddlemix_qwenvl_plugin.demo.questions import QUESTIONS
from paddlemix_qwenvl_plugin.demo.run import MODEL, run_demo
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

REPO = Path(__file__).resolve().parents[2]

# Exported stages that have engine programs: none where the engine cannot be built.
ENGINE_STAGES = ("vision/vision", "text/qwen") if HAS_COMPILER else ()

needs_weights = pytest.mark.skipif(
    not (MODEL / "model.safetensors").is_file(),
    reason=f"no weights in {MODEL}: check out the whole repository",
)


def files(folder: Path) -> set[str]:
    """Relative paths of the files in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# The files that the demo writes.
DEMO_FILES = {
    ".qwenvl-demo",
    "index.html",
    "sheet.png",
    "answers.json",
    *(f"images/{path.name}" for question in QUESTIONS for path in question.images),
    *(f"vision/vision.{suffix}" for suffix in ("json", "pdmodel", "pdiparams", "manifest.json")),
    *(f"text/qwen.{suffix}" for suffix in ("json", "pdmodel", "pdiparams", "manifest.json")),
    *(f"{stage}.fused.{suffix}" for stage in ENGINE_STAGES for suffix in ("json", "pdmodel")),
    *(
        f"text/{name}"
        for name in (
            "qwen.step.json",
            "qwen.step.pdmodel",
            "config.json",
            "qwen.tiktoken",
            "tokenizer_config.json",
        )
    ),
}


def test_files_that_no_demo_wrote_are_not_replaced(tmp_path: Path, random_model: Path) -> None:
    """Files are replaced only in a demo's folder: one with the marker file `.qwenvl-demo` or a demo's page.

    Older versions wrote no marker file: their folders are recognized by the page.
    """
    for name in ("index.html", "sheet.png", "answers.json", "images", "vision", "text"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).symlink_to(tmp_path / "nowhere")
        with pytest.raises(UsageError, match=rf"{name}: exists, and no demo wrote it; name another folder"):
            run_demo(folder, print, random_model)
        assert [path.name for path in folder.iterdir()] == [name]
    page = tmp_path / "index" / "index.html"
    page.unlink()
    page.write_text("<html><title>My page</title>")
    with pytest.raises(UsageError, match=r"index\.html: exists"):
        run_demo(page.parent, print, random_model)
    assert page.read_text() == "<html><title>My page</title>"


def test_only_files_of_the_demo_are_replaced(
    tmp_path: Path, random_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run with a random model in the folder of an earlier demo; wrong answers cause an error at the end."""
    users_files = ["notes.txt", "vision/notes.txt", "text/mine.json", "images/mine.png"]
    folder = tmp_path / "qwenvl-demo"
    for name in (*users_files, *DEMO_FILES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    (folder / "index.html").write_text("<html><title>qwenvl demo: 8 of 8 right")
    monkeypatch.chdir(tmp_path)
    # For speed: a random model generates no stop token.
    monkeypatch.setattr(score_module, "_MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(run_module, "MODEL", random_model)
    monkeypatch.setattr(sys, "argv", ["qwenvl", "demo"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    output = capfd.readouterr()
    assert exit_info.value.code == 1
    # The last line: the test's process, unlike the command's, also prints Paddle's log.
    assert output.err.splitlines()[-1].startswith("qwenvl: 8 of the demo's 8 answers are wrong")
    assert "0 of 8 answers are right." in output.out
    prefix = "    Q  "
    questions = [line.removeprefix(prefix) for line in output.out.splitlines() if line.startswith(prefix)]
    assert questions == [question.turn.question for question in QUESTIONS]
    assert output.out.count("WRONG, expected: ") == 8

    assert files(folder) == {*users_files, *DEMO_FILES}
    unchanged = {name for name in files(folder) if (folder / name).read_bytes() == b"old"}
    assert unchanged == {*users_files, ".qwenvl-demo"}
    assert Page((folder / "index.html").read_text("utf-8")).texts("h1") == ["0 of 8 answers are right"]
    assert json.loads((folder / "answers.json").read_text("utf-8"))["right"] == 0


def test_missing_weights_create_no_folder(tmp_path: Path) -> None:
    with pytest.raises(QwenVLError, match=r"model\.safetensors: the demo model's weights are missing"):
        run_demo(tmp_path / "demo", print, tmp_path)
    assert not (tmp_path / "demo").exists()


def test_two_demos_at_once_in_one_folder(tmp_path: Path, random_model: Path) -> None:
    program = f"""
from pathlib import Path
from paddlemix_qwenvl_plugin.demo import run, score
score._MAX_NEW_TOKENS = 4
demo_run = run.run_demo(Path("demo"), lambda line: None, Path({str(random_model)!r}))
print(len(demo_run.results))
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [process.communicate(timeout=300) for process in processes] == [("8\n", ""), ("8\n", "")]
    assert files(tmp_path / "demo") == DEMO_FILES


def test_export_time_excludes_the_engine_build(
    tmp_path: Path, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_module, "_MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(run_module, "library_state", lambda: ("not built", Path("libqwenvl.so")))
    # In place of the build of the engine: a pause of 5 seconds.
    monkeypatch.setattr(run_module, "engine_available", lambda choice, operators: time.sleep(5) or True)
    lines: list[str] = []
    start = time.perf_counter()
    run = run_demo(tmp_path, lines.append, random_model)
    assert run.export_seconds + 5 < time.perf_counter() - start
    assert re.fullmatch(r"Built the engine in 5\.\d s\.", lines[0])
    assert [line.split(" in ")[0] for line in lines[1:3]] == [
        "Exported the vision stage",
        "Exported the language stage",
    ]


@needs_weights
def test_the_demo_model_answers_correctly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run the command as a process, with ASCII output, and compare the answers with the scenes of the images."""
    result = subprocess.run(
        [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "demo", "folder"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert "8 of 8 answers are right." in result.stdout
    assert f"Page:   {Path('folder') / 'index.html'}" in result.stdout
    answers = json.loads((tmp_path / "folder" / "answers.json").read_text("utf-8"))["answers"]
    for question in QUESTIONS:
        answer = answers[question.name]["answer"]
        assert answer["finish_reason"] == "stop"
        scene = question.sample.scenes[-1]
        text = " ".join(answer["text"].split())
        if question.name in ("caption", "grounded"):
            for thing in scene.things:
                name = thing.text or f"{thing.size} {thing.colour} {thing.kind}"
                assert name in text
        if question.name in ("grounded", "chinese"):
            assert len(answer["boxes"]) == len(scene.things)
            for box, thing in zip(answer["boxes"], scene.things):
                corners = [value for point in box["points"] for value in point]
                assert intersection_over_union(corners, thing.bounds) >= 0.5
        if question.name == "read":
            assert all(thing.text in text for thing in scene.texts)
    assert "two" in answers["count"]["answer"]["text"]
    page = Page((tmp_path / "folder" / "index.html").read_text("utf-8"))
    assert page.texts("span", "verdict") == ["right"] * 8

    # The `predict` command on the page, with the demo's exported stages.
    (command,) = [text for text in page.texts("pre") if text.startswith("qwenvl predict")]
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    app(shlex.split(command.replace("\\\n", " "))[1:], standalone_mode=False)
    assert capfd.readouterr().out == "There are four shapes.\n"

    # The READMEs and an image in the documents show the demo's output.
    for readme in ("README.md", "README_zh.md"):
        documented_box = re.search(r"<ref>.*?</box>", (REPO / readme).read_text("utf-8"))
        assert documented_box is not None
        assert documented_box.group() in answers["grounded"]["answer"]["text"]
    with (
        Image.open(tmp_path / "folder" / "sheet.png") as sheet,
        Image.open(REPO / "docs" / "images" / "demo.png") as documented,
    ):
        assert sheet.width == documented.width
        # Without a Chinese font the last of the three rows is different and has another height: leave it out.
        height = sheet.height if sheet.height == documented.height else 2 * sheet.height // 3
        arrays = [np.asarray(image, np.int16)[:height] for image in (sheet, documented)]
        difference = np.abs(arrays[0] - arrays[1]).max(axis=-1)
    assert (difference > 32).mean() < 0.02


def intersection_over_union(a: list[int], b: tuple[float, float, float, float]) -> float:
    """Intersection over union of two rectangles, by counting points of a grid."""
    points = [(x + 0.5, y + 0.5) for x in range(0, 1000, 5) for y in range(0, 1000, 5)]

    def contains(rectangle: Sequence[float]) -> np.ndarray:
        left, top, right, bottom = rectangle
        return np.array([left <= x <= right and top <= y <= bottom for x, y in points])

    in_a, in_b = contains(a), contains(b)
    return float((in_a & in_b).sum() / (in_a | in_b).sum())
