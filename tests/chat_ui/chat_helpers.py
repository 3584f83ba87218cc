"""`qwenvl chat` on a real pseudo-terminal."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pexpect

from paddlemix_qwenvl_plugin.engine.build import cache_folder

REPO = Path(__file__).resolve().parents[2]
STREET = REPO / "recipes" / "images" / "street.png"

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b_G.*?\x1b\\|\x1b\][^\x07]*\x07", re.DOTALL)
# prompt_toolkit asks for marked pastes whenever it begins to read a line, and ends that with the line.
_READING = "\x1b[?2004h"
_READ = "\x1b[?2004l"


def command(exported: Path, *arguments: str) -> list[str]:
    """The command line of a chat with these stages."""
    stages = [
        "--first_model_path",
        f"{exported}/vision/vision",
        "--second_model_path",
        f"{exported}/text/qwen",
    ]
    return [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "chat", *stages, *arguments]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Environment of a terminal without image previews, with its own home folder."""
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "OMP_NUM_THREADS")}
    return {
        **kept,
        "PYTHONPATH": str(REPO),
        "PYTHONUTF8": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HOME": str(folder / "home"),
        "QWENVL_CACHE_DIR": str(cache_folder().parent),  # the engine that is built already
        "XDG_STATE_HOME": str(folder / "home" / "state"),
        "TERM": "xterm-256color",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # pexpect does not answer where the cursor is
        **more,
    }


class Terminal:
    """User at a terminal, scripted."""

    def __init__(self, exported: Path, folder: Path, *arguments: str, **variables: str) -> None:
        program, *rest = command(exported, *arguments)
        self.child = pexpect.spawn(
            program,
            rest,
            cwd=str(folder),
            env=environment(folder, **variables),
            encoding="utf-8",
            timeout=60,
            dimensions=(40, 200),
        )
        self.raw = ""
        self.child.delaybeforesend = None
        self.greeting = self.until_prompt()

    def until_prompt(self) -> str:
        """Output up to the next prompt, without escapes."""
        self.child.expect_exact(_READING)
        self.raw = self.child.before
        return plain(self.raw)

    def start(self, line: str) -> None:
        """Type a line and press enter."""
        self.child.send(f"{line}\r")
        self.child.expect_exact(_READ)

    def type(self, line: str) -> str:
        """Type a line, press enter and return the output."""
        self.start(line)
        return self.until_prompt()

    def leave(self) -> int:
        """Press Ctrl-D on an empty line and return the exit code."""
        self.child.sendeof()
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert self.child.signalstatus is None
        return int(self.child.exitstatus)


def plain(raw: str) -> str:
    """Visible text of an output, without escapes and overwritten lines."""
    text = _ESCAPES.sub("", raw.replace("\r\n", "\n"))
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))
