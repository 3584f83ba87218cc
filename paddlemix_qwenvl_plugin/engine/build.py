"""The engine's libraries: shipped, or compiled on first use into a cache shared by all processes of a user.

`libqwenvl.so` is the engine, independent of Paddle. `libqwenvl_paddle.so`, never shipped, binds the engine to the
installed Paddle. `libqwenvl_cuda.so` is the engine's GPU part; the kernels for the GPUs of this machine are separate
files, also never shipped.
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

# Location of the library in a release, next to the library for GPUs (tools/release_wheel.py).
SHIPPED = Path(__file__).with_name(LIBRARY)

_GPU_FOLDERS = ("include", "core", "cuda")
# `title` and `subcommand` of targets for GPUs.
_GPU_LABELS = ("the engine for GPUs", "build-engine --device gpu")

# Hide the symbols of a statically linked C++ runtime: the process crashes if they mix with those of Paddle's copy.
_LINK = ("-Wl,--exclude-libs,ALL",)

# Compiler messages of transient failures, after which a retry may succeed.
_TRANSIENT = ("No space left", "Killed")


def library(allowed: bool = False) -> Path:
    """Path of the engine's library: shipped, or built for this processor if it is not in the cache.

    Args:
        allowed: build even if QWENVL_NO_BUILD is set or an earlier build failed.

    Raises:
        QwenVLError: the library does not exist and cannot be built; the message has the reason.
    """
    return SHIPPED if SHIPPED.is_file() else built(_library(), allowed) / LIBRARY


def operators_library(allowed: bool = False) -> Path:
    """Path of the engine's operators for the installed Paddle. Arguments and errors as for `library`."""
    return built(_operators(library(allowed)), allowed) / OPERATORS


def cuda_library(allowed: bool = False) -> Path:
    """Path of the engine's part for GPUs, which the engine loads on demand. Arguments and errors as for `library`."""
    shipped = SHIPPED.with_name(CUDA_LIBRARY)
    return shipped if shipped.is_file() else built(cuda_target(), allowed) / CUDA_LIBRARY


def library_state(for_gpus: bool = False) -> tuple[str, Path]:
    """State ("shipped", "built", "failed", "not built") and path of `library` or `cuda_library`; builds nothing."""
    shipped = SHIPPED.with_name(CUDA_LIBRARY) if for_gpus else SHIPPED
    if shipped.is_file():
        return "shipped", shipped
    state, folder = target_state(cuda_target() if for_gpus else _library())
    return state, folder / shipped.name


def target_state(target: Target) -> tuple[str, Path]:
    """State of a target ("built", "failed", "not built") and its folder; builds nothing."""
    folder = _folder(target)
    if _is_complete(target, folder):
        return "built", folder
    return "failed" if (folder / "failed").is_file() else "not built", folder


def cache_folder() -> Path:
    """Cache folder of built libraries: QWENVL_CACHE_DIR/engine, else qwenvl/engine in the user's cache folder."""
    from platformdirs import user_cache_path

    configured = env.CACHE_DIR.read()
    return (configured.absolute() if configured else user_cache_path("qwenvl")) / "engine"


def compiler() -> list[str]:
    """Command of the C++ compiler: CXX, which may contain arguments, else c++."""
    return shlex.split(os.environ.get("CXX") or "") or ["c++"]


