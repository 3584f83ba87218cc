"""Every row of docs/errors.md is a test: the input produces that line and exit code, and no file."""

from __future__ import annotations

import io
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import adapter_cases  # noqa: F401  registers its cases
import checkpoint_cases  # noqa: F401  registers its cases
import lora_cases  # noqa: F401  registers its cases
import pytest
import quantize_cases  # noqa: F401  its cases are in CASES, too
import ray_cases  # noqa: F401  registers its cases
from error_cases import CASES, STREET, Bench
from error_doc import Row, rows
from error_table import check

from paddlemix_qwenvl_plugin.cli.main import main

REPO = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli"]
ROWS = rows()


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def bench(tmp_path: Path, tiny_exported: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENVL_DEBUG", "0")  # puts back what --debug sets
    return Bench(tiny_exported, monkeypatch)


def in_process(arguments: list[str], bench: Bench, capfd: pytest.CaptureFixture[str]) -> Outcome:
    bench.monkeypatch.setattr(sys, "argv", ["qwenvl", *arguments])
    stdin = None  # closed
    if bench.stdin is not None:  # as in the C locale
        stdin = io.TextIOWrapper(io.BytesIO(bench.stdin), "utf-8", "surrogateescape")
    bench.monkeypatch.setattr(sys, "stdin", stdin)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main()
    printed = capfd.readouterr()
    assert isinstance(exit_info.value.code, int)
    return Outcome(exit_info.value.code, printed.out, printed.err)


def in_subprocess(arguments: list[str], bench: Bench) -> Outcome:
    def limit() -> None:
        if bench.max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bench.max_file_bytes, bench.max_file_bytes))
        if bench.max_address_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (bench.max_address_bytes, bench.max_address_bytes))

    with Path(bench.stdout or os.devnull).open("w") as stdout:
        done = subprocess.run(
            [*COMMAND, *arguments],
            env={**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""},
            preexec_fn=limit,
            input=(bench.stdin or b"").decode(),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    return Outcome(done.returncode, "", done.stderr)


def files() -> set[Path]:
    """All files below the working directory, except records of recipes and build logs."""
    return {
        path for path in Path().rglob("*") if not path.is_dir() and path.parts[0] not in ("runs", "cache")
    }


def test_the_table_and_the_cases_agree() -> None:
    assert sorted(row.what for row in ROWS) == sorted(CASES)
    assert len(ROWS) >= 55


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what.replace("`", ""))
def test_error(row: Row, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = CASES[row.what](bench)
    before = files()
    if any(limit is not None for limit in (bench.max_file_bytes, bench.max_address_bytes, bench.stdout)):
        outcome = in_subprocess(arguments, bench)
    else:
        outcome = in_process(arguments, bench, capfd)
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    assert outcome.code == row.code, lines
    assert files() == before
    if row.code == 0:
        assert lines == []
        assert outcome.out.strip()
        return
    assert len(lines) == 1, lines
    assert lines[0].startswith("qwenvl: ")
    check(row.what, row.line, lines[0][len("qwenvl: ") :])


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["make-tiny", "there"], 2, "qwenvl: there: exists already; name a new folder"),
        (["convert", "there", "new"], 1, "qwenvl: there/config.json: must be a JSON object"),
    ],
)
def test_installed_command(tmp_path: Path, arguments: list[str], code: int, line: str) -> None:
    command = Path(sys.executable).with_name("qwenvl")
    if not command.is_file():
        pytest.skip(f"no {command}: install the package with pip install -e .")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("1")
    done = subprocess.run([command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"{line}\n")


def test_debug_shows_the_traceback_and_keeps_the_code(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = in_process(["--debug", "run", "huge-gpu"], bench, capfd)
    assert outcome.code == 2
    assert outcome.err.startswith("Traceback (most recent call last):")
    assert outcome.err.splitlines()[-1].startswith("qwenvl: no recipe named 'huge-gpu'")


def test_a_name_cannot_break_the_line(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = in_process(["convert", "a\nb\x1b[31m", "new"], bench, capfd)
    assert outcome.err == "qwenvl: a b?[31m: no such model folder\n"


def test_a_line_is_never_endless(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = in_process(["convert", f"begin{'x' * 100_000}end", "new"], bench, capfd)
    assert outcome.err.startswith("qwenvl: begin")
    assert "xend: " in outcome.err
    assert 1000 < len(outcome.err) < 2100


def test_a_reader_that_goes_away() -> None:
    """`qwenvl recipes list | head -0`, the output buffered and not."""
    for unbuffered in ("", "1"):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [*COMMAND, "recipes", "list"],
            env={**os.environ, "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, b"")


def test_a_full_output_file_is_left_as_it_was(bench: Bench) -> None:
    earlier = '{"text": "earlier", "boxes": [], "token_ids": [], "finish_reason": "stop"}'
    Path("answer.json").write_text(earlier)
    bench.max_file_bytes = 16
    assert in_subprocess(bench.predict("--output", "answer.json"), bench).code == 1
    assert Path("answer.json").read_text() == earlier


@pytest.mark.parametrize("kib", [300000, 500000, 650000, 800000])
@pytest.mark.parametrize("engine", ["auto", "portable"])
def test_little_memory_gives_an_answer_or_a_line_about_it(engine: str, kib: int, bench: Bench) -> None:
    bench.max_address_bytes = kib << 10
    bench.monkeypatch.setenv("QWENVL_ENGINE", engine)
    outcome = in_subprocess(bench.predict("--image", str(STREET)), bench)
    if outcome.code == 0:
        assert outcome.err == ""
    else:
        assert outcome.code == 1
        assert re.fullmatch("qwenvl: .*(out of memory|cannot start \\d+ threads).*\n", outcome.err)
