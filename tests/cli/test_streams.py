"""Standard streams: encodings that lack characters of the answer, and closed streams."""

from __future__ import annotations

import codecs
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from executors import script_completion

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.artifact.verify import verify
from paddlemix_qwenvl_plugin.cli.main import main

REPO = Path(__file__).resolve().parents[2]

ANSWER = "一只狗, café, 😀"


def stages(exported: Path) -> list[str]:
    vision, text = exported / "vision" / "vision", exported / "text" / "qwen"
    return ["--first_model_path", str(vision), "--second_model_path", str(text)]


def run(
    command: list[str], encoding: str, exported: Path, monkeypatch: pytest.MonkeyPatch, stdin: str = ""
) -> bytes:
    """Run a command with ANSWER as the model's answer and stdout in an encoding; return the bytes of stdout."""
    model = QwenVL.from_exported(exported / "vision" / "vision", exported / "text" / "qwen")
    script_completion(model, monkeypatch, [*model.tokenizer.encode(ANSWER), model.tokenizer.eod_id])
    stdout = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(QwenVL, "from_exported", lambda *arguments: model)
        patch.setattr(sys, "argv", ["qwenvl", *command, *stages(exported)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        patch.setattr(sys, "stdout", io.TextIOWrapper(stdout, encoding))
        with pytest.raises(SystemExit) as system_exit:
            main()
        sys.stdout.flush()
        assert system_exit.value.code == 0
        return stdout.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("command", ["predict", "predict --json", "chat"])
def test_encodings_of_stdout(
    encoding: str, command: str, tiny_exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Characters that an encoding lacks are printed as escapes of Python, or of JSON; a file is always in UTF-8."""
    stdin = "What is it?\n" if command == "chat" else ""
    arguments = [*command.split(), "--max_new_tokens", "99"]
    if command != "chat":
        arguments += ["--prompt", "?", "--output", str(tmp_path / "answer.json")]
    stdout = run(arguments, encoding, tiny_exported, monkeypatch, stdin)
    if "--json" in arguments:
        text = json.loads(stdout.decode(encoding))["text"]
    elif encoding == "utf-8":
        text = stdout.decode()
    else:
        text = codecs.decode(stdout, "unicode_escape")
    assert text.strip() == ANSWER
    if command != "chat":
        assert json.loads((tmp_path / "answer.json").read_text("utf-8"))["text"] == ANSWER


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-", ">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["chat", "predict", "export-vision"])
def test_closed_streams(command: str, closed: str, tiny_exported: Path, tmp_path: Path) -> None:
    """Without stdin, `chat` fails; all other cases succeed.

    A file that a command opens may get the descriptor of a closed stream: no printed text must get into it.
    """
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
    completed = subprocess.run(
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
    assert completed.returncode == (2 if no_input else 0)
    assert (b"standard input: is closed" in completed.stderr) == (no_input and "2>&-" not in closed)
    stdout_closed = ">&-" in closed.split()
    assert completed.stdout.count(b"\n") == (0 if no_input or stdout_closed else 1)
    if command == "predict":
        assert json.loads((tmp_path / "answer.json").read_text("utf-8"))["finish_reason"] == "length"
    if command == "export-vision":
        verify(tmp_path / "vision")


def test_errors_are_not_printed_on_stdout_if_stderr_is_closed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "verify", "nothing"]
    completed = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        check=False,
    )
    assert (completed.returncode, completed.stdout, completed.stderr) == (2, b"", b"")
