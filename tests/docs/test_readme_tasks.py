"""The README's tasks on the demo model print what it shows; its figures are those of docs/benchmarks.md."""

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
    """Run a shell command with `.venv/bin/qwenvl` as this checkout's command, and return its output."""
    command = command.replace(".venv/bin/qwenvl", f"'{sys.executable}' -m paddlemix_qwenvl_plugin.cli")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory after `qwenvl demo`."""
    path = tmp_path_factory.mktemp("readme")
    qwenvl(".venv/bin/qwenvl demo", path)
    return path


@pytest.mark.parametrize("task", ["Describe an image", "Find and draw", "Chat"])
def test_output_is_as_printed(task: str, folder: Path) -> None:
    (command,) = blocks(section(README, task), "sh")
    (printed,) = blocks(section(README, task), "text")
    assert qwenvl(command, folder) == printed


def test_boxes_are_drawn_as_shown(folder: Path) -> None:
    (command,) = blocks(section(README, "Find and draw"), "sh")
    qwenvl(command, folder)
    (shown,) = re.findall(r"!\[.*\]\((.*)\)", section(README, "Find and draw"))
    with Image.open(folder / "answer.png") as drawn, Image.open(REPO / shown) as documented:
        assert drawn.size == documented.size
        pixels = [np.asarray(image.convert("RGB"), np.int16) for image in (drawn, documented)]
    # Fonts differ between systems.
    assert (np.abs(pixels[0] - pixels[1]).max(axis=-1) > 32).mean() < 0.05


def test_batch(folder: Path) -> None:
    text = section(README, "Batch")
    rows, results = blocks(text, "jsonl")
    (folder / "questions.jsonl").write_text(rows, "utf-8")
    qwenvl(blocks(text, "sh")[0], folder)
    answers = (folder / "answers.jsonl").read_text("utf-8")
    assert [json.loads(line) for line in answers.splitlines()] == [
        json.loads(line) for line in results.splitlines()
    ]


def test_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (example,) = blocks(section(README, "From Python"), "python")
    run_block(example, {}, "README.md")


def test_figures_are_measured() -> None:
    benchmarks = (REPO / "docs" / "benchmarks.md").read_text("utf-8")
    head = README.split("\n## ")[0]
    cells = [cell for row in re.findall(r"^\|(.*)\|$", head, re.MULTILINE) for cell in row.split("|")[1:]]
    figures = [cell.strip() for cell in cells if re.fullmatch(r" *[\d.]+ *", cell)]
    figures += re.findall(r"\d+\.\d+ s\b", head)
    assert len(figures) > 8
    for figure in figures:
        assert f"| {figure} |" in benchmarks, figure
    (memory,) = re.findall(r"([\d.]+) GiB", head)
    assert f"| {memory} in all |" in benchmarks
