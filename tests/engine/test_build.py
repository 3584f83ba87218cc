"""Building the operators, with a compiler that only says that it was called."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paddlemix_qwenvl_plugin.ops import build, sources
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# Writes a line for each run and takes its time; "--version" is asked for the cache's key.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && {{ echo {version}; exit 0; }}
echo "$@" >> {calls}
sleep 0.05
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that makes empty files; returns the file of its calls."""
    calls = tmp_path / "calls"
    script = tmp_path / "cxx"
    script.write_text(COMPILER.format(version="one", calls=calls))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("QWENVL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(build.NO_BUILD, raising=False)
    return calls


def n_units() -> int:
    return len(sources.units(sources.source_folder(), ()))


def test_built_once_and_found_again(compiler: Path) -> None:
    first = build.library()
    assert first.name == build.LIBRARY
    lines = compiler.read_text().splitlines()
    assert len(lines) == n_units() + 1
    assert build.library() == first
    assert compiler.read_text().splitlines() == lines
    # Every source is compiled, the kernels once for each instruction set, and the log has every command.
    compiled = [re.search(r"-c (\S+)", line) for line in lines[:-1]]
    assert {Path(match[1]) for match in compiled if match} == {
        path
        for path in sources.source_folder().rglob("*.cc")
        if path.parent.name not in ("testing", "reference")
    }
    log = (first.parent / "build.log").read_text()
    assert all(line in log for line in lines)
    assert sorted(path.name for path in first.parent.iterdir()) == ["build.log", build.LIBRARY, "lock"]


@pytest.mark.parametrize("what", ["source", "flags", "compiler", "paddle"])
def test_another_of_what_counts_is_another_library(
    what: str, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    for name in ("cpu/kernels/isas.txt", "core/a.cc"):
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).write_text("")
    monkeypatch.setattr(build, "source_folder", lambda: csrc)
    before = build.library()
    if what == "source":
        (csrc / "core" / "a.h").write_text("//")
    elif what == "flags":
        monkeypatch.setattr(build, "FLAGS", ("-O0",))
    elif what == "compiler":
        script = Path(os.environ["CXX"])
        script.write_text(script.read_text().replace("echo one", "echo two"))
    else:
        monkeypatch.setattr(build, "_paddle_identity", lambda: ("4.0.0", "", ""))
    assert build.library() != before


def test_two_processes_build_once(compiler: Path) -> None:
    code = "from paddlemix_qwenvl_plugin.engine.build import library; print(library())"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert outputs[0] == outputs[1]
    assert len(compiler.read_text().splitlines()) == n_units() + 1


def test_a_killed_build_leaves_nothing_in_the_way(compiler: Path) -> None:
    code = "from paddlemix_qwenvl_plugin.engine.build import library; library()"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not compiler.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    compiler.unlink()
    assert build.library().is_file()
    assert len(compiler.read_text().splitlines()) >= n_units() + 1


def test_no_build(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.NO_BUILD, "1")
    with pytest.raises(QwenVLError, match=r"QWENVL_NO_BUILD is set: run qwenvl build-ops"):
        build.library()
    assert not compiler.exists()
    built = build.library(allowed=True)
    assert build.library() == built


def test_a_failed_build_leaves_no_library(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(os.environ["CXX"])
    script.write_text(script.read_text().replace("sleep 0.05", 'echo "kernels.cc:1: no" >&2; exit 1'))
    with pytest.raises(QwenVLError, match=r"does not compile here; see (\S+build\.log)") as error:
        build.library()
    log = Path(str(error.value).rpartition(" ")[2])
    assert "kernels.cc:1: no" in log.read_text()
    assert not list(log.parent.glob("*.so"))

    # Nobody waits for the same failure twice, but who asks for it.
    compiler.unlink(missing_ok=True)
    with pytest.raises(
        QwenVLError, match=r"does not compile here; see \S+build\.log \(qwenvl build-ops tries again\)"
    ):
        build.library()
    assert not compiler.exists()
    with pytest.raises(QwenVLError, match=r"see \S+build\.log$"):
        build.library(allowed=True)
    assert compiler.exists()
