"""Run `qwenvl` for each line of the input in a child process with limits, and report its exit status.

A line is {"arguments": […], "folder": …}, the answer to it {"ended": exit code, negative for a signal, "said": standard
error, "seconds": …, "mib": peak memory}. What is slow to import is imported once, before the first fork.

With {"arguments": […], "folder": …, "models": […]} one child reads all these model folders instead of running `qwenvl`,
ten times as many per second as with a child for each. It prints a line of JSON for each: {"said": …, "seconds": …}.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from paddlemix_qwenvl_plugin.batch import source  # noqa: F401
from paddlemix_qwenvl_plugin.checkpoint import convert  # noqa: F401
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.cli.main import main
from paddlemix_qwenvl_plugin.export import export  # noqa: F401
from paddlemix_qwenvl_plugin.recipes import runner  # noqa: F401
from paddlemix_qwenvl_plugin.runtime import engine_executor, predictor  # noqa: F401
from paddlemix_qwenvl_plugin.runtime.adapters import low_rank, open_adapters
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, line_of

ADDRESSES = 16 << 30
SECONDS = 30.0


def read(model: str) -> None:
    """Read a model folder's weights, with and without the adapter beside it merged; print the error and the time."""
    start = time.monotonic()
    said = ""
    adapter = Path(model).with_name("adapter")
    lora = [adapter] if adapter.is_dir() else []
    try:
        checkpoint = Checkpoint(Path(model), lora)
        quantised = checkpoint.quantised
        for name in quantised.names if quantised else ():
            quantised.read(name)
        specs = {**checkpoint.language, **checkpoint.vision}
        plain = {name: spec for name, spec in specs.items() if not quantised or name not in quantised.names}
        for _ in checkpoint.tensors(plain, "float32"):
            pass
        for folder in lora:
            for opened in open_adapters({"a": folder}, checkpoint.config).values():
                for _ in low_rank(opened):
                    pass
    except (QwenVLError, OSError) as error:
        said = f"qwenvl: {line_of(error)}"
    except Exception:
        said = f"internal error: {traceback.format_exc()}"
    print(json.dumps({"said": said, "seconds": time.monotonic() - start}), flush=True)


def run(arguments: list[str], folder: str, models: Sequence[str] = ()) -> None:
    """Run a job in the forked child, with limits; never returns."""
    code = 99  # an exception left main(); 98: SystemExit without a number
    try:
        os.setsid()
        os.chdir(folder)
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(f".{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # Python's default: an OSError in place of the signal
        for model in models:
            read(model)
        if not models:
            sys.argv = ["qwenvl", *arguments]
            main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> tuple[int, float]:
    """Wait for the child: (status, peak memory in MiB); kill it after the timeout."""
    end = time.monotonic() + SECONDS
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage.ru_maxrss / 1024
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            end += SECONDS
        time.sleep(0.005)


def serve() -> None:
    Image.init()
    for line in sys.stdin:
        job = json.loads(line)
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            run(**job)
        status, mib = wait(child)
        said = (Path(job["folder"]) / ".stderr").read_text("utf-8", "replace")[-4000:]
        answer = {
            "ended": -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status),
            "said": said,
            "seconds": time.monotonic() - start,
            "mib": mib,
            "printed": (Path(job["folder"]) / ".stdout").read_text("utf-8", "replace")
            if job.get("models")
            else "",
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
