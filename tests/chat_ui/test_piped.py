"""`qwenvl chat` with piped input, as in a script."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_helpers import STREET, command, environment

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.util.text import without_controls

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tiny_exported: Path, tmp_path: Path) -> Run:
    """Function that runs the chat with input lines and arguments."""

    def run(lines: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(tiny_exported, "--max_new_tokens", "8", *arguments),
            input=lines,
            cwd=tmp_path,
            env=environment(tmp_path, TERM="xterm-kitty"),  # piped output must not get the previews of kitty
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            check=False,
        )

    return run


def test_output_is_only_the_answers(run: Run, vl: QwenVL, tmp_path: Path) -> None:
    query = [{"image": str(STREET)}, {"text": "What is it?"}]
    first = vl.generate(query, chat=True, max_new_tokens=8).text
    second = vl.generate("Sure?", chat=True, history=[(query, first)], max_new_tokens=8).text
    lines = f"/image {STREET}\n\nWhat is it?\n  Sure?  \n/save talk.json\n/quit\nWhy?\n"
    completed = run(lines)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert completed.stdout == f"{without_controls(first)}\n{without_controls(second)}\n"
    assert {path.name for path in tmp_path.iterdir()} - {"home"} == {"talk.json"}
    assert len(json.loads((tmp_path / "talk.json").read_text("utf-8"))["turns"]) == 2


def test_first_error_ends_the_program(run: Run, vl: QwenVL) -> None:
    query = [{"image": str(STREET)}, {"text": "Hello"}]
    first = vl.generate(query, chat=True, max_new_tokens=8).text
    completed = run("Hello\n/image nothing.png\nWhat is it?\n", "--image", str(STREET))
    assert completed.returncode == 2
    assert completed.stderr == "qwenvl: image nothing.png does not exist\n"
    assert completed.stdout == f"{without_controls(first)}\n"


def test_answer_is_written_before_the_next_question_is_read(tiny_exported: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        command(tiny_exported, "--max_new_tokens", "2"),
        cwd=tmp_path,
        env=environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        watchdog = threading.Timer(60, program.kill)
        watchdog.start()
        for question in ("One?\n", "Two?\n"):
            program.stdin.write(question)
            program.stdin.flush()
            assert program.stdout.readline().endswith("\n")
        program.stdin.close()
        assert program.wait() == 0
        watchdog.cancel()
