"""Building the engine's libraries with a fake compiler, which records its calls; one test uses the real one."""

from __future__ import annotations

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

# Slow, so that a test can interrupt it. The output of "--version" is part of the cache key.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && {{ echo {version}; exit 0; }}
echo "$@" >> {calls}
sleep 0.05
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done
"""

BUILD = "from paddlemix_qwenvl_plugin.engine.build import library; print(library())"
CSRC = sources.source_folder()


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the fake compiler, which creates files of one line; return the file in which it records its calls."""
    record = tmp_path / "calls"
    script = tmp_path / "cxx"
    script.write_text(COMPILER.format(version="one", calls=record))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("QWENVL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("QWENVL_NO_BUILD", raising=False)
    return record


def change_compiler(old: str, new: str) -> None:
    script = Path(os.environ["CXX"])
    text = script.read_text()
    assert old in text
    script.write_text(text.replace(old, new))


def n_calls(calls: Path) -> int:
    return len(calls.read_text().splitlines())


def n_units() -> int:
    return len(sources.library_units(CSRC, sources.isas_here(CSRC)))


def test_the_library_is_built_once(calls: Path) -> None:
    first = build.library()
    assert first.name == "libqwenvl.so"
    lines = calls.read_text().splitlines()
    assert len(lines) == n_units() + 1
    assert build.library() == first
    assert calls.read_text().splitlines() == lines
    # All sources in core/ and cpu/; the kernels are compiled once per ISA that this machine uses.
    compiled = [Path(match[1]) for line in lines if (match := re.search(r"-c (\S+)", line))]
    assert set(compiled) == {path for folder in ("core", "cpu") for path in (CSRC / folder).rglob("*.cc")}
    assert sum(path.name == "kernels.cc" for path in compiled) == len(sources.isas_here(CSRC))
    log = (first.parent / "build.log").read_text()
    assert all(line in log for line in lines)
    names = sorted(path.name for path in first.parent.iterdir())
    assert names == ["build.log", "libqwenvl.so", "libqwenvl.so.sha256", "lock"]


@pytest.mark.parametrize(
    ("best", "isas"),
    [
        ("generic", ["generic"]),
        ("avx2", ["generic", "avx2"]),
        ("avx512", ["generic", "avx512"]),
        # With the compute type float32, the kernels of avx512 run.
        ("avx512_bf16", ["generic", "avx512", "avx512_bf16"]),
    ],
)
def test_isas_of_a_processor(best: str, isas: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.platform, "machine", lambda: "x86_64")
    flags = {isa.name: isa.flags for isa in sources.all_isas(CSRC)}[best]
    monkeypatch.setattr(sources, "_cpu_features", lambda: {flag[2:] for flag in flags})
    assert [isa.name for isa in sources.isas_here(CSRC)] == isas
    optimised = {
        unit.name: "-O3" in unit.flags for unit in sources.library_units(CSRC, sources.isas_here(CSRC))
    }
    # Beside better kernels, the generic kernels are only for comparison and are not optimised.
    assert optimised["kernels_generic.o"] == (best == "generic")


def test_the_operators_are_linked_to_the_library(calls: Path) -> None:
    engine = build.library()
    before = n_calls(calls)
    operators = build.operators_library()
    *compilations, link = calls.read_text().splitlines()[before:]
    assert {Path(re.search(r"-c (\S+)", line)[1]) for line in compilations} == set(
        (CSRC / "paddle").glob("*.cc")
    )
    assert f"-L{engine.parent} -l:libqwenvl.so -Wl,-rpath,{engine.parent}" in link
    assert operators.parent != engine.parent


def test_the_library_needs_no_paddle(calls: Path) -> None:
    code = f"import sys; sys.modules['paddle'] = None; {BUILD}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "changed", ["a.h", "a.cc", "a.c", "a.cu", "a.cuh", "a.txt", "flags", "compiler", "isa"]
)
def test_sources_flags_compiler_and_isas_are_part_of_the_cache_key(
    changed: str, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csrc = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    monkeypatch.setattr(build, "source_folder", lambda: csrc)
    before = build.library()
    if changed == "flags":
        monkeypatch.setattr(sources, "_COMMON", ("-O0",))
    elif changed == "compiler":
        change_compiler("echo one", "echo two")
    elif changed == "isa":
        monkeypatch.setattr(build, "isas_here", lambda csrc: sources.all_isas(csrc)[:1])
    else:
        (csrc / "core" / changed).write_text("//")
    assert build.library() != before


def test_the_operators_are_built_for_each_paddle_version(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import paddle

    engine, before = build.library(), build.operators_library()
    monkeypatch.setattr(paddle, "__version__", "4.0.0")
    assert build.operators_library() != before
    assert build.library() == engine


@pytest.mark.parametrize("damage", ["truncated", "emptied", "changed", "without its digest"])
def test_a_damaged_library_is_built_again(damage: str, calls: Path) -> None:
    library = build.library()
    content = library.read_bytes()
    if damage == "without its digest":
        library.with_name("libqwenvl.so.sha256").unlink()
    else:
        damaged = {"truncated": content[:2], "emptied": b"", "changed": b"M" + content[1:]}
        library.write_bytes(damaged[damage])
    assert build.library_state()[0] == "not built"
    before = n_calls(calls)
    assert build.library() == library
    assert (library.read_bytes(), n_calls(calls)) == (content, before + n_units() + 1)


def test_two_processes_build_once(calls: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert outputs[0] == outputs[1]
    assert n_calls(calls) == n_units() + 1


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_until_a_started_process_is_recorded(signal_number: signal.Signals) -> None:
    steps: list[str] = []
    previous_handler = signal.signal(signal_number, lambda *_: steps.append("signal"))
    try:
        with build._deferred_signals():
            signal.raise_signal(signal_number)
            steps.append("recorded")
    finally:
        signal.signal(signal_number, previous_handler)
    assert steps == ["recorded", "signal"]


def test_compilers_ignore_the_signals_that_are_ignored() -> None:
    """With `nohup`, also the compilers ignore SIGHUP: they inherit this, but no handler."""
    previous_handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with build._deferred_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous_handler)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_build_after_an_interrupted_build(signal_number: signal.Signals, calls: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", BUILD], stderr=subprocess.DEVNULL)
    wait_for_content(calls)
    process.send_signal(signal_number)
    process.wait()
    calls.unlink(missing_ok=True)
    library = build.library()
    # At least: compilers of the interrupted process may still record their calls.
    assert n_calls(calls) >= n_units() + 1
    assert not list(library.parent.glob("scratch-*"))


@pytest.mark.parametrize(
    ("signal_number", "pauses"),  # seconds before the second and third signal
    [
        (signal.SIGINT, []),
        (signal.SIGINT, [0, 0]),
        (signal.SIGINT, [0.003, 0.003]),
        (signal.SIGINT, [0.1, 0.1]),
        (signal.SIGTERM, []),
    ],
)
def test_a_signal_ends_the_compilers(
    signal_number: signal.Signals, pauses: list[float], calls: Path, tmp_path: Path
) -> None:
    """One signal or three end the compilers and their child processes, which would run for a minute."""
    children = tmp_path / "children"
    change_compiler("sleep 0.05", f'sleep 61 & echo "$$ $!" >> {children}; wait')
    command = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "build-engine"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_content(children)
    began = time.monotonic()
    for pause in (0, *pauses):
        time.sleep(pause)
        process.send_signal(signal_number)
    _, printed = process.communicate(timeout=30)
    message = "qwenvl: interrupted\n" if signal_number == signal.SIGINT else "qwenvl: terminated\n"
    assert (process.returncode, printed) == (128 + signal_number, message)
    assert time.monotonic() - began < 10
    for pid in children.read_text().split():
        assert not is_running(int(pid))
    change_compiler("sleep 61", "sleep 0")
    folder = next((tmp_path / "cache" / "engine").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == ["build.log", "lock"]
    assert build.library().is_file()


def wait_for_content(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # a zombie has ended


def test_building_is_forbidden_by_a_variable(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENVL_NO_BUILD", "1")
    with pytest.raises(QwenVLError, match=r"QWENVL_NO_BUILD is set: run qwenvl build-engine"):
        build.library()
    assert not calls.exists()
    library = build.library(allowed=True)
    assert build.library() == library


def test_a_failed_build_leaves_no_library(calls: Path) -> None:
    change_compiler("sleep 0.05", 'echo "kernels.cc:1: error: no" >&2; exit 1')
    with pytest.raises(QwenVLError, match=r"here: kernels.cc:1: error: no; see (\S+build\.log)$") as error:
        build.library()
    log = Path(str(error.value).rpartition(" ")[2])
    assert "kernels.cc:1: error: no" in log.read_text()
    assert not list(log.parent.glob("*.so"))

    # After a compiler's error, the build is repeated only on explicit request.
    calls.unlink(missing_ok=True)
    with pytest.raises(QwenVLError, match=r"see \S+build\.log \(qwenvl build-engine tries again\)"):
        build.library()
    assert not calls.exists()
    with pytest.raises(QwenVLError, match=r"see \S+build\.log$"):
        build.library(allowed=True)
    assert calls.exists()


@pytest.mark.parametrize(
    ("failure", "cause"),  # shell code of the compiler, and the cause in the message
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
def test_a_build_is_retried_after_a_temporary_failure(failure: str, cause: str, calls: Path) -> None:
    change_compiler("sleep 0.05", failure)
    with pytest.raises(QwenVLError, match=cause):
        build.library()
    change_compiler(failure, "sleep 0.05")
    assert build.library().is_file()


def test_a_compiler_with_arguments(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = tmp_path / "a launcher"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{launcher}' {os.environ['CXX']} -g1")
    assert build.library().is_file()
    assert all(line.startswith("-g1 ") for line in calls.read_text().splitlines())


@needs_compiler
def test_symbols_of_a_static_cxx_library_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some compilers link a copy of libstdc++ into the library; Paddle has another copy and must not find this one."""
    monkeypatch.setenv("CXX", "c++ -static-libstdc++")
    source = tmp_path / "source.cc"
    source.write_text(
        "#include <iostream>\n"
        'extern "C" __attribute__((visibility("default"))) void say(int n) { std::cout << n; }'
    )
    target = build.library_target([sources.Unit("source.o", source, ("-fPIC",))])
    with (tmp_path / "log").open("w") as log:
        build.build(target, tmp_path, log)
    # In another process: in the test's own, operators that are loaded later would be linked to this library, which has
    # the engine's name.
    code = "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); print(*[hasattr(library, n) for n in sys.argv[2:]])"
    operator = "_ZNSolsEi"  # std::ostream << int
    command = [sys.executable, "-c", code, str(tmp_path / target.name), "say", operator]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True False\n"


def test_a_shipped_library_is_used(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "libqwenvl.so"
    shipped.write_text("")
    monkeypatch.setattr(build, "SHIPPED", shipped)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.library() == shipped
    assert build.library_state() == ("shipped", shipped)
    assert not calls.exists()
