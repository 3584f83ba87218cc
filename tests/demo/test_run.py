"""Output of `qwenvl demo` with a random model and with the shipped one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from demo_helpers import Page
from engines import HAS_COMPILER
from PIL import Image

from paddlemix_qwenvl_plugin.cli.main import app, main
from paddlemix_qwenvl_plugin.demo import run as run_module
from paddlemix_qwenvl_plugin.demo import score as evaluation
from paddlemix_qwenvl_plugin.demo.questions import QUESTIONS
from paddlemix_qwenvl_plugin.demo.run import MODEL, run_demo
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

REPO = Path(__file__).resolve().parents[2]

ENGINE_STAGES = ("vision/vision", "text/qwen") if HAS_COMPILER else ()

needs_weights = pytest.mark.skipif(
    not (MODEL / "model.safetensors").is_file(),
    reason=f"no weights in {MODEL}: check out the whole repository",
)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


OWN = {
    ".qwenvl-demo",
    "index.html",
    "sheet.png",
    "answers.json",
    *(f"images/{path.name}" for question in QUESTIONS for path in question.images),
    *(f"vision/vision.{end}" for end in ("json", "pdmodel", "pdiparams", "manifest.json")),
    *(f"text/qwen.{end}" for end in ("json", "pdmodel", "pdiparams", "manifest.json")),
    *(f"{stage}.fused.{end}" for stage in ENGINE_STAGES for end in ("json", "pdmodel")),
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


def test_files_that_no_demo_wrote_are_left_alone(tmp_path: Path, random_model: Path) -> None:
    """Also of versions without a marker file, recognized by their page."""
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


def test_own_files_are_replaced_and_no_others(
    tmp_path: Path, random_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run with a random model in the folder of an earlier demo; wrong answers cause an error at the end."""
    mine = ["notes.txt", "vision/notes.txt", "text/mine.json", "images/mine.png"]
    out = tmp_path / "qwenvl-demo"
    for name in (*mine, *OWN):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("old")
    (out / "index.html").write_text("<html><title>qwenvl demo: 8 of 8 right")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "_MAX_NEW_TOKENS", 4)  # a random model generates no stop token
    monkeypatch.setattr(run_module, "MODEL", random_model)
    monkeypatch.setattr(sys, "argv", ["qwenvl", "demo"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    printed = capfd.readouterr()
    assert exit_info.value.code == 1
    # Paddle's log lines come first in this process, which configures logging unlike the command.
    assert printed.err.splitlines()[-1].startswith("qwenvl: 8 of the demo's 8 answers are wrong")
    assert "0 of 8 answers are right." in printed.out
    questions = [line[7:] for line in printed.out.splitlines() if line.startswith("    Q  ")]
    assert questions == [question.turn.question for question in QUESTIONS]
    assert printed.out.count("WRONG, expected: ") == 8

    assert files(out) == {*mine, *OWN}
    old = {name for name in files(out) if (out / name).read_bytes() == b"old"}
    assert old == {*mine, ".qwenvl-demo"}
    assert Page((out / "index.html").read_text("utf-8")).texts("h1") == ["0 of 8 answers are right"]
    assert json.loads((out / "answers.json").read_text("utf-8"))["right"] == 0


def test_missing_weights_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(QwenVLError, match=r"model\.safetensors: the demo model's weights are missing"):
        run_demo(tmp_path / "demo", print, tmp_path)
    assert not (tmp_path / "demo").exists()


def test_two_demos_in_one_folder(tmp_path: Path, random_model: Path) -> None:
    program = f"""
from pathlib import Path
from paddlemix_qwenvl_plugin.demo import run, score
score._MAX_NEW_TOKENS = 4
made = run.run_demo(Path("demo"), lambda line: None, Path({str(random_model)!r}))
print(len(made.results))
"""
    both = [
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
    assert [process.communicate(timeout=300) for process in both] == [("8\n", ""), ("8\n", "")]
    assert files(tmp_path / "demo") == OWN


def test_export_time_excludes_the_engine_build(
    tmp_path: Path, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(run_module, "library_state", lambda: ("not built", Path("libqwenvl.so")))
    monkeypatch.setattr(run_module, "engine_available", lambda choice, operators: time.sleep(5) or True)
    start, lines = time.perf_counter(), list[str]()
    run = run_demo(tmp_path, lines.append, random_model)
    assert run.export_seconds + 5 < time.perf_counter() - start
    assert re.fullmatch(r"Built the engine in 5\.\d s\.", lines[0])
    assert [line.split(" in ")[0] for line in lines[1:3]] == [
        "Exported the vision stage",
        "Exported the language stage",
    ]


@needs_weights
def test_the_shipped_model_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run the command as a process, on an ASCII terminal, and compare every answer with the scene."""
    done = subprocess.run(
        [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "demo", "there"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "8 of 8 answers are right." in done.stdout
    assert f"Page:   {Path('there') / 'index.html'}" in done.stdout
    answers = json.loads((tmp_path / "there" / "answers.json").read_text("utf-8"))["answers"]
    for question in QUESTIONS:
        given = answers[question.name]["answer"]
        assert given["finish_reason"] == "stop"
        scene = question.sample.scenes[-1]
        words = " ".join(given["text"].split())
        if question.name in ("caption", "grounded"):
            for thing in scene.things:
                told = [thing.text] if thing.text else [thing.size, thing.colour, thing.kind]
                assert " ".join(told) in words
        if question.name in ("grounded", "chinese"):
            assert len(given["boxes"]) == len(scene.things)
            for box, thing in zip(given["boxes"], scene.things):
                assert overlap([v for point in box["points"] for v in point], thing.bounds) >= 0.5
        if question.name == "read":
            assert all(thing.text in words for thing in scene.texts)
    assert "two" in answers["count"]["answer"]["text"]
    page = Page((tmp_path / "there" / "index.html").read_text("utf-8"))
    assert page.texts("span", "verdict") == ["right"] * 8

    # The page's command asks the demo model again.
    (command,) = [text for text in page.texts("pre") if text.startswith("qwenvl predict")]
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    app(shlex.split(command.replace("\\\n", " "))[1:], standalone_mode=False)
    assert capfd.readouterr().out == "There are four shapes.\n"

    # The documents show its output; without a Chinese font some words are missing.
    for readme in ("README.md", "README_zh.md"):
        shown = re.search(r"<ref>.*?</box>", (REPO / readme).read_text("utf-8"))
        assert shown is not None
        assert shown.group() in answers["grounded"]["answer"]["text"]
    with (
        Image.open(tmp_path / "there" / "sheet.png") as made,
        Image.open(REPO / "docs" / "images" / "demo.png") as documented,
    ):
        assert made.width == documented.width
        # Chinese text, in the last row, is higher if a font for it exists.
        same = made.height if made.height == documented.height else 2 * made.height // 3
        arrays = [np.asarray(sheet, np.int16)[:same] for sheet in (made, documented)]
        difference = np.abs(arrays[0] - arrays[1]).max(axis=-1)
    assert (difference > 32).mean() < 0.02


def overlap(a: list[int], b: tuple[float, float, float, float]) -> float:
    """Intersection over union, by counting points of a grid."""
    points = [(x + 0.5, y + 0.5) for x in range(0, 1000, 5) for y in range(0, 1000, 5)]
    inside = [[r[0] <= x <= r[2] and r[1] <= y <= r[3] for x, y in points] for r in (a, b)]
    both = sum(p and q for p, q in zip(*inside))
    return both / sum(p or q for p, q in zip(*inside))
