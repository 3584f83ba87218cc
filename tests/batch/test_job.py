"""Batch jobs: one output line per row, in input order, with the right answer, also after an interruption."""

from __future__ import annotations

import json
import shutil

import pytest
from batch_helpers import (
    STREET,
    open_cheap,
    openai_row,
    read_rows,
    run_job,
    text,
    user,
    write_rows,
)
from executors import record, script_completion
from PIL import Image

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL, QwenVLError, UsageError
from paddlemix_qwenvl_plugin.batch.job import count_failed
from paddlemix_qwenvl_plugin.batch.source import Source
from paddlemix_qwenvl_plugin.runtime.image_cache import ImageCache


@pytest.fixture(scope="module")
def vl(tiny_exported):
    return QwenVL.from_exported(tiny_exported / "vision" / "vision", tiny_exported / "text" / "qwen")


@pytest.fixture(scope="module")
def cheap(tiny_exported):
    """Model with scripted answers: of four letters, or of three letters and a stop token."""
    return open_cheap(tiny_exported)


@pytest.fixture
def folder(tmp_path):
    """Folder with images in in/; an input file in in/ can give their names without a folder."""
    (tmp_path / "in").mkdir()
    shutil.copyfile(STREET, tmp_path / "in" / "street.png")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "in" / "red.png")
    return tmp_path


def test_answers_equal_those_of_generate(vl, folder):
    sampling = {"temperature": 1.5, "seed": 3}
    street, red = str(folder / "in" / "street.png"), str(folder / "in" / "red.png")
    system = {"role": "system", "content": "Be brief."}
    first_turn = [user("street.png", text("A dog?")), {"role": "assistant", "content": "Yes."}]
    rows = [
        {"id": 1, "image": "street.png", "prompt": "What is this?"},
        {"id": 2, "prompt": "Hello, hello, hello!"},
        openai_row("c", [user(text("Look:"), "red.png", text("Red?"))]),
        {"id": 4, "images": ["red.png", street], "prompt": "Which?", **sampling},
        {"id": 5, "image": "red.png", "prompt": "Which?", **sampling},
        openai_row("f", [system, *first_turn, user("Where?")], max_tokens=2),
        {"id": 7, "prompt": "Who?", "chat": True, "system": "Be long."},
        openai_row("h", [system, user("Hm?")], max_tokens=2),
    ]
    history = [([{"image": street}, {"text": "A dog?"}], "Yes.")]
    brief_chat = {"chat": True, "system": "Be brief.", "max_new_tokens": 2}
    answers = [
        vl.generate([{"image": street}, {"text": "What is this?"}], max_new_tokens=5),
        vl.generate("Hello, hello, hello!", max_new_tokens=5),
        vl.generate([{"text": "Look:"}, {"image": red}, {"text": "Red?"}], chat=True, max_new_tokens=5),
        vl.generate([{"image": red}, {"image": street}, {"text": "Which?"}], max_new_tokens=5, **sampling),
        vl.generate([{"image": red}, {"text": "Which?"}], max_new_tokens=5, **sampling),
        vl.generate("Where?", history=history, **brief_chat),
        vl.generate("Who?", chat=True, system="Be long.", max_new_tokens=5),
        vl.generate("Hm?", **brief_chat),
    ]
    run_job(write_rows(folder / "in" / "in.jsonl", rows), folder / "out.jsonl", vl, 3, max_new_tokens=5)

    results = read_rows(folder / "out.jsonl")
    assert [row.get("custom_id", row["id"]) for row in results] == [1, 2, "c", 4, 5, "f", 7, "h"]
    for result, answer in zip(results, answers):
        if "custom_id" in result:
            body = result["response"]["body"]
            (choice,) = body["choices"]
            result = {"text": choice["message"]["content"], "finish_reason": choice["finish_reason"], **body}
        else:
            assert result["boxes"] == json.loads(json.dumps(answer.as_dict()["boxes"]))
        assert result["text"] == answer.text
        assert result["finish_reason"] == answer.finish_reason
        assert result["usage"]["completion_tokens"] == len(answer.token_ids)
    # The row with id 4 has two images of 256 slots, 5 has one, 2 has none.
    n_prompt_tokens = {row["id"]: row["usage"]["prompt_tokens"] for row in results if "usage" in row}
    assert n_prompt_tokens[4] > n_prompt_tokens[5] + 256 > n_prompt_tokens[2]
    assert {path.name for path in folder.iterdir()} == {"in", "out.jsonl"}


