"""Targets of serve.py: our server, llama.cpp's server, and our loop alone, each started, loaded and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np

_HERE = Path(__file__).parent
_START_SECONDS = 120.0
_THREADS = 2
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(_THREADS)}
_WARM_UP: list[dict[str, Any]] = [{"prompt": list(range(300, 332)), "max_tokens": 8}] * 8


@dataclass
class Server:
    """Definition of a server.

    Attributes:
        ready: path that returns 200 when the server is ready.
        body: keys that this server needs in each request besides the common ones.
    """

    name: str
    command: list[str]
    ready: str
    body: dict[str, Any] = field(default_factory=dict)


@dataclass
class Load:
    """Load of a run: a number of clients (closed loop), or requests per second (open loop)."""

    clients: Optional[int] = None
    rate: Optional[float] = None

    def __str__(self) -> str:
        return f"{self.clients} clients" if self.clients else f"{self.rate:g}/s"


Measure = Callable[[Load, list[dict[str, Any]]], dict[str, Any]]
"""Runs a load with request bodies on a started target, and returns the figures."""


def ours(folder: Path) -> Server:
    stages = ["--first_model_path", folder / "vision", "--second_model_path", folder / "text" / "qwen"]
    qwenvl = Path(sys.executable).with_name("qwenvl")
    command = [qwenvl, "serve", *stages, "--served_model_name", "model"]
    return Server("qwenvl serve", [*map(str, command)], "/health/ready")


def llama(folder: Path, program: Path, context: int) -> Server:
    """llama-server with 64 slots of `context` tokens, without the prompt cache, which would never hit."""
    model = ["-m", str(folder / "qwen.gguf"), "--alias", "model"]
    load = f"-np 64 -c {64 * context} -cb -t {_THREADS} -tb {_THREADS} --cache-ram 0"
    return Server("llama-server", [str(program), *model, *load.split()], "/health", {"cache_prompt": False})


@contextlib.contextmanager
def on_server(server: Server, folder: Path) -> Iterator[Measure]:
    """Start a server, and yield its Measure."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*server.command, "--host", "127.0.0.1", "--port", str(port)]
    with (folder / f"{server.name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_ENVIRONMENT)
    try:
        wait_ready(f"http://127.0.0.1:{port}{server.ready}", process, log.name)
        common = {
            "model": "model",
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
        }
        task = {"port": port, "path": "/v1/completions", "body": {**common, **server.body}}

        def measure(load: Load, bodies: list[dict[str, Any]]) -> dict[str, Any]:
            how = {"clients": load.clients} if load.clients else {"rate": load.rate, "seed": 0}
            before = cpu_seconds(process.pid)
            done = subprocess.run(
                [sys.executable, str(_HERE / "serve_client.py")],
                input=json.dumps({**task, **how, "bodies": bodies}),
                capture_output=True,
                text=True,
                check=True,
            )
            used = cpu_seconds(process.pid) - before
            return {"name": server.name, "server_cpu": used, **figures(json.loads(done.stdout))}

        measure(Load(clients=4), _WARM_UP)
        yield measure
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def on_loop(folder: Path) -> Iterator[Measure]:
    """Start a process with our loop alone, and yield its Measure."""
    command = [
        sys.executable,
        str(_HERE / "serve_loop.py"),
        str(folder / "vision"),
        str(folder / "text" / "qwen"),
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=_ENVIRONMENT, text=True) as process:
        assert process.stdin
        assert process.stdout

        def measure(load: Load, bodies: list[dict[str, Any]]) -> dict[str, Any]:
            print(json.dumps({"clients": load.clients, "bodies": bodies}), file=process.stdin, flush=True)
            return {"name": "loop", **json.loads(process.stdout.readline())}

        measure(Load(clients=4), _WARM_UP)
        yield measure
        process.stdin.close()


def wait_ready(url: str, process: subprocess.Popen[bytes], log: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url):
            return
        time.sleep(0.1)
    raise SystemExit(f"timed out waiting for the server; see {log}")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process without its children; of our server, that of the front without the engine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Figures of a run on a server, with the samples, so that rounds can be combined."""
    answers = report["answers"]
    for answer in answers:
        if not answer["error"] and answer["finish"] != "length":
            answer["error"] = f"finish_reason {answer['finish']}"
    good = [answer for answer in answers if not answer["error"]]
    times = [np.array(answer["times"]) for answer in good]
    return {
        "requests": len(good),
        "tokens": sum(answer["usage"]["completion_tokens"] for answer in good),
        "cached": sum(
            (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0) for answer in good
        ),
        "events": sum(map(len, times)),
        "seconds": max(a["end"] for a in good) - min(a["start"] for a in answers) if good else 0.0,
        "first": [float(t[0]) for t in times],
        "between": [float(gap) for t in times for gap in np.diff(t)],
        "errors": [answer["error"] for answer in answers if answer["error"]],
        "client_cpu": report["client_cpu"],
    }
