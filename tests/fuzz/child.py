"""Server of the fuzzer: runs each job of its standard input in a forked child process with limits.

A job is a line of JSON: {"arguments": arguments of `qwenvl`, "folder": its working directory}. The reply, another line,
has the result of the child process: "exit_code" (the negative number of a signal if one ended it), "stderr", "seconds",
"peak_mib" (memory) and "stdout". Modules that are slow to import are imported once, before the first fork.

With a third key, "models", the child reads the listed model folders instead of running `qwenvl`: one child for many
folders reads ten times as many per second as one child per folder. The child prints a line of JSON for each folder,
{"error": message or "", "seconds": …}; "stdout" in the reply has these lines. Without "models", "stdout" is empty.
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

MAX_ADDRESS_SPACE = 16 << 30  # bytes
MAX_FILE_SIZE = 1 << 30  # bytes
TIMEOUT = 30.0  # seconds


def read_model(model: str) -> None:
    """Read the weights in a model folder, and print the error and the time.

    If there is a folder `adapter` beside the model folder, it is merged into the weights, and then read alone.
    """
    start = time.monotonic()
    message = ""
    adapter = Path(model).with_name("adapter")
    lora = [adapter] if adapter.is_dir() else []
    try:
        checkpoint = Checkpoint(Path(model), lora)
        quantized = checkpoint.quantized
        if quantized:
            for name in quantized.names:
                quantized.read(name)
        specs = {**checkpoint.language, **checkpoint.vision}
        quantized_names = quantized.names if quantized else ()
        plain_specs = {name: spec for name, spec in specs.items() if name not in quantized_names}
        for _ in checkpoint.tensors(plain_specs, "float32"):
            pass
        for folder in lora:
            for opened in open_adapters({"a": folder}, checkpoint.config).values():
                for _ in low_rank(opened):
                    pass
    except (QwenVLError, OSError) as error:
        message = f"qwenvl: {line_of(error)}"
    except Exception:
        message = f"internal error: {traceback.format_exc()}"
    print(json.dumps({"error": message, "seconds": time.monotonic() - start}), flush=True)


def run_job(arguments: list[str], folder: str, models: Sequence[str] = ()) -> None:
    """Run a job in the forked child, with limits; never returns.

    Exit code 98 stands for a SystemExit without a number, 99 for any other exception that was not caught.
    """
    exit_code = 99
    try:
        os.setsid()
        os.chdir(folder)
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(f".{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_SIZE, MAX_FILE_SIZE))
        # With SIGXFSZ ignored, a write over the limit raises OSError instead of ending the process. Python ignores it
        # by default; an imported library may have changed that.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if models:
            for model in models:
                read_model(model)
        else:
            sys.argv = ["qwenvl", *arguments]
            main()
        exit_code = 0
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)


def wait(child: int) -> tuple[int, float]:
    """Wait for the child and return (wait status, peak memory in MiB); kill it after the timeout."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        ended_pid, status, usage = os.wait4(child, os.WNOHANG)
        if ended_pid:
            return status, usage.ru_maxrss / 1024
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            deadline += TIMEOUT
        time.sleep(0.005)


def serve() -> None:
    """Run the jobs of standard input, one after the other."""
    Image.init()  # loads Pillow's plugins before the first fork
    for line in sys.stdin:
        job = json.loads(line)
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            run_job(**job)
        status, peak_mib = wait(child)
        folder = Path(job["folder"])
        reply = {
            "exit_code": -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status),
            "stderr": (folder / ".stderr").read_text("utf-8", "replace")[-4000:],
            "seconds": time.monotonic() - start,
            "peak_mib": peak_mib,
            "stdout": (folder / ".stdout").read_text("utf-8", "replace") if job.get("models") else "",
        }
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve()