def compiler_version(command: Sequence[str]) -> str:
    """Output of the compiler's `--version`; empty if the compiler is not installed."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run([*command, "--version"], capture_output=True, check=False)
    return done.stdout.decode("utf-8", "replace")


class Target(NamedTuple):
    """A library to build from units; with `link` None, the units' output files themselves.

    Attributes:
        name: file name of the library; with `link` None, a label of the progress.
        folders: folders of csrc/ whose files are part of the cache key (see `_folder` for its other parts).
        compiler: beginning of every command that compiles or links.
        identity: texts that identify the compiler and, for the operators, the installed Paddle.
        link: further arguments of the linker, or None.
        title: name of the target in error messages.
        subcommand: the subcommand of `qwenvl` that builds the target.
    """

    name: str
    folders: tuple[str, ...]
    units: list[Unit]
    compiler: list[str]
    identity: tuple[str, ...]
    link: Optional[tuple[str, ...]] = ()
    title: str = "the engine"
    subcommand: str = "build-engine"

    @property
    def files(self) -> list[str]:
        """Names of the files that a build creates."""
        return [self.name] if self.link is not None else [unit.name for unit in self.units]


def require_compiler(target: Target) -> None:
    """Raise QwenVLError if the compiler of a target is not installed."""
    command = target.compiler[0]
    if shutil.which(command) is None:
        raise QwenVLError(
            f"{target.title} needs a C++17 compiler, and {command} was not found: apt-get install g++"
        )


def build(target: Target, folder: Path, log: IO[str]) -> None:
    """Create `target.files` in an empty folder; commands and their output go to `log`.

    Raises:
        BuildFailed: a compiler or the linker failed.
    """
    csrc = source_folder()
    include = (f"-I{csrc}", f"-I{csrc / 'include'}")
    compile_commands = [
        [*target.compiler, *unit.flags, *include, "-c", str(unit.source), "-o", str(folder / unit.name)]
        for unit in target.units
    ]
    rounds = [(f"building {target.name}", compile_commands)]
    if target.link is not None:
        link = [*target.compiler, "-shared", f"-Wl,-soname,{target.name}", "-o", str(folder / target.name)]
        link += [*(str(folder / unit.name) for unit in target.units), *target.link, "-pthread"]
        rounds.append((f"linking {target.name}", [link]))
    for label, commands in rounds:
        with contextlib.closing(_run_all(commands, folder)) as running:
            for done in track(running, label, len(commands)):
                log.write(f"{shlex.join(done.args)}\n{done.stdout}")
                log.flush()
                if done.returncode:
                    raise BuildFailed(done)


class BuildFailed(Exception):
    """Error of a compiler or linker run; `transient` if a retry may succeed."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        lines = [line.strip() for line in done.stdout.splitlines()]
        relevant = [line for line in lines if any(word in line for word in _TRANSIENT)]
        relevant += [line for line in lines if "error" in line.lower()]
        cause = f"{done.args[0]} ended with exit code {done.returncode}"
        if done.returncode < 0:
            cause = f"{done.args[0]} was killed by {signal.Signals(-done.returncode).name}"
        elif relevant:
            cause = one_line(relevant[0])[:300]
        super().__init__(cause)
        self.transient = done.returncode < 0 or any(word in cause for word in _TRANSIENT)


def _library() -> Target:
    csrc = source_folder()
    return library_target(library_units(csrc, isas_here(csrc)))


def library_target(units: list[Unit], link: tuple[str, ...] = ()) -> Target:
    """Build target of the engine's library; a release (tools/release_wheel.py) gives further linker arguments."""
    link = (*_LINK, *link)
    return Target(LIBRARY, ("include", "core", "cpu"), units, compiler(), _compiler_identity(), link)


def cuda_target(link: tuple[str, ...] = ()) -> Target:
    """Build target of the engine's part for GPUs."""
    units = cuda_units(source_folder())
    link = (*_LINK, "-Wl,-z,defs", *link, "-ldl")  # defs: undefined symbols are errors now, not at load time
    return Target(CUDA_LIBRARY, _GPU_FOLDERS, units, compiler(), _compiler_identity(), link, *_GPU_LABELS)


def kernel_target(nvrtc: Nvrtc, architectures: Iterable[int]) -> Target:
    """Build target of the GPU kernels for some architectures (compute capabilities times ten)."""
    units = kernel_units(source_folder(), sorted(set(architectures)))
    command = [sys.executable, nvrtc_compile.__file__, nvrtc.library]
    command += [f"-I{folder}" for folder in nvrtc.include]
    return Target("GPU kernels", _GPU_FOLDERS, units, command, (str(nvrtc),), None, *_GPU_LABELS)


def _compiler_identity() -> tuple[str, ...]:
    return (*compiler(), compiler_version(compiler()))


