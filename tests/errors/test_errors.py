"""Each row of docs/errors.md with an exit code is a test: its input gives the error line and the code, and no new file.

With the exit code 0, the input gives an answer and no error line. With QWENVL_TEST_UPDATE_ERRORS=1, the rows are
rewritten instead (tests/error_table.py).
"""

from __future__ import annotations

import io
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import adapter_cases  # noqa: F401  adds its cases to CASES
import checkpoint_cases  # noqa: F401  adds its cases to CASES
import lora_cases  # noqa: F401  adds its cases to CASES
import pytest
import quantize_cases  # noqa: F401  adds its cases to CASES
import ray_cases  # noqa: F401  adds its cases to CASES
from error_cases import CASES, STREET, Bench
from error_doc import Row, rows
from error_table import check

from paddlemix_qwenvl_plugin.cli.main import main

REPO = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli"]
ROWS = rows()


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def bench(tmp_path: Path, tiny_exported: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENVL_DEBUG", "0")  # restored after the test, also if --debug has changed it
    return Bench(tiny_exported, monkeypatch)


def run_in_process(arguments: list[str], bench: Bench, capfd: pytest.CaptureFixture[str]) -> Outcome:
    bench.monkeypatch.setattr(sys, "argv", ["qwenvl", *arguments])
    stdin = None  # as when standard input is closed
    if bench.stdin is not None:  # with Python's error handler of the C locale
        stdin = io.TextIOWrapper(io.BytesIO(bench.stdin), "utf-8", "surrogateescape")
    bench.monkeypatch.setattr(sys, "stdin", stdin)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main()
    output = capfd.readouterr()
    assert isinstance(exit_info.value.code, int)
    return Outcome(exit_info.value.code, output.out, output.err)


def run_in_subprocess(arguments: list[str], bench: Bench) -> Outcome:
    """Run a command with the limits and the standard output of `bench`; the outcome has no `stdout`."""

    def set_limits() -> None:
        if bench.max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bench.max_file_bytes, bench.max_file_bytes))
        if bench.max_address_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (bench.max_address_bytes, bench.max_address_bytes))

    with Path(bench.stdout or os.devnull).open("w") as stdout:
        result = subprocess.run(
            [*COMMAND, *arguments],
            env={**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""},
            preexec_fn=set_limits,
            input=(bench.stdin or b"").decode(),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    return Outcome(result.returncode, "", result.stderr)


def existing_files() -> set[Path]:
    """All files below the working directory, except those of recipes in runs/ and of engine builds in cache/."""
    return {
        path for path in Path().rglob("*") if not path.is_dir() and path.parts[0] not in ("runs", "cache")
    }


def test_every_row_has_a_case() -> None:
    assert sorted(row.description for row in ROWS) == sorted(CASES)
    assert len(ROWS) >= 55  # the tables were found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.description.replace("`", ""))
def test_error(row: Row, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = CASES[row.description](bench)
    files_before = existing_files()
    if bench.max_file_bytes is None and bench.max_address_bytes is None and bench.stdout is None:
        outcome = run_in_process(arguments, bench, capfd)
    else:
        outcome = run_in_subprocess(arguments, bench)
    lines = [line for line in outcome.stderr.splitlines() if line.strip()]
    assert outcome.exit_code == row.exit_code, lines
    assert existing_files() == files_before
    if row.exit_code == 0:
        assert lines == []
        assert outcome.stdout.strip()
        return
    assert len(lines) == 1, lines
    assert lines[0].startswith("qwenvl: ")
    check(row.description, row.message, lines[0][len("qwenvl: ") :])


@pytest.mark.parametrize(
    ("arguments", "exit_code", "line"),
    [
        (["make-tiny", "model"], 2, "qwenvl: model: exists already; name a new folder"),
        (["convert", "model", "new"], 1, "qwenvl: model/config.json: must be a JSON object"),
    ],
)
def test_installed_command(tmp_path: Path, arguments: list[str], exit_code: int, line: str) -> None:
    command = Path(sys.executable).with_name("qwenvl")
    if not command.is_file():
        pytest.skip(f"no {command}: install the package with pip install -e .")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("1")
    result = subprocess.run([command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (exit_code, "", f"{line}\n")


def test_debug_shows_the_traceback_and_keeps_the_exit_code(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = run_in_process(["--debug", "run", "huge-gpu"], bench, capfd)
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("Traceback (most recent call last):")
    assert outcome.stderr.splitlines()[-1].startswith("qwenvl: no recipe named 'huge-gpu'")


def test_control_characters_in_a_name(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = run_in_process(["convert", "a\nb\x1b[31m", "new"], bench, capfd)
    assert outcome.stderr == "qwenvl: a b?[31m: no such model folder\n"


def test_a_long_line_is_shortened_in_the_middle(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = run_in_process(["convert", f"begin{'x' * 100_000}end", "new"], bench, capfd)
    assert outcome.stderr.startswith("qwenvl: begin")
    assert "xend: " in outcome.stderr
    assert 1000 < len(outcome.stderr) < 2100  # the message has about 2000 characters


def test_a_reader_that_closes_the_pipe() -> None:
    """`qwenvl recipes list | head -0`, with buffered and with unbuffered output."""
    for unbuffered in ("", "1"):
        reader, writer = os.pipe()
        os.close(reader)
        result = subprocess.run(
            [*COMMAND, "recipes", "list"],
            env={**os.environ, "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
        os.close(writer)
        assert (result.returncode, result.stderr) == (1, b"")


def test_a_full_disk_leaves_the_earlier_output_unchanged(bench: Bench) -> None:
    earlier_answer = '{"text": "earlier", "boxes": [], "token_ids": [], "finish_reason": "stop"}'
    Path("answer.json").write_text(earlier_answer)
    bench.max_file_bytes = 16
    assert run_in_subprocess(bench.predict("--output", "answer.json"), bench).exit_code == 1
    assert Path("answer.json").read_text() == earlier_answer


@pytest.mark.parametrize("max_address_kib", [300000, 500000, 650000, 800000])
@pytest.mark.parametrize("engine", ["auto", "portable"])
def test_little_memory(engine: str, max_address_kib: int, bench: Bench) -> None:
    """With little memory a command succeeds, or fails with one line about memory or threads."""
    bench.max_address_bytes = max_address_kib << 10
    bench.monkeypatch.setenv("QWENVL_ENGINE", engine)
    outcome = run_in_subprocess(bench.predict("--image", str(STREET)), bench)
    if outcome.exit_code == 0:
        assert outcome.stderr == ""
    else:
        assert outcome.exit_code == 1
        assert re.fullmatch("qwenvl: .*(out of memory|cannot start \\d+ threads).*\n", outcome.stderr)
