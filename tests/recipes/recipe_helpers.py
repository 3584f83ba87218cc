"""Write a recipe file, and run `qwenvl` on it in a process, from an empty folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[2]


def recipe(**keys: Any) -> dict[str, Any]:
    """A valid recipe; `keys` replace or add top-level ones."""
    return {"schema": 1, "name": "fake", "why": "a test", "steps": [step("only", "print('hello')")], **keys}


def step(name: str, code: str, *arguments: str, **keys: Any) -> dict[str, Any]:
    """A step that runs Python code with arguments."""
    return {"name": name, "run": ["${python}", "-c", code, *arguments], **keys}


def write(folder: Path, data: Any, name: str = "fake.yaml") -> Path:
    """Write a recipe's data (or, as a str, its text) and return the file."""
    path = folder / name
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False))
    return path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `qwenvl ARGUMENTS` in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )


def qwenvl(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `qwenvl ARGUMENTS` in `folder` and wait for it."""
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_folder(folder: Path) -> Path:
    """The only run folder under `folder`/runs."""
    (found,) = (folder / "runs").iterdir()
    return found


def results(folder: Path) -> dict[str, Any]:
    """results.json of the only run under `folder`/runs."""
    data: dict[str, Any] = json.loads((run_folder(folder) / "results.json").read_text())
    return data
