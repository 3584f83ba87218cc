"""Ctrl-C and SIGTERM: a command cleans up and prints one line, without Paddle's traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
STREET = REPO / "recipes" / "images" / "street.png"

# Sends itself a signal as soon as Paddle is imported.
RUN = """
import os, sys, threading, time
from paddlemix_qwenvl_plugin.cli.main import main

number = int(sys.argv.pop(1))

def wait():
    while "paddle" not in sys.modules or sys.modules["paddle"].__spec__._initializing:
        time.sleep(0.001)
    os.kill(os.getpid(), number)

threading.Thread(target=wait, daemon=True).start()
main()
"""


def end(number: signal.Signals, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` and send it a signal; its input stays open."""
    reader, writer = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-c", RUN, str(int(number)), *map(str, arguments)],
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
            # A test run that was started in the background has SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
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
    done = end(signal.SIGTERM, tmp_path, command, *arguments)
    assert (done.returncode, done.stderr) == (143, "qwenvl: terminated\n")
    assert "Traceback" not in done.stdout
    assert "FatalError" not in done.stdout
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {"in.jsonl", "out.jsonl.partial", ".qwenvl-demo"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_terminal_that_disconnects(
    number: signal.Signals, tiny_exported: Path, tmp_path: Path
) -> None:
    export = ["export-vision", "--model_name_or_path", tiny_exported / "model", "--save_path", "vision"]
    done = end(number, tmp_path, *export)
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert (done.returncode, done.stdout, done.stderr.strip()) == (128 + number, "", f"qwenvl: {word}")
    assert not list(tmp_path.iterdir())


def in_a_call(number: signal.Signals, folder: Path, call: str) -> subprocess.CompletedProcess[str]:
    """`make-tiny`, sent a signal during a call, with a short deadline."""
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


def test_sigterm_ends_a_command_that_is_in_a_long_call(tmp_path: Path) -> None:
    """Python's handlers run after a call into C, here one of minutes."""
    done = in_a_call(signal.SIGTERM, tmp_path, 'hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)')
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "qwenvl: terminated\n")


def test_another_signal_ends_nothing(tmp_path: Path) -> None:
    """A signal with another handler, such as a change of the terminal's size."""
    done = in_a_call(signal.SIGUSR1, tmp_path, "time.sleep(3)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "made model\n", "")


def test_a_signal_that_is_ignored_stays_ignored(tiny_exported: Path, tmp_path: Path) -> None:
    """Under nohup a command starts with SIGHUP ignored."""
    command = ["nohup", sys.executable, "-c", RUN, str(int(signal.SIGHUP)), "export-vision"]
    command += ["--model_name_or_path", str(tiny_exported / "model"), "--save_path", "vision"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "QWENVL_ENGINE": "portable"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "vision.manifest.json").is_file()