def test_boxes_are_in_pixels_of_the_rows_last_image(tiny_exported, folder, monkeypatch):
    model = open_cheap(tiny_exported)
    completion = "<ref>a</ref><box>(0,0),(500,1000)</box>"
    script_completion(model, monkeypatch, [*model.tokenizer.encode(completion), model.tokenizer.eod_id])
    rows = [
        {"id": 1, "images": ["red.png", "street.png"]},
        {"id": 2, "images": ["street.png", "red.png"]},
        {"id": 3, "prompt": "?"},
    ]
    run_job(write_rows(folder / "in" / "in.jsonl", rows), folder / "out.jsonl", model, max_new_tokens=99)
    results = read_rows(folder / "out.jsonl")
    assert [row["text"] for row in results] == [completion] * 3
    boxes = [row["boxes"] for row in results]
    assert [(box["kind"], box["ref"], box["points"]) for (box,) in boxes] == [
        ("box", "a", [[0, 0], [500, 1000]])
    ] * 3
    # street.png has 960 x 640 pixels, red.png 40 x 20.
    assert [box["pixels"] for (box,) in boxes] == [[[0, 0], [480, 640]], [[0, 0], [20, 20]], None]


def mixed_rows():
    """Build 16 rows of both formats, and a blank line.

    Three rows fail: one names a missing image file, one has an empty prompt, one is not JSON and so has no id.
    """
    rows = [{"id": n, "prompt": "word " * (n * 7 % 11 + 1)} for n in range(9)]
    rows += [openai_row(f"o{n}", [user("red.png", text("Why? " * n))]) for n in range(1, 5)]
    rows += [{"id": 50, "prompt": "", "temperature": 2}, {"id": 51, "image": "no.png"}, b"{oops"]
    return [*rows[::2], b"", *rows[1::2]]


def test_invalid_rows_have_error_lines_and_the_job_continues(cheap, folder):
    rows = [
        {"id": "a", "prompt": "Hi"},
        b"oops",
        openai_row("b", [user("no.png", text("?"))]),
        {"id": "c", "image": "no.png", "prompt": "?"},
        openai_row("d", [user("http://127.0.0.1:9/dog.png", text("?"))]),
        b"",
        {"id": "e", "prompt": "% " * 8192},
        {"id": "f", "prompt": "<img>no.png</img>"},
        openai_row("g", [user("Hi")], tools=[]),
        {"id": "h", "image": "in.jsonl"},
        {"prompt": "who am I?"},
        {"id": "i", "image": "red.png"},
    ]
    source = write_rows(folder / "in" / "in.jsonl", rows)
    target = folder / "out.jsonl"
    run_job(source, target, cheap)
    results = read_rows(target)
    assert [row.get("custom_id", row["id"]) for row in results] == [
        "a", None, "b", "c", "d", "e", "f", "g", "h", None, "i",
    ]  # fmt: skip
    errors = [row.get("error") for row in results]
    assert errors[0] is errors[10] is None
    assert errors[1].startswith("line 2: not valid JSON")
    missing = f"image {folder / 'in' / 'no.png'} does not exist"
    assert errors[2] == {"code": "invalid_request", "message": missing}
    assert errors[3] == missing
    assert errors[4]["message"].endswith("downloading is off, pass --allow_http to turn it on")
    assert "leaves no room in the context of 8192" in errors[5]
    assert "must not contain <img>" in errors[6]
    assert errors[7]["message"].startswith("body.tools: unknown key")
    assert "not in an image format" in errors[8]
    assert errors[9] == "line 11: id must be a string or a whole number"
    assert count_failed(target, Source(source, GenerationOptions())) == 9


def test_stop_tokens_are_counted_but_are_not_in_the_text(cheap, folder):
    rows = [{"id": n, "prompt": f"{n}", "chat": n % 2 == 1} for n in range(20)]
    run_job(write_rows(folder / "in.jsonl", rows), folder / "out.jsonl", cheap)
    results = read_rows(folder / "out.jsonl")
    counts = {(len(row["text"]), row["finish_reason"], row["usage"]["completion_tokens"]) for row in results}
    assert counts == {(3, "stop", 4), (4, "length", 4)}


