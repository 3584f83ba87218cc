"""Progress lines `[3/6] export-language … ok 14 s`: on a terminal, the elapsed time is shown while a step runs."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Optional


def seconds_text(seconds: float) -> str:
    """Format seconds: one decimal below ten, none from ten on."""
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


class StepLine:
    """Progress line of one step on stdout. Call `tick` while the step runs and `done` with its outcome."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._verdict = "interrupted"
        self._status = None
        if sys.stdout.isatty():
            from rich.console import Console

            self._status = Console().status("", spinner="dots")

    def __enter__(self) -> StepLine:
        if self._status:
            self._status.start()
        else:
            print(f"{self._label} … ", end="", flush=True)
        return self

    def tick(self, seconds: float) -> None:
        """Show the elapsed time (terminal only)."""
        if self._status:
            from rich.text import Text

            # Text, not str: brackets in a str are markup.
            self._status.update(Text(f"{self._label} … {seconds:.0f} s"))

    def done(self, verdict: str) -> None:
        """Set the text that ends the line."""
        self._verdict = verdict

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        if self._status:
            self._status.stop()
            print(f"{self._label} … ", end="")
        print(self._verdict, flush=True)
