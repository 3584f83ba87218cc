"""The engine's libraries: shipped, or compiled on first use, once for all processes of a user.

`libqwenvl.so` is the engine and knows no Paddle. `libqwenvl_paddle.so` binds it to the installed Paddle.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from paddlemix_qwenvl_plugin.engine.sources import (
    Unit,
    digest,
    isas_here,
    library_units,
    operators_units,
    source_folder,
)
from paddlemix_qwenvl_plugin.util import env
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, one_line
from paddlemix_qwenvl_plugin.util.program import program
from paddlemix_qwenvl_plugin.util.progress import track
from paddlemix_qwenvl_plugin.util.threads import cpu_threads

LIBRARY = "libqwenvl.so"
OPERATORS = "libqwenvl_paddle.so"

# A release puts the library here (tools/release_wheel.py).
SHIPPED = Path(__file__).with_name(LIBRARY)

# What a compiler says of trouble that has gone when it is tried again.
_PASSING = ("No space left", "Killed")


def library(allowed: bool = False) -> Path:
    """The engine's library: the shipped one, else that of these sources and this processor, built now if need be.

    Args:
        allowed: build also where QWENVL_NO_BUILD is set, or where it has failed before.

    Raises:
        QwenVLError: it is not there and cannot be built; the line says why.
    """
    return SHIPPED if SHIPPED.is_file() else _built(_library(), allowed)


def operators_library(allowed: bool = False) -> Path:
    """The engine as operators of the installed Paddle, linked to `library()`. Arguments and errors are the same."""
    return _built(_operators(library(allowed)), allowed)


def library_state() -> tuple[str, Path]:
    """("shipped", "built", "failed" or "not built", where the engine's library is or would be); builds nothing."""
    if SHIPPED.is_file():
        return "shipped", SHIPPED
    folder = _folder(_library())
    if _is_whole(folder / LIBRARY):
        return "built", folder / LIBRARY
    return "failed" if (folder / "failed").is_file() else "not built", folder / LIBRARY


def cache_folder() -> Path:
    """QWENVL_CACHE_DIR, else `qwenvl` in the user's cache folder."""
    from platformdirs import user_cache_path

    named = env.CACHE_DIR.read()
    return (named.absolute() if named else user_cache_path("qwenvl")) / "engine"


def compiler() -> list[str]:
    """CXX, which may have arguments, else c++."""
    return shlex.split(os.environ.get("CXX") or "") or ["c++"]


def compiler_version(command: Sequence[str]) -> str:
    """What the compiler says of itself; empty where it is not there."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run([*command, "--version"], capture_output=True, check=False)
    return done.stdout.decode("utf-8", "replace")


class Target(NamedTuple):
    """A library to make. `identity` is what decides about it beside sources, flags and the compiler."""

    name: str
    units: list[Unit]
    link: tuple[str, ...]
    identity: tuple[str, ...] = ()


def build(target: Target, folder: Path, log: IO[str]) -> Path:
    """Compile and link in an empty folder; returns the library in it.

    Raises:
        BuildFailed: the compiler did not do it.
    """
    csrc, command = source_folder(), compiler()
    include = (f"-I{csrc}", f"-I{csrc / 'include'}")
    objects = [folder / f"{unit.name}.o" for unit in target.units]
    compile_all = [
        [*command, *unit.flags, *include, "-c", str(unit.source), "-o", str(made)]
        for unit, made in zip(target.units, objects)
    ]
    made = folder / target.name
    link = [*command, "-shared", f"-Wl,-soname,{target.name}", "-o", str(made)]
    link += [*map(str, objects), *target.link, "-pthread"]
    for label, commands in ((f"building {target.name}", compile_all), ("", [link])):
        with contextlib.closing(_run_all(commands, folder)) as running:
            for done in track(running, label, len(commands)):
                log.write(f"{shlex.join(done.args)}\n{done.stdout}")
                log.flush()
                if done.returncode:
                    raise BuildFailed(done)
    return made


class BuildFailed(Exception):
    """A compiler that ended with an error; `passing` if it may do better another time."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        lines = [line.strip() for line in done.stdout.splitlines()]
        telling = [line for line in lines if any(word in line for word in _PASSING)]
        telling += [line for line in lines if "error" in line.lower()]
        cause = f"{done.args[0]} ended with exit code {done.returncode}"
        if done.returncode < 0:
            cause = f"{done.args[0]} was killed by {signal.Signals(-done.returncode).name}"
        elif telling:
            cause = one_line(telling[0])[:300]
        super().__init__(cause)
        self.passing = done.returncode < 0 or any(word in cause for word in _PASSING)


def _library() -> Target:
    csrc = source_folder()
    return Target(LIBRARY, library_units(csrc, isas_here(csrc)), ())


def _operators(engine: Path) -> Target:
    """Finds the engine where it lies, and Paddle's own libraries in the process that loads it."""
    import paddle

    package, include = Path(paddle.__file__).parent, Path(paddle.sysconfig.get_include())
    flags = (f"-isystem{include}", f"-isystem{include / 'third_party'}", "-w")
    names = ("libphi.so", "libphi_core.so", "libcommon.so")
    present = [f"-l:{name}" for name in names if (package / "libs" / name).is_file()]
    link = (
        f"-L{package / 'libs'}",
        *present,
        f"-L{engine.parent}",
        f"-l:{LIBRARY}",
        f"-Wl,-rpath,{engine.parent}",
    )
    identity = (paddle.__version__, str(paddle.version.commit), str(package))
    return Target(OPERATORS, operators_units(source_folder(), flags), link, identity)


def _folder(target: Target) -> Path:
    command = compiler()
    flags = [text for unit in target.units for text in (unit.name, *unit.flags)]
    key = (target.name, *command, compiler_version(command), *flags, *target.link, *target.identity)
    return cache_folder() / digest(source_folder(), *key)


def _built(target: Target, allowed: bool) -> Path:
    if os.name == "nt":
        raise QwenVLError("the engine does not run on Windows so far")
    folder, command = _folder(target), compiler()
    built, failed = folder / target.name, folder / "failed"
    if _is_whole(built):
        return built
    if not allowed and env.NO_BUILD.read():
        raise QwenVLError(
            f"the engine is not built, and {env.NO_BUILD.name} is set: run {program()} build-engine"
        )
    if not allowed and failed.is_file():  # it would fail again, at the start of every process
        raise QwenVLError(f"{failed.read_text('utf-8')} ({program()} build-engine tries again)")
    if shutil.which(command[0]) is None:
        raise QwenVLError(
            f"the engine needs a C++17 compiler, and there is no {command[0]}: apt-get install g++"
        )
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not _is_whole(built):  # another process built it meanwhile
                _build_into(target, built, failed)
    except OSError as error:
        raise QwenVLError(
            f"{folder}: cannot build the engine there ({error.strerror}); set QWENVL_CACHE_DIR to a folder of yours"
        ) from error
    return built


def _build_into(target: Target, built: Path, failed: Path) -> None:
    """Build in a scratch folder beside `built`; `failed` remembers why it cannot be."""
    folder, log_path = built.parent, built.with_name("build.log")
    failed.unlink(missing_ok=True)
    for left in folder.glob("scratch-*"):  # by builds that were killed: this one has the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="scratch-") as scratch:
        try:
            with log_path.open("w", encoding="utf-8") as log:
                made = build(target, Path(scratch), log)
        except BuildFailed as error:
            line = f"the engine does not compile here: {error}; see {log_path}"
            if not error.passing:
                failed.write_text(line, "utf-8")
            raise QwenVLError(line) from error
        _digest_of(built).write_text(_sha256(made), "utf-8")
        made.replace(built)


def _is_whole(built: Path) -> bool:
    """Whether the library is there as it was built: one that was cut off would end the process that loads it."""
    try:
        return _digest_of(built).read_text("utf-8") == _sha256(built)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _digest_of(built: Path) -> Path:
    return built.with_name(f"{built.name}.sha256")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run_all(
    commands: Sequence[Sequence[str]], folder: Path
) -> Generator[subprocess.CompletedProcess[str], None, None]:
    """Run commands side by side, yielding each as it ends. However this ends, none of them runs on.

    Their output goes through files in `folder`: nothing here has to read while they run.
    """
    waiting = list(enumerate(commands))
    running: dict[int, subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "LC_ALL": "C"}  # BuildFailed reads what they say
    try:
        while waiting or running:
            while waiting and len(running) < cpu_threads():
                number, command = waiting.pop(0)
                with (folder / f"{number}.out").open("wb") as out:
                    running[number] = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=out,
                        env=environment,
                        start_new_session=True,  # a group, which can be killed as one
                    )
            ended = [number for number, process in running.items() if process.poll() is not None]
            for number in ended:
                process, said = running.pop(number), (folder / f"{number}.out").read_text("utf-8", "replace")
                yield subprocess.CompletedProcess(list(commands[number]), process.returncode, said)
            if not ended:
                time.sleep(0.02)
    finally:
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