def test_resumption_from_a_truncated_partial_file(cheap, folder, monkeypatch):
    """The output equals that of an uninterrupted job, and rows in the partial file are not computed again.

    The file is truncated near the ends of lines; test_journal.py truncates at every byte.
    """
    monkeypatch.setattr("os.fsync", lambda number: None)  # for speed
    source = write_rows(folder / "in" / "in.jsonl", mixed_rows())
    target, partial = folder / "out.jsonl", folder / "out.jsonl.partial"
    saved = []
    replace = type(folder).replace

    # A job renames its output into place when the partial file is complete, and then removes the partial file.
    def save_partial_and_replace(path, target):
        saved.append(partial.read_bytes())
        return replace(path, target)

    cheap.executor.prompts.clear()
    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "replace", save_partial_and_replace)
        run_job(source, target, cheap)
    expected, all_prompts = read_rows(target), list(cheap.executor.prompts)
    (complete,) = saved
    assert len(expected) == 16
    # The identity of the job, and a line for each row except the row without an id.
    assert complete.count(b"\n") == 1 + 15
    line_ends = [n + 1 for n, byte in enumerate(complete) if byte == ord("\n")]
    sizes = {0, 1}
    for line_end in line_ends:
        sizes |= {line_end - 9, line_end - 1, line_end}
    for size in sorted(sizes):
        target.unlink()
        partial.write_bytes(complete[:size])
        cheap.executor.prompts.clear()
        run_job(source, target, cheap)
        assert read_rows(target) == expected, size
        n_computed = len(cheap.executor.prompts)
        assert cheap.executor.prompts == all_prompts[len(all_prompts) - n_computed :]
        assert {path.name for path in folder.iterdir()} == {"in", "out.jsonl"}
    assert n_computed == 0


def test_a_failing_model_keeps_earlier_answers(cheap, folder, monkeypatch):
    source = write_rows(folder / "in.jsonl", [{"id": n, "prompt": f"{n}"} for n in range(12)])
    target, partial = folder / "out.jsonl", folder / "out.jsonl.partial"
    prompts = cheap.executor.prompts
    start = cheap.executor.start

    def fail_after_eight_prompts(chunks):
        if len(prompts) == 8:
            raise QwenVLError("Paddle Inference failed")
        return start(chunks)

    prompts.clear()
    with monkeypatch.context() as patch:
        patch.setattr(cheap.executor, "start", fail_after_eight_prompts)
        with pytest.raises(QwenVLError, match="Paddle Inference failed"):
            run_job(source, target, cheap)
    # Four rows run at a time: the first four have answers, the next four have been lost.
    assert partial.read_bytes().count(b"\n") == 1 + 4
    assert not target.exists()
    run_job(source, target, cheap)
    assert len(prompts) == 8 + 8
    assert [row["id"] for row in read_rows(target)] == list(range(12))


def test_a_model_that_cannot_be_loaded_ends_the_job(tiny_exported, folder, monkeypatch):
    def fail():
        raise QwenVLError("out of memory")

    model = QwenVL.from_exported(tiny_exported / "vision" / "vision", tiny_exported / "text" / "qwen")
    monkeypatch.setattr(model, "_open", fail)
    source = write_rows(folder / "in.jsonl", [{"id": 1, "prompt": "?"}, {"id": 2, "prompt": "?"}])
    with pytest.raises(QwenVLError, match="out of memory"):
        run_job(source, folder / "out.jsonl", model)
    assert not (folder / "out.jsonl").exists()


def test_a_job_that_fails_before_an_answer_leaves_no_partial_file(cheap, folder, monkeypatch):
    source = write_rows(folder / "in.jsonl", [{"id": 1, "prompt": "?"}])
    monkeypatch.setattr(cheap.executor, "start", lambda chunks: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_job(source, folder / "out.jsonl", cheap)
    assert not (folder / "out.jsonl.partial").exists()


def test_a_job_without_rows(cheap, folder):
    run_job(write_rows(folder / "in.jsonl", [b"", b" "]), folder / "out.jsonl", cheap)
    assert (folder / "out.jsonl").read_bytes() == b""
    assert not (folder / "out.jsonl.partial").exists()


@pytest.mark.parametrize(
    ("different", "prompt", "options", "added_weights"),
    [("input", "!", {}, []), ("options", "?", {"top_p": 0.5}, []), ("weights", "?", {}, ["more"])],
)
def test_another_jobs_partial_file_is_refused(
    tiny_exported, folder, different, prompt, options, added_weights
):
    model = open_cheap(tiny_exported)
    source = write_rows(folder / "in.jsonl", [{"id": 0, "prompt": "?"}])
    target, partial = folder / "out.jsonl", folder / "out.jsonl.partial"
    saved = []
    start = model.executor.start

    def save_partial_and_start(chunks):
        saved.append(partial.read_bytes())
        return start(chunks)

    model.executor.start = save_partial_and_start
    run_job(source, target, model)
    target.unlink()
    partial.write_bytes(saved[0])
    write_rows(source, [{"id": 0, "prompt": prompt}])
    model.weights.extend(added_weights)
    with pytest.raises(QwenVLError, match=rf"another job \(different: {different}\)"):
        run_job(source, target, model, **options)
    assert partial.read_bytes() == saved[0]
    assert not target.exists()


def test_the_output_of_another_process_is_kept(cheap, folder):
    """As if the other process had completed the job after the command's check for an existing output."""
    source = write_rows(folder / "in.jsonl", [{"id": 0, "prompt": "?"}])
    target = write_rows(folder / "out.jsonl", [{"id": 0, "text": "from the other process"}])
    content = target.read_bytes()
    run_job(source, target, cheap)
    assert target.read_bytes() == content
    assert not (folder / "out.jsonl.partial").exists()


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([{"id": 0, "text": ""}], id="too few"),
        pytest.param([{"id": 1, "text": ""}, {"id": 0, "text": ""}], id="wrong order"),
        pytest.param([{"id": 0, "text": ""}, {"id": 1, "text": ""}, {"id": 2, "text": ""}], id="too many"),
        pytest.param([{"id": 0, "prompt": "?"}, {"id": 1, "prompt": "?"}], id="input rows"),
        pytest.param([b"oops", b"oops"], id="not JSON"),
        pytest.param([], id="empty"),
    ],
)
def test_an_output_of_another_job_is_refused(folder, rows):
    path = write_rows(folder / "in.jsonl", [{"id": 0, "prompt": "?"}, {"id": 1, "prompt": "?"}])
    source = Source(path, GenerationOptions())
    with pytest.raises(UsageError, match=r"is not the output of .*in\.jsonl"):
        count_failed(write_rows(folder / "out.jsonl", rows), source)


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        ([{"id": 1}, {"id": "1"}, b"", {"id": 1, "prompt": "?"}], "1 and 4"),
        ([{"id": "a", "prompt": "?"}, openai_row("a", [])], "1 and 2"),
    ],
)
def test_equal_ids_are_refused(folder, rows, lines):
    with pytest.raises(UsageError, match=f"lines {lines} have the same id"):
        Source(write_rows(folder / "in.jsonl", rows), GenerationOptions())


