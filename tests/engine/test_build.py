"""Building the libraries, with a fake compiler that only records its calls."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engines import needs_compiler

from paddlemix_qwenvl_plugin.engine import build, sources
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# A fake compiler that records each run and is slow; its "--version" is part of the cache key.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && {{ echo {version}; exit 0; }}
echo "$@" >> {calls}
sleep 0.05
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done
"""

BUILD = "from paddlemix_qwenvl_plugin.engine.build import library; print(library())"
CSRC = sources.source_folder()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake compiler that creates files of one line; returns the file with its calls."""
    calls = tmp_path / "calls"
    script = tmp_path / "cxx"
    script.write_text(COMPILER.format(version="one", calls=calls))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("QWENVL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("QWENVL_NO_BUILD", raising=False)
    return calls


def change_compiler(old: str, new: str) -> None:
    script = Path(os.environ["CXX"])
    text = script.read_text()
    assert old in text
    script.write_text(text.replace(old, new))


def n_calls(compiler: Path) -> int:
    return len(compiler.read_text().splitlines())


def n_units() -> int:
    return len(sources.library_units(CSRC, sources.isas_here(CSRC)))


def test_built_once_and_found_again(compiler: Path) -> None:
    first = build.library()
    assert first.name == "libqwenvl.so"
    lines = compiler.read_text().splitlines()
    assert len(lines) == n_units() + 1
    assert build.library() == first
    assert compiler.read_text().splitlines() == lines
    # Every source but Paddle's, the kernels for two instruction sets at most, and the log has every command.
    compiled = [Path(match[1]) for line in lines if (match := re.search(r"-c (\S+)", line))]
    assert set(compiled) == {path for part in ("core", "cpu") for path in (CSRC / part).rglob("*.cc")}
    assert sum(path.name == "kernels.cc" for path in compiled) == len(sources.isas_here(CSRC)) <= 2
    log = (first.parent / "build.log").read_text()
    assert all(line in log for line in lines)
    names = sorted(path.name for path in first.parent.iterdir())
    assert names == ["build.log", "libqwenvl.so", "libqwenvl.so.sha256", "lock"]


def test_the_operators_are_linked_to_the_library(compiler: Path) -> None:
    engine = build.library()
    before = n_calls(compiler)
    operators = build.operators_library()
    *compiled, linked = compiler.read_text().splitlines()[before:]
    assert {Path(re.search(r"-c (\S+)", line)[1]) for line in compiled} == set((CSRC / "paddle").glob("*.cc"))
    assert f"-L{engine.parent} -l:libqwenvl.so -Wl,-rpath,{engine.parent}" in linked
    assert operators.parent != engine.parent


def test_the_library_needs_no_paddle(compiler: Path) -> None:
    code = f"import sys; sys.modules['paddle'] = None; {BUILD}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", ["a.h", "a.cc", "a.c", "a.cu", "a.cuh", "a.txt", "flags", "compiler", "isa"])
def test_each_input_of_the_cache_key_changes_the_library(
    what: str, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csrc = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    monkeypatch.setattr(build, "source_folder", lambda: csrc)
    before = build.library()
    if what == "flags":
        monkeypatch.setattr(sources, "_COMMON", ("-O0",))
    elif what == "compiler":
        change_compiler("echo one", "echo two")
    elif what == "isa":
        monkeypatch.setattr(build, "isas_here", lambda csrc: sources.all_isas(csrc)[:1])
    else:
        (csrc / "core" / what).write_text("//")
    assert build.library() != before


def test_another_paddle_is_another_library_of_operators(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import paddle

    engine, before = build.library(), build.operators_library()
    monkeypatch.setattr(paddle, "__version__", "4.0.0")
    assert build.operators_library() != before
    assert build.library() == engine


@pytest.mark.parametrize("damage", ["cut", "emptied", "changed", "without its digest"])
def test_an_incomplete_library_is_built_again(damage: str, compiler: Path) -> None:
    built = build.library()
    good = built.read_bytes()
    if damage == "without its digest":
        built.with_name("libqwenvl.so.sha256").unlink()
    else:
        built.write_bytes({"cut": good[:2], "emptied": b"", "changed": b"M" + good[1:]}[damage])
    assert build.library_state()[0] == "not built"
    before = n_calls(compiler)
    assert build.library() == built
    assert (built.read_bytes(), n_calls(compiler)) == (good, before + n_units() + 1)


def test_two_processes_build_once(compiler: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert outputs[0] == outputs[1]
    assert n_calls(compiler) == n_units() + 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_build_leaves_nothing_in_the_way(how: signal.Signals, compiler: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", BUILD], stderr=subprocess.DEVNULL)
    wait_for(compiler)
    process.send_signal(how)
    process.wait()
    compiler.unlink(missing_ok=True)
    built = build.library()
    assert n_calls(compiler) >= n_units() + 1
    assert not list(built.parent.glob("scratch-*"))


@pytest.mark.parametrize(
    ("how", "pauses"),
    [
        (signal.SIGINT, []),
        (signal.SIGINT, [0, 0]),
        (signal.SIGINT, [0.003, 0.003]),
        (signal.SIGINT, [0.1, 0.1]),
        (signal.SIGTERM, []),
    ],
)
def test_ctrl_c_ends_the_compilers(
    how: signal.Signals, pauses: list[float], compiler: Path, tmp_path: Path
) -> None:
    """The compiler and its child processes, which would run for a minute. Once, and three times in a row."""
    children = tmp_path / "children"
    change_compiler("sleep 0.05", f'sleep 61 & echo "$$ $!" >> {children}; wait')
    command = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "build-engine"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(children)
    began = time.monotonic()
    for pause in (0, *pauses):
        time.sleep(pause)
        process.send_signal(how)
    _, said = process.communicate(timeout=30)
    line = "qwenvl: interrupted\n" if how == signal.SIGINT else "qwenvl: terminated\n"
    assert (process.returncode, said) == (128 + how, line)
    assert time.monotonic() - began < 10  # of the minute
    for line in children.read_text().splitlines():
        for number in line.split():
            assert not runs(int(number))
    change_compiler("sleep 61", "sleep 0")
    left = next((tmp_path / "cache" / "engine").iterdir())
    assert sorted(path.name for path in left.iterdir()) == ["build.log", "lock"]
    assert build.library().is_file()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)


def runs(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_no_build(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENVL_NO_BUILD", "1")
    with pytest.raises(QwenVLError, match=r"QWENVL_NO_BUILD is set: run qwenvl build-engine"):
        build.library()
    assert not compiler.exists()
    built = build.library(allowed=True)
    assert build.library() == built


def test_a_failed_build_leaves_no_library(compiler: Path) -> None:
    change_compiler("sleep 0.05", 'echo "kernels.cc:1: error: no" >&2; exit 1')
    with pytest.raises(QwenVLError, match=r"here: kernels.cc:1: error: no; see (\S+build\.log)$") as error:
        build.library()
    log = Path(str(error.value).rpartition(" ")[2])
    assert "kernels.cc:1: error: no" in log.read_text()
    assert not list(log.parent.glob("*.so"))

    # A failed build is not repeated, except on explicit request.
    compiler.unlink(missing_ok=True)
    with pytest.raises(QwenVLError, match=r"see \S+build\.log \(qwenvl build-engine tries again\)"):
        build.library()
    assert not compiler.exists()
    with pytest.raises(QwenVLError, match=r"see \S+build\.log$"):
        build.library(allowed=True)
    assert compiler.exists()


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        ("kill -KILL $$", "was killed by SIGKILL"),
        (
            'echo "c++: fatal error: Killed signal terminated program cc1plus" >&2; exit 1',
            "Killed signal terminated program cc1plus",
        ),
        (
            'echo "fatal error: writing to /tmp/a.s: No space left on device" >&2; exit 1',
            "No space left on device",
        ),
    ],
)
def test_trouble_that_passes_is_named_and_not_remembered(trouble: str, cause: str, compiler: Path) -> None:
    change_compiler("sleep 0.05", trouble)
    with pytest.raises(QwenVLError, match=cause):
        build.library()
    change_compiler(trouble, "sleep 0.05")
    assert build.library().is_file()


def test_a_compiler_with_arguments(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = tmp_path / "a launcher"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{launcher}' {os.environ['CXX']} -g1")
    built = build.library()
    assert built.is_file()
    assert all(line.startswith("-g1 ") for line in compiler.read_text().splitlines())


@needs_compiler
def test_a_cxx_library_that_is_linked_in_stays_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some compilers link it into the library. Paddle has another one, and must not see this one."""
    monkeypatch.setenv("CXX", "c++ -static-libstdc++")
    source = tmp_path / "one.cc"
    source.write_text(
        "#include <iostream>\n"
        'extern "C" __attribute__((visibility("default"))) void say(int n) { std::cout << n; }'
    )
    target = build.library_target([sources.Unit("one.o", source, ("-fPIC",))])
    with (tmp_path / "log").open("w") as log:
        build.build(target, tmp_path, log)
    library = ctypes.CDLL(str(tmp_path / target.name))
    assert hasattr(library, "say")
    assert not hasattr(library, "_ZNSolsEi")  # std::ostream << int


def test_a_shipped_library_is_taken(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "libqwenvl.so"
    shipped.write_text("")
    monkeypatch.setattr(build, "SHIPPED", shipped)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.library() == shipped
    assert build.library_state() == ("shipped", shipped)
    assert not compiler.exists()
