"""Batch jobs killed with SIGKILL at random times: the completed output equals that of an uninterrupted job."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batch_helpers import REPO, STREET, openai_row, read_rows, text, user, write_rows
from PIL import Image

N_ROWS = 500
N_KILLS = 10


@pytest.fixture
def folder(tmp_path):
    """Folder with in.jsonl, 500 rows.

    Of every 25 rows, two have images (one in OpenAI's form), one names a missing image and fails, and one is sampled.
    """
    colours = ("red", "green", "blue")
    for colour in colours:
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")
    rows = [{"id": n, "prompt": "word " * (n % 23) + f"{n}?"} for n in range(N_ROWS)]
    for n in range(0, N_ROWS, 25):
        rows[n] = {"id": n, "image": f"{colours[n % 3]}.png", "prompt": f"{n}?", "max_new_tokens": 3}
        rows[n + 1] = openai_row(f"chat {n}", [user(str(STREET), text(f"{n}?"))])
        rows[n + 2] = {"id": f"bad {n}", "image": "none.png"}
        rows[n + 3] = {"id": f"sampled {n}", "prompt": "?", "temperature": 3, "seed": n % 2}
    write_rows(tmp_path / "in.jsonl", rows)
    return tmp_path


def start(folder: Path, exported: Path, target: str) -> subprocess.Popen[bytes]:
    """Start `qwenvl batch in.jsonl TARGET` in the folder."""
    stages = [
        "--first_model_path",
        exported / "vision" / "vision",
        "--second_model_path",
        exported / "text" / "qwen",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "batch", "in.jsonl", target, *stages,
         "--max_new_tokens", "2"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a job and check that it reports the 20 failing rows."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert err.splitlines()[-1].startswith(f"qwenvl: 20 of {N_ROWS} rows failed".encode())
    assert out.endswith(f": wrote {N_ROWS} rows\n".encode())


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_killed_ten_times(folder, tiny_exported):
    finish(start(folder, tiny_exported, "expected.jsonl"))
    output_size = size(folder / "expected.jsonl")
    random.seed(0)
    partial = folder / "out.jsonl.partial"
    for _ in range(N_KILLS):
        # Kill each process after it has added a random part of the output to the partial file, at most 1/20, and after
        # a random time of at most 30 ms: at any point of a step.
        min_size = size(partial) + random.randrange(output_size // 20)
        process = start(folder, tiny_exported, "out.jsonl")
        while size(partial) <= min_size and process.poll() is None:
            time.sleep(0.001)
        time.sleep(random.random() * 0.03)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert not (folder / "out.jsonl").exists()
    finish(start(folder, tiny_exported, "out.jsonl"))

    results, expected = read_rows(folder / "out.jsonl"), read_rows(folder / "expected.jsonl")
    assert len(results) == len({str(row.get("custom_id", row["id"])) for row in results}) == N_ROWS
    assert results == expected
    assert not partial.exists()