def test_rows_without_ids_are_distinct(cheap, folder):
    run_job(write_rows(folder / "in.jsonl", [b"{", b"{", {"prompt": "?"}]), folder / "out.jsonl", cheap)
    assert [row["error"][:8] for row in read_rows(folder / "out.jsonl")] == [
        "line 1: ",
        "line 2: ",
        "line 3: ",
    ]


def test_a_byte_order_mark_and_windows_line_ends(folder):
    path = folder / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1, "prompt": "?"}\r\n\r\n{"id": 2, "prompt": "a\xe2\x80\xa8b"}')
    source = Source(path, GenerationOptions())
    assert [entry.id for entry in source.entries] == [1, 2]
    assert source.row(1).parsed.request.parts == [{"text": "a\u2028b"}]


def test_a_changed_input_is_noticed(folder):
    path = write_rows(folder / "in.jsonl", [{"id": 1, "prompt": "?"}])
    source = Source(path, GenerationOptions())
    write_rows(path, [{"id": 1, "prompt": "!"}])
    with pytest.raises(QwenVLError, match="was changed while it was being read; start again"):
        source.row(0)


def test_an_image_of_several_rows_is_encoded_once(vl, folder, monkeypatch):
    """Rows with the same image run consecutively: a cache for the features of one image suffices.

    ImageCache keeps one entry even if it exceeds max_bytes.
    """
    recording = record(vl, monkeypatch)
    monkeypatch.setattr(vl._loop, "_images", ImageCache(max_bytes=1))
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(folder / f"{name}.png")
    rows = [
        {"id": f"{name} {question}", "image": f"{name}.png", "prompt": question}
        for question in ("What?", "What is in it?", "How?")
        for name in ("a", "b", "c")
    ]
    run_job(write_rows(folder / "in.jsonl", rows), folder / "out.jsonl", vl, 3, max_new_tokens=1)
    assert recording.done.count("encode") == 3


def test_a_longer_row_does_not_truncate_the_answer_of_a_shorter_row(vl, tmp_path, monkeypatch):
    """Near the end of the context, a row's answer has the same number of tokens as in a request of its own."""
    monkeypatch.setattr(vl, "config", vl.config.model_copy(update={"max_position_embeddings": 64}))
    rows = [{"id": n, "prompt": "% " * n} for n in (31, 29, 25, 4, 3)]
    answers = [vl.generate(row["prompt"], max_new_tokens=20) for row in rows]
    run_job(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", vl, max_new_tokens=20)
    results = read_rows(tmp_path / "out.jsonl")
    assert [row["text"] for row in results] == [answer.text for answer in answers]
    n_tokens = [row["usage"]["completion_tokens"] for row in results]
    assert n_tokens == [len(answer.token_ids) for answer in answers]
    assert n_tokens[0] < n_tokens[1] < n_tokens[2]