def _operators(engine: Path) -> Target:
    """Build target of the operators, linked to the engine by its path and to the installed Paddle's libraries."""
    import paddle

    package, include = Path(paddle.__file__).parent, Path(paddle.sysconfig.get_include())
    flags = (f"-isystem{include}", f"-isystem{include / 'third_party'}", "-w")
    names = ("libphi.so", "libphi_core.so", "libcommon.so")  # not all of them in every version of Paddle
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
    """Build a target unless the cache has it, and return its folder. Arguments and errors as for `library`."""
    if os.name == "nt":
        raise QwenVLError("the engine does not support Windows")
    folder = _folder(target)
    failed = folder / "failed"
    if _is_complete(target, folder):
        return folder
    if not allowed and env.NO_BUILD.read():
        raise QwenVLError(
            f"{target.title} is not built, and {env.NO_BUILD.name} is set: run {program()} {target.subcommand}"
        )
    if not allowed and failed.is_file():  # do not repeat a failing build at the start of every process
        raise QwenVLError(f"{failed.read_text('utf-8')} ({program()} {target.subcommand} tries again)")
    require_compiler(target)
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not _is_complete(target, folder):  # another process may have built it meanwhile
                _build_into(target, folder, failed)
    except OSError as error:
        raise QwenVLError(
            f"{folder}: cannot build the engine there ({error.strerror}); set QWENVL_CACHE_DIR to a folder of yours"
        ) from error
    return folder


def _build_into(target: Target, folder: Path, failed: Path) -> None:
    """Build in a scratch folder inside `folder`; the file `failed` records the reason of a permanent failure."""
    log_path = folder / "build.log"
    failed.unlink(missing_ok=True)
    for stale in folder.glob("scratch-*"):  # left by killed builds, since this process holds the lock
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="scratch-") as scratch:
        try:
            with log_path.open("w", encoding="utf-8") as log:
                build(target, Path(scratch), log)
        except BuildFailed as error:
            line = f"{target.title} does not compile here: {error}; see {log_path}"
            if not error.transient:
                failed.write_text(line, "utf-8")
            raise QwenVLError(line) from error
        for name in target.files:
            output = Path(scratch, name)
            _digest_path(folder / name).write_text(_sha256(output), "utf-8")
            output.replace(folder / name)


def _is_complete(target: Target, folder: Path) -> bool:
    """Whether all files exist and match their digests: loading a truncated library would crash the process."""
    try:
        return all(
            _digest_path(path).read_text("utf-8") == _sha256(path)
            for path in map(folder.joinpath, target.files)
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def _digest_path(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run_all(
    commands: Sequence[Sequence[str]], folder: Path
) -> Generator[subprocess.CompletedProcess[str], None, None]:
    """Run commands in parallel and yield their results as they end; closing the generator kills the running commands.

    The output of the commands goes to files in `folder`: pipes would have to be read while the commands run.
    """
    waiting = list(enumerate(commands))
    running: dict[int, subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "LC_ALL": "C"}  # BuildFailed parses the English messages
    n_parallel = cpu_threads()
    try:
        while waiting or running:
            while waiting and len(running) < n_parallel:
                number, command = waiting.pop(0)
                with (folder / f"{number}.out").open("wb") as out, _deferred_signals():
                    running[number] = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=out,
                        env=environment,
                        start_new_session=True,  # a process group, so that child processes are killed as well
                    )
            ended = [number for number, process in running.items() if process.poll() is not None]
            for number in ended:
                process = running.pop(number)
                output = (folder / f"{number}.out").read_text("utf-8", "replace")
                yield subprocess.CompletedProcess(list(commands[number]), process.returncode, output)
            if not ended:
                time.sleep(0.02)
    finally:
        with _deferred_signals():
            for process in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def _deferred_signals() -> Iterator[None]:
    """Defer SIGINT, SIGTERM and SIGHUP to the end of the block.

    Thus every started process is recorded, and the killing of recorded processes is not interrupted.
    """
    received: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # the only thread that runs Python's handlers
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {number: signal.getsignal(number) for number in numbers}
        # A started process inherits that a signal is ignored (nohup), but no handler.
        handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in handlers:
        signal.signal(number, lambda signal_number, frame: received.append(signal_number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
    for received_number in received:
        signal.raise_signal(received_number)
