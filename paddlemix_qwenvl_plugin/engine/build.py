"""The engine's libraries: shipped, or compiled on first use, once for all processes of a user.

`libqwenvl.so` is the engine and knows no Paddle. `libqwenvl_paddle.so` binds it to the installed Paddle.
`libqwenvl_cuda.so` is its part for GPUs, and the kernels for the GPUs that are here are files of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, Optional

from paddlemix_qwenvl_plugin.engine import nvrtc_compile
from paddlemix_qwenvl_plugin.engine.nvrtc import Nvrtc
from paddlemix_qwenvl_plugin.engine.sources import (
    Unit,
    cuda_units,
    digest,
    isas_here,
    kernel_units,
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
CUDA_LIBRARY = "libqwenvl_cuda.so"
OPERATORS = "libqwenvl_paddle.so"

# A release puts the library here, and that for GPUs beside it (tools/release_wheel.py).
SHIPPED = Path(__file__).with_name(LIBRARY)

_GPU_FOLDERS = ("include", "core", "cuda")
_GPU_WORDS = ("the engine for GPUs", "build-engine --device gpu")

# A C++ library that a compiler links in stays inside: two that see each other, as Paddle's and it, end the process.
_LINK = ("-Wl,--exclude-libs,ALL",)

# What a compiler says of trouble that has gone when it is tried again.
_PASSING = ("No space left", "Killed")


def library(allowed: bool = False) -> Path:
    """The engine's library: the shipped one, else that of these sources and this processor, built now if need be.

    Args:
        allowed: build also where QWENVL_NO_BUILD is set, or where it has failed before.

    Raises:
        QwenVLError: it is not there and cannot be built; the line says why.
    """
    return SHIPPED if SHIPPED.is_file() else built(_library(), allowed) / LIBRARY


def operators_library(allowed: bool = False) -> Path:
    """The engine as operators of the installed Paddle, linked to `library()`. Arguments and errors are the same."""
    return built(_operators(library(allowed)), allowed) / OPERATORS


def cuda_library(allowed: bool = False) -> Path:
    """The engine's part for GPUs, which `library()` loads. Arguments and errors are the same."""
    shipped = SHIPPED.with_name(CUDA_LIBRARY)
    return shipped if shipped.is_file() else built(cuda_target(), allowed) / CUDA_LIBRARY


def library_state(for_gpus: bool = False) -> tuple[str, Path]:
    """("shipped", "built", "failed" or "not built", where the engine's library is or would be); builds nothing."""
    shipped = SHIPPED.with_name(CUDA_LIBRARY) if for_gpus else SHIPPED
    if shipped.is_file():
        return "shipped", shipped
    state, folder = target_state(cuda_target() if for_gpus else _library())
    return state, folder / shipped.name


def target_state(target: Target) -> tuple[str, Path]:
    """("built", "failed" or "not built", the folder where it is or would be); builds nothing."""
    folder = _folder(target)
    if _is_whole(target, folder):
        return "built", folder
    return "failed" if (folder / "failed").is_file() else "not built", folder


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
    """A library to make of units, or with `link` None the files that these are compiled to.

    Attributes:
        folders: of csrc/, whose files decide about it, as do the flags and `identity`.
        what: what it is called in errors; `again` is our command that builds it.
    """

    name: str
    folders: tuple[str, ...]
    units: list[Unit]
    compiler: list[str]
    identity: tuple[str, ...]
    link: Optional[tuple[str, ...]] = ()
    what: str = "the engine"
    again: str = "build-engine"

    @property
    def files(self) -> list[str]:
        """Names of what is made."""
        return [self.name] if self.link is not None else [unit.name for unit in self.units]


def build(target: Target, folder: Path, log: IO[str]) -> None:
    """Compile and link in an empty folder, which gets `target.files`.

    Raises:
        BuildFailed: the compiler did not do it.
    """
    csrc = source_folder()
    include = (f"-I{csrc}", f"-I{csrc / 'include'}")
    compile_all = [
        [*target.compiler, *unit.flags, *include, "-c", str(unit.source), "-o", str(folder / unit.name)]
        for unit in target.units
    ]
    rounds = [(f"building {target.name}", compile_all)]
    if target.link is not None:
        link = [*target.compiler, "-shared", f"-Wl,-soname,{target.name}", "-o", str(folder / target.name)]
        link += [*(str(folder / unit.name) for unit in target.units), *target.link, "-pthread"]
        rounds.append(("", [link]))
    for label, commands in rounds:
        with contextlib.closing(_run_all(commands, folder)) as running:
            for done in track(running, label, len(commands)):
                log.write(f"{shlex.join(done.args)}\n{done.stdout}")
                log.flush()
                if done.returncode:
                    raise BuildFailed(done)


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
    return library_target(library_units(csrc, isas_here(csrc)))


