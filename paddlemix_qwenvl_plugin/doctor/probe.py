"""Probes, each in a process of its own, where a broken Paddle may raise, abort, hang or print."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

TIMEOUT = 180.0  # seconds; importing PaddleMIX takes about 20 on two slow cores


@dataclass(frozen=True)
class Answer:
    """Return value of a function of questions.py, or the cause of its failure. `usage`: it raised a UsageError."""

    value: dict[str, Any]
    cause: Optional[str] = None
    usage: bool = False


def ask(question: str, *arguments: str, timeout: float = TIMEOUT) -> Answer:
    """Call a function of questions.py in a new interpreter with the same sys.path; `timeout` in seconds."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from paddlemix_qwenvl_plugin.doctor import questions; questions.main()"
    )
    with tempfile.TemporaryDirectory(prefix="qwenvl-doctor-") as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log.txt"
        # Files, not pipes: a surviving grandchild would keep a pipe open.
        with log.open("wb") as stream:
            try:
                exit_code = subprocess.run(
                    [sys.executable, "-c", code, question, str(result), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    timeout=timeout,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                return Answer({}, f"timed out after {timeout:g} s")
        if result.is_file():
            return Answer(**json.loads(result.read_text("utf-8")))
        lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return Answer({}, one_line(": ".join([_ending(exit_code), *lines[-1:]])))


def one_line(text: str) -> str:
    """Format text as one line of at most 500 characters without control characters."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "?" for c in line)[:500]


def cause_of(error: BaseException) -> str:
    """Format an exception as one line: its type and message."""
    return one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _ending(code: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code}"
    try:
        return f"the process was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"the process was killed by signal {-code}"
