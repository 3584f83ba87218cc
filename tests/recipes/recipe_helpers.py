"""Recipe files, and processes of `qwenvl` that run them in a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[2]


def recipe(**keys: Any) -> dict[str, Any]:
    """Build a valid recipe; `keys` replace or add top-level keys."""
    return {"schema": 1, "name": "fake", "why": "a test", "steps": [step("only", "print('hello')")], **keys}


def step(name: str, code: str, *arguments: str, **keys: Any) -> dict[str, Any]:
    """Build a step that runs Python code with arguments; `keys` are other keys of the step."""
    return {"name": name, "run": ["${python}", "-c", code, *arguments], **keys}


def write(folder: Path, data: Any, name: str = "fake.yaml") -> Path:
    """Write a recipe, given as data or as YAML text, and return its path."""
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
    )


def qwenvl(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `qwenvl ARGUMENTS` in `folder` and wait for it."""
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_folder(folder: Path) -> Path:
    """Return the only run folder in `folder`/runs."""
    (run_folder,) = (folder / "runs").iterdir()
    return run_folder


def results(folder: Path) -> dict[str, Any]:
    """Read results.json of the only run in `folder`/runs."""
    data: dict[str, Any] = json.loads((run_folder(folder) / "results.json").read_text())
    return data