def library_target(units: list[Unit], link: tuple[str, ...] = ()) -> Target:
    """The engine of these units."""
    link = (*_LINK, *link)
    return Target(LIBRARY, ("include", "core", "cpu"), units, compiler(), _compiler_identity(), link)


def cuda_target(link: tuple[str, ...] = ()) -> Target:
    """The engine's part for GPUs."""
    units = cuda_units(source_folder())
    link = (*_LINK, "-Wl,-z,defs", *link, "-ldl")  # what is missing shows now, not when it is loaded
    return Target(CUDA_LIBRARY, _GPU_FOLDERS, units, compiler(), _compiler_identity(), link, *_GPU_WORDS)


def kernel_target(nvrtc: Nvrtc, architectures: Iterable[int]) -> Target:
    """The kernels for these GPUs."""
    units = kernel_units(source_folder(), sorted(set(architectures)))
    command = [sys.executable, nvrtc_compile.__file__, nvrtc.library]
    command += [f"-I{folder}" for folder in nvrtc.include]
    return Target("GPU kernels", _GPU_FOLDERS, units, command, (str(nvrtc),), None, *_GPU_WORDS)


def _compiler_identity() -> tuple[str, ...]:
    return (*compiler(), compiler_version(compiler()))


def _operators(engine: Path) -> Target:
    """Finds the engine where it lies, and Paddle's own libraries in the process that loads it."""
    import paddle

    package, include = Path(paddle.__file__).parent, Path(paddle.sysconfig.get_include())
    flags = (f"-isystem{include}", f"-isystem{include / 'third_party'}", "-w")
    names = ("libphi.so", "libphi_core.so", "libcommon.so")
    present = [f"-l:{name}" for name in names if (package / "libs" / name).is_file()]
    link = (
        *_LINK,
        f"-L{package / 'libs'}",
        *present,
        f"-L{engine.parent}",
        f"-l:{LIBRARY}",
        f"-Wl,-rpath,{engine.parent}",
    )
    identity = (*_compiler_identity(), paddle.__version__, str(paddle.version.commit), str(package))
    units = operators_units(source_folder(), flags)
    return Target(OPERATORS, ("include", "paddle"), units, compiler(), identity, link)


def _folder(target: Target) -> Path:
    flags = [text for unit in target.units for text in (unit.name, *unit.flags)]
    key = (target.name, *target.identity, *flags, *(target.link or ()))
    return cache_folder() / digest(source_folder(), target.folders, *key)


def built(target: Target, allowed: bool = False) -> Path:
    """The folder with the target's files. Arguments and errors as for `library`."""
    if os.name == "nt":
        raise QwenVLError("the engine does not run on Windows so far")
    folder, command = _folder(target), target.compiler[0]
    failed = folder / "failed"
    if _is_whole(target, folder):
        return folder
    if not allowed and env.NO_BUILD.read():
        raise QwenVLError(
            f"{target.what} is not built, and {env.NO_BUILD.name} is set: run {program()} {target.again}"
        )
    if not allowed and failed.is_file():  # it would fail again, at the start of every process
        raise QwenVLError(f"{failed.read_text('utf-8')} ({program()} {target.again} tries again)")
    if shutil.which(command) is None:
        raise QwenVLError(
            f"{target.what} needs a C++17 compiler, and there is no {command}: apt-get install g++"
        )
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not _is_whole(target, folder):  # another process built it meanwhile
                _build_into(target, folder, failed)
    except OSError as error:
        raise QwenVLError(
            f"{folder}: cannot build the engine there ({error.strerror}); set QWENVL_CACHE_DIR to a folder of yours"
        ) from error
    return folder


def _build_into(target: Target, folder: Path, failed: Path) -> None:
    """Build in a scratch folder inside `folder`; `failed` remembers why it cannot be."""
    log_path = folder / "build.log"
    failed.unlink(missing_ok=True)
    for left in folder.glob("scratch-*"):  # by builds that were killed: this one has the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="scratch-") as scratch:
        try:
            with log_path.open("w", encoding="utf-8") as log:
                build(target, Path(scratch), log)
        except BuildFailed as error:
            line = f"{target.what} does not compile here: {error}; see {log_path}"
            if not error.passing:
                failed.write_text(line, "utf-8")
            raise QwenVLError(line) from error
        for name in target.files:
            made = Path(scratch, name)
            _digest_of(folder / name).write_text(_sha256(made), "utf-8")
            made.replace(folder / name)


def _is_whole(target: Target, folder: Path) -> bool:
    """Whether all files are there as they were built: a library that was cut off would end the process."""
    try:
        return all(
            _digest_of(path).read_text("utf-8") == _sha256(path)
            for path in map(folder.joinpath, target.files)
        )
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
                with (folder / f"{number}.out").open("wb") as out, _signals_later():
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
        with _signals_later():
            for process in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Put off what Ctrl-C and SIGTERM do until the block has ended, so that no process is started and not known."""
    came: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python calls handlers in no other
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    for late in came:
        signal.raise_signal(late)
