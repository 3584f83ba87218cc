"""The README's commands from "Describe an image" to "Batch", its Python example, and its figures from benchmarks.md.

The commands and the example print the output in the README.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from doc_helpers import REPO, blocks, section
from PIL import Image
from test_docs_examples import run_block

README = (REPO / "README.md").read_text("utf-8")


def qwenvl(command: str, folder: Path) -> str:
    """Run a shell command, with this checkout's command in place of `.venv/bin/qwenvl`, and return its output."""
    command = command.replace(".venv/bin/qwenvl", f"'{sys.executable}' -m paddlemix_qwenvl_plugin.cli")
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory after `qwenvl demo`."""
    path = tmp_path_factory.mktemp("readme")
    qwenvl(".venv/bin/qwenvl demo", path)
    return path


@pytest.mark.parametrize("heading", ["Describe an image", "Find and draw", "Chat"])
def test_output(heading: str, folder: Path) -> None:
    (command,) = blocks(section(README, heading), "sh")
    (documented,) = blocks(section(README, heading), "text")
    assert qwenvl(command, folder) == documented


def test_drawn_boxes(folder: Path) -> None:
    """The command draws the image that the README shows."""
    (command,) = blocks(section(README, "Find and draw"), "sh")
    qwenvl(command, folder)
    (path,) = re.findall(r"!\[.*\]\((.*)\)", section(README, "Find and draw"))
    with Image.open(folder / "answer.png") as drawn, Image.open(REPO / path) as documented:
        assert drawn.size == documented.size
        pixels = [np.asarray(image.convert("RGB"), np.int16) for image in (drawn, documented)]
    # Fonts differ between systems: up to 5 % of the pixels may differ.
    assert (np.abs(pixels[0] - pixels[1]).max(axis=-1) > 32).mean() < 0.05


def test_batch(folder: Path) -> None:
    text = section(README, "Batch")
    questions, documented = blocks(text, "jsonl")
    (folder / "questions.jsonl").write_text(questions, "utf-8")
    qwenvl(blocks(text, "sh")[0], folder)
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
    assert answers == [json.loads(line) for line in documented.splitlines()]


def test_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (example,) = blocks(section(README, "From Python"), "python")
    run_block(example, {}, "README.md")


def test_figures_are_in_the_benchmarks() -> None:
    """The figures before the README's first section: numbers in tables, seconds and GiB in the text."""
    benchmarks = (REPO / "docs" / "benchmarks.md").read_text("utf-8")
    introduction = README.split("\n## ")[0]
    rows = re.findall(r"^\|(.*)\|$", introduction, re.MULTILINE)
    cells = [cell for row in rows for cell in row.split("|")[1:]]
    figures = [cell.strip() for cell in cells if re.fullmatch(r" *[\d.]+ *", cell)]
    figures += re.findall(r"\d+\.\d+ s\b", introduction)
    assert len(figures) > 8
    for figure in figures:
        assert f"| {figure} |" in benchmarks, figure
    (memory,) = re.findall(r"([\d.]+) GiB", introduction)
    assert f"| {memory} in all |" in benchmarks
