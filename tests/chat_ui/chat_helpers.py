"""Helpers for `qwenvl chat` as a process, also on a pseudo-terminal."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pexpect

from paddlemix_qwenvl_plugin.engine.build import cache_folder

REPO = Path(__file__).resolve().parents[2]
STREET = REPO / "recipes" / "images" / "street.png"

# Escape sequences: CSI (colours, cursor), kitty's graphics, OSC.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b_G.*?\x1b\\|\x1b\][^\x07]*\x07", re.DOTALL)
# prompt_toolkit switches bracketed paste on when it starts to read a line, and off when the line is complete.
PROMPT_STARTS = "\x1b[?2004h"
_PROMPT_ENDS = "\x1b[?2004l"


def command(exported: Path, *arguments: str) -> list[str]:
    """The command line of `qwenvl chat` with the exported stages in a folder."""
    stages = [
        "--first_model_path",
        f"{exported}/vision/vision",
        "--second_model_path",
        f"{exported}/text/qwen",
    ]
    return [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "chat", *stages, *arguments]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Environment of a terminal without image previews, changed by `variables`; the home folder is `folder`/home."""
    inherited = {
        key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "OMP_NUM_THREADS")
    }
    return {
        **inherited,
        "PYTHONPATH": str(REPO),
        "PYTHONUTF8": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HOME": str(folder / "home"),
        "QWENVL_CACHE_DIR": str(cache_folder().parent),  # has the compiled engine
        "XDG_STATE_HOME": str(folder / "home" / "state"),
        "TERM": "xterm-256color",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # pexpect does not answer queries of the cursor position
        **variables,
    }


class Terminal:
    """Scripted user of `qwenvl chat` on a pseudo-terminal.

    Attributes:
        child: the process.
        raw: the output of the last `until_prompt`, with escape sequences.
        greeting: the output before the first prompt.
    """

    def __init__(self, exported: Path, folder: Path, *arguments: str, **variables: str) -> None:
        program, *program_arguments = command(exported, *arguments)
        self.child = pexpect.spawn(
            program,
            program_arguments,
            cwd=str(folder),
            env=environment(folder, **variables),
            encoding="utf-8",
            timeout=60,
            dimensions=(40, 200),
        )
        self.raw = ""
        self.child.delaybeforesend = None  # by default pexpect waits 50 ms before it sends
        self.greeting = self.until_prompt()

    def until_prompt(self) -> str:
        """Wait for the next prompt; return the visible output before it."""
        self.child.expect_exact(PROMPT_STARTS)
        self.raw = self.child.before
        return plain(self.raw)

    def start(self, line: str) -> None:
        """Type a line and press Enter, without waiting for the answer."""
        self.child.send(f"{line}\r")
        self.child.expect_exact(_PROMPT_ENDS)

    def type(self, line: str) -> str:
        """Type a line, press Enter, and return the visible output before the next prompt."""
        self.start(line)
        return self.until_prompt()

    def exit(self) -> int:
        """Press Ctrl-D on an empty line and return the exit code."""
        self.child.sendeof()
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert self.child.signalstatus is None
        return int(self.child.exitstatus)


def plain(raw: str) -> str:
    """The visible text of an output: no escape sequences, and only the last version of an overwritten line."""
    text = _ESCAPES.sub("", raw.replace("\r\n", "\n"))
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))
