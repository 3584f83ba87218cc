"""Signals: on SIGINT, SIGTERM or SIGHUP a command cleans up and prints one line, without Paddle's traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
STREET = REPO / "recipes" / "images" / "street.png"

# Program that runs a command and sends itself the signal of its first argument as soon as Paddle is imported.
RUN_WITH_SIGNAL = """
import os, sys, threading, time
from paddlemix_qwenvl_plugin.cli.main import main

number = int(sys.argv.pop(1))

def send_signal():
    while "paddle" not in sys.modules or sys.modules["paddle"].__spec__._initializing:
        time.sleep(0.001)
    os.kill(os.getpid(), number)

threading.Thread(target=send_signal, daemon=True).start()
main()
"""


def run_with_signal(
    number: signal.Signals, folder: Path, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` that gets a signal during its work.

    Its standard input stays open, so that `chat` waits for a line.
    """
    reader, writer = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-c", RUN_WITH_SIGNAL, str(int(number)), *map(str, arguments)],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(REPO),
                "QWENVL_ENGINE": "portable",
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdin=reader,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("command", ["predict", "chat", "batch", "export-vision", "demo", "eval"])
def test_sigterm(command: str, tiny_exported: Path, tmp_path: Path) -> None:
    stages = [
        *("--first_model_path", tiny_exported / "vision" / "vision"),
        *("--second_model_path", tiny_exported / "text" / "qwen"),
    ]
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "?", "max_new_tokens": 8000}\n')
    arguments = {
        "predict": [*stages, "--prompt", "?", "--max_new_tokens", 8000, "--output", "answer.json"],
        "chat": stages,
        "batch": ["in.jsonl", "out.jsonl", *stages],
        "export-vision": ["--model_name_or_path", tiny_exported / "model", "--save_path", "vision"],
        "demo": ["demo"],
        "eval": ["demo", *stages, "--output", "out.jsonl"],
    }[command]
    completed = run_with_signal(signal.SIGTERM, tmp_path, command, *arguments)
    assert (completed.returncode, completed.stderr) == (143, "qwenvl: terminated\n")
    assert "Traceback" not in completed.stdout
    assert "FatalError" not in completed.stdout
    # No files remain except the input, the partial file of `batch` and the marker in the folder of `demo`.
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files <= {"in.jsonl", "out.jsonl.partial", ".qwenvl-demo"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_sigint_and_sighup(number: signal.Signals, tiny_exported: Path, tmp_path: Path) -> None:
    export = ["export-vision", "--model_name_or_path", tiny_exported / "model", "--save_path", "vision"]
    completed = run_with_signal(number, tmp_path, *export)
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert (completed.returncode, completed.stdout, completed.stderr.strip()) == (
        128 + number,
        "",
        f"qwenvl: {word}",
    )
    assert not list(tmp_path.iterdir())


def run_with_signal_in_a_call(
    number: signal.Signals, folder: Path, call: str
) -> subprocess.CompletedProcess[str]:
    """Run `make-tiny` with its work replaced by `call`, and send it a signal after 0.5 s.

    After another 0.5 s SIGTERM and SIGHUP end the process even if `call` is in C and has not returned.
    """
    code = f"""
import hashlib, os, signal, sys, threading, time
from paddlemix_qwenvl_plugin.cli import main, signals
from paddlemix_qwenvl_plugin.tiny import make
signals._PATIENCE_SECONDS = 0.5
signal.signal(signal.SIGUSR1, lambda *_: None)
threading.Timer(0.5, os.kill, (os.getpid(), {int(number)})).start()
make.make_tiny = lambda *_: {call}
sys.argv = ["qwenvl", "make-tiny", "model"]
main.main()
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_sigterm_during_a_long_call(tmp_path: Path) -> None:
    """Python runs a signal handler only after the call into C has returned, here after minutes."""
    completed = run_with_signal_in_a_call(
        signal.SIGTERM, tmp_path, 'hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)'
    )
    assert (completed.returncode, completed.stdout, completed.stderr) == (143, "", "qwenvl: terminated\n")


def test_other_signals_do_not_end_a_command(tmp_path: Path) -> None:
    """Such as SIGWINCH, for a change of the terminal's size; the test sends SIGUSR1, which has an empty handler."""
    completed = run_with_signal_in_a_call(signal.SIGUSR1, tmp_path, "time.sleep(3)")
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "made model\n", "")


def test_an_ignored_signal_stays_ignored(tiny_exported: Path, tmp_path: Path) -> None:
    """`nohup` starts a command with SIGHUP ignored."""
    command = ["nohup", sys.executable, "-c", RUN_WITH_SIGNAL, str(int(signal.SIGHUP)), "export-vision"]
    command += ["--model_name_or_path", str(tiny_exported / "model"), "--save_path", "vision"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "QWENVL_ENGINE": "portable"}
    completed = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr
    assert (tmp_path / "vision.manifest.json").is_file()
