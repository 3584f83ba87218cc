"""Closed standard streams, and encodings that lack characters of the output."""

from __future__ import annotations

import codecs
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from executors import say

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.artifact.verify import verify
from paddlemix_qwenvl_plugin.cli.main import main

REPO = Path(__file__).resolve().parents[2]

SAID = "一只狗, café, 😀"


def stages(exported: Path) -> list[str]:
    vision, text = exported / "vision" / "vision", exported / "text" / "qwen"
    return ["--first_model_path", str(vision), "--second_model_path", str(text)]


def ask(
    command: list[str], encoding: str, exported: Path, monkeypatch: pytest.MonkeyPatch, lines: str = ""
) -> bytes:
    """Output of a command in this encoding, with SAID as the model's answer."""
    pair = QwenVL.from_exported(exported / "vision" / "vision", exported / "text" / "qwen")
    say(pair, monkeypatch, [*pair.tokenizer.encode(SAID), pair.tokenizer.eod_id])
    printed = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(QwenVL, "from_exported", lambda *arguments: pair)
        patch.setattr(sys, "argv", ["qwenvl", *command, *stages(exported)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), "utf-8"))
        patch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding))
        with pytest.raises(SystemExit) as ended:
            main()
        sys.stdout.flush()
        assert ended.value.code == 0
        return printed.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("command", ["predict", "predict --json", "chat"])
def test_an_answer_arrives_in_every_encoding(
    encoding: str, command: str, tiny_exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, lines = command.split(), "" if "predict" in command else "What is it?\n"
    words += ["--max_new_tokens", "99"]
    if not lines:
        words += ["--prompt", "?", "--output", str(tmp_path / "answer.json")]
    printed = ask(words, encoding, tiny_exported, monkeypatch, lines)
    if "--json" in words:
        text = json.loads(printed.decode(encoding))["text"]
    elif encoding == "utf-8":
        text = printed.decode()
    else:  # Python's escapes
        text = codecs.decode(printed, "unicode_escape")
    assert text.strip() == SAID
    if not lines:
        assert json.loads((tmp_path / "answer.json").read_text("utf-8"))["text"] == SAID


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-", ">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["chat", "predict", "export-vision"])
def test_closed_streams(command: str, closed: str, tiny_exported: Path, tmp_path: Path) -> None:
    """Other output is complete, and no file receives the printed text."""
    arguments = {
        "chat": [*stages(tiny_exported), "--max_new_tokens", "2"],
        "predict": [
            *stages(tiny_exported),
            "--prompt",
            "?",
            "--max_new_tokens",
            "2",
            "--output",
            "answer.json",
        ],
        "export-vision": ["--model_name_or_path", str(tiny_exported / "model"), "--save_path", "vision"],
    }[command]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", command,
         *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO), "QWENVL_ENGINE": "portable", "CUDA_VISIBLE_DEVICES": ""},
        input=b"What is it?\n",
        capture_output=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    no_input = command == "chat" and "<&-" in closed
    assert done.returncode == (2 if no_input else 0)
    assert (b"standard input: is closed" in done.stderr) == (no_input and "2>&-" not in closed)
    assert done.stdout.count(b"\n") == (0 if no_input or " >&-" in f" {closed}" else 1)
    if command == "predict":
        assert json.loads((tmp_path / "answer.json").read_text("utf-8"))["finish_reason"] == "length"
    if command == "export-vision":
        verify(tmp_path / "vision")


def test_a_closed_error_output_does_not_go_to_the_answers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "verify", "nothing"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")
