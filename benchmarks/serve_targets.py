"""Targets of serve.py and ray_serve.py: `qwenvl serve`, llama.cpp's server, and the loop without a server."""

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
_START_TIMEOUT = 120.0  # seconds
_THREADS = 2
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(_THREADS)}
_WARM_UP: list[dict[str, Any]] = [{"prompt": list(range(300, 332)), "max_tokens": 8}] * 8


@dataclass
class Server:
    """Definition of a server.

    Attributes:
        name: name of the server in tables.
        command: command line without --host and --port.
        ready: URL path that returns status 200 when the server is ready.
        body: keys of the request body that only this server needs.
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
"""Function that runs a load, with its request bodies, on a running target, and returns the figures.

On a server these are `name`, `server_cpu` and those of figures(); on the loop only `name`, `seconds` and `tokens`.
"""


def ours(folder: Path) -> Server:
    stages = ["--first_model_path", folder / "vision", "--second_model_path", folder / "text" / "qwen"]
    qwenvl = Path(sys.executable).with_name("qwenvl")
    command = [qwenvl, "serve", *stages, "--served_model_name", "model"]
    return Server("qwenvl serve", [*map(str, command)], "/health/ready")


def llama(folder: Path, program: Path, context: int) -> Server:
    """Define llama-server with 64 slots of `context` tokens; prompt caches are off, because all prompts differ."""
    model = ["-m", str(folder / "qwen.gguf"), "--alias", "model"]
    flags = f"-np 64 -c {64 * context} -cb -t {_THREADS} -tb {_THREADS} --cache-ram 0"
    return Server("llama-server", [str(program), *model, *flags.split()], "/health", {"cache_prompt": False})


@contextlib.contextmanager
def on_server(server: Server, folder: Path) -> Iterator[Measure]:
    """Start a server, yield its Measure, and stop the server."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
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
            schedule = {"clients": load.clients} if load.clients else {"rate": load.rate, "seed": 0}
            begin = cpu_seconds(process.pid)
            client = subprocess.run(
                [sys.executable, str(_HERE / "serve_client.py")],
                input=json.dumps({**task, **schedule, "bodies": bodies}),
                capture_output=True,
                text=True,
                check=True,
            )
            server_cpu = cpu_seconds(process.pid) - begin
            return {"name": server.name, "server_cpu": server_cpu, **figures(json.loads(client.stdout))}

        measure(Load(clients=4), _WARM_UP)
        yield measure
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def on_loop(folder: Path) -> Iterator[Measure]:
    """Start a process that runs the loop without a server, yield its Measure, and stop the process.

    The Measure accepts only loads of clients.
    """
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
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url):
            return
        time.sleep(0.1)
    raise SystemExit(f"the server has exited, or was not ready within {_START_TIMEOUT:g} s; see {log}")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process without its children.

    For `qwenvl serve` it is that of the front without the engine process; with --ray it includes no front.
    """
    stat = Path(f"/proc/{pid}/stat").read_text()
    fields = stat.rpartition(")")[2].split()  # after the command name, which may contain spaces
    user_ticks, system_ticks = int(fields[11]), int(fields[12])
    return (user_ticks + system_ticks) / os.sysconf("SC_CLK_TCK")


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Figures of a run on a server, from the report of serve_client.py.

    `first` (times to first token) and `between` (times between events with text) are lists of all samples in seconds,
    so that several rounds can be combined. `seconds`: from the start of the first request to the end of the last
    complete response; 0 without complete responses.
    """
    responses = report["responses"]
    for response in responses:
        # Every request must generate max_tokens tokens, so that all servers do the same work.
        if not response["error"] and response["finish"] != "length":
            response["error"] = f"finish_reason {response['finish']}"
    complete = [response for response in responses if not response["error"]]
    event_times = [np.array(response["times"]) for response in complete]
    seconds = 0.0
    if complete:
        seconds = max(response["end"] for response in complete) - min(
            response["start"] for response in responses
        )
    return {
        "requests": len(complete),
        "tokens": sum(response["usage"]["completion_tokens"] for response in complete),
        "cached": sum(
            (response["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            for response in complete
        ),
        "events": sum(map(len, event_times)),
        "seconds": seconds,
        "first": [float(times[0]) for times in event_times],
        "between": [float(gap) for times in event_times for gap in np.diff(times)],
        "errors": [response["error"] for response in responses if response["error"]],
        "client_cpu": report["client_cpu"],
    }
