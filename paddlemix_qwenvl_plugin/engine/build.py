"""Compiling the custom operators against the installed Paddle, once for all processes of a user."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Optional

from paddlemix_qwenvl_plugin.engine.sources import FLAGS, Unit, digest, source_folder, units
from paddlemix_qwenvl_plugin.util.errors import QwenVLError
from paddlemix_qwenvl_plugin.util.progress import track
from paddlemix_qwenvl_plugin.util.threads import cpu_threads

LIBRARY = "libqwenvl_paddle.so"
NO_BUILD = "QWENVL_NO_BUILD"


def library(allowed: bool = False) -> Path:
    """The library for this Paddle and these sources, built now unless it is in the cache.

    Args:
        allowed: build also where QWENVL_NO_BUILD is set, or where it has failed before.

    Raises:
        QwenVLError: it is not there and cannot be built; the line says why.
    """
    csrc, compiler = source_folder(), os.environ.get("CXX", "c++")
    include, link = _paddle_flags()
    key = (*_paddle_identity(), compiler, _compiler_version(compiler), *FLAGS, *include, *link)
    folder = cache_folder() / digest(csrc, *key)
    built = folder / LIBRARY
    if built.is_file():
        return built
    if not allowed and os.environ.get(NO_BUILD, "0") not in ("", "0"):
        raise QwenVLError(
            f"the engine is not built for this Paddle, and {NO_BUILD} is set: run qwenvl build-ops"
        )
    failed = folder / "failed"
    if not allowed and failed.is_file():  # it would fail again, at the start of every process
        raise QwenVLError(f"{failed.read_text('utf-8')} (qwenvl build-ops tries again)")
    if shutil.which(compiler) is None:
        raise QwenVLError(
            f"the engine needs a C++17 compiler, and there is no {compiler}: apt-get install g++"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if not built.is_file():  # another process built it meanwhile
                failed.unlink(missing_ok=True)
                try:
                    _build(csrc, compiler, folder, built)
                except QwenVLError as error:
                    failed.write_text(str(error), "utf-8")
                    raise
    except OSError as error:
        raise QwenVLError(
            f"{folder}: cannot build the engine there ({error.strerror}); set QWENVL_CACHE_DIR to a folder of yours"
        ) from error
    return built


def cache_folder() -> Path:
    """QWENVL_CACHE_DIR, else `qwenvl` in the user's cache folder."""
    named = os.environ.get("QWENVL_CACHE_DIR")
    if named:
        return Path(named).absolute() / "engine"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "qwenvl" / "engine"


def _build(csrc: Path, compiler: str, folder: Path, built: Path) -> None:
    """Compile everything in a scratch folder and move the library to its name."""
    log_path = folder / "build.log"
    include, link = _paddle_flags()
    with log_path.open("w", encoding="utf-8") as log, tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = Path(scratch)
        todo = units(csrc, include)
        with ThreadPoolExecutor(cpu_threads()) as pool:
            jobs = [pool.submit(_compile, compiler, unit, objects) for unit in todo]
            try:
                for job in track(as_completed(jobs), "building the engine", len(jobs)):
                    _record(log, job.result())
            except BuildFailed as error:
                pool.shutdown(cancel_futures=True)
                _record(log, error.done)
                raise QwenVLError(f"the engine does not compile here; see {log_path}") from error
        target = objects / LIBRARY
        parts = [str(objects / f"{unit.name}.o") for unit in todo]
        done = _run([compiler, "-shared", "-o", str(target), *parts, *link, "-pthread"])
        _record(log, done)
        if done.returncode:
            raise QwenVLError(f"the engine does not link here; see {log_path}")
        target.replace(built)


class BuildFailed(Exception):
    """A compiler that ended with an error."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        super().__init__(done.returncode)
        self.done = done


def _compile(compiler: str, unit: Unit, objects: Path) -> subprocess.CompletedProcess[str]:
    output = objects / f"{unit.name}.o"
    done = _run([compiler, *unit.flags, "-c", str(unit.source), "-o", str(output)])
    if done.returncode:
        raise BuildFailed(done)
    return done


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")


def _record(log: IO[str], done: subprocess.CompletedProcess[str]) -> None:
    log.write(f"{shlex.join(done.args)}\n{done.stdout}{done.stderr}")
    log.flush()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that goes with the process, so that a killed build blocks nobody."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _paddle_flags() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """For compiling and for linking. The library finds Paddle's own in the process that loads it."""
    import paddle

    package = Path(paddle.__file__).parent
    include = Path(paddle.sysconfig.get_include())
    flags = (f"-isystem{include}", f"-isystem{include / 'third_party'}", "-w")
    names = ("libphi.so", "libphi_core.so", "libcommon.so")
    libraries = [f"-l:{name}" for name in names if (package / "libs" / name).is_file()]
    return flags, (f"-L{package / 'libs'}", *libraries)


def _paddle_identity() -> tuple[str, ...]:
    import paddle

    return paddle.__version__, str(paddle.version.commit), str(Path(paddle.__file__).parent)


def _compiler_version(compiler: str) -> str:
    path: Optional[str] = shutil.which(compiler)
    return _run([path, "--version"]).stdout if path else ""
