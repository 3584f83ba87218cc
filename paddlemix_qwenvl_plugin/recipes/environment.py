"""Environment of a run: command, interpreter, machine, GPUs, package versions, environment variables, commit."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

from paddlemix_qwenvl_plugin.util.machine import gpus, memory_gib

_REPO = Path(__file__).resolve().parents[2]
_PACKAGES = (
    "paddlemix-qwenvl-plugin",
    "paddlepaddle",
    "paddlepaddle-gpu",
    "paddlenlp",
    "paddlemix",
    "numpy",
    "pillow",
    "tiktoken",
    "safetensors",
)
# Prefixes of variables that affect Paddle, the math libraries or this package.
_VARIABLES = ("CUDA_", "FLAGS_", "MKL_", "OMP_", "QWENVL_")
_SECRETS = ("QWENVL_API_KEY",)  # variables whose values are not recorded


def describe() -> dict[str, Any]:
    """Describe the environment of a run, for environment.json."""
    changes = _git("status", "--porcelain")
    return {
        "command": shlex.join(["qwenvl", *sys.argv[1:]]),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "memory_gib": _rounded(memory_gib()),
        "gpus": gpus(),
        "packages": {name: version(name) for name in _PACKAGES},
        "variables": {
            name: "(not recorded)" if name in _SECRETS else value
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES)
        },
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": None if changes is None else bool(changes),
    }


def version(distribution: str) -> Optional[str]:
    """Version of a distribution, read without importing it; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _rounded(value: Optional[float]) -> Optional[float]:
    return None if value is None else round(value, 1)


def _git(*arguments: str) -> Optional[str]:
    # A wheel installed inside another repository must not report that repository's commit.
    if not (_REPO / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(_REPO), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # git is missing, fails (no commit yet) or times out
    return done.stdout.strip()
