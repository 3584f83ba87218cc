"""Ray cluster with all nodes on this machine, processes of `qwenvl serve --ray`, and HTTP clients."""

from __future__ import annotations

import base64
import contextlib
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Optional

import httpx
from prometheus_client.parser import text_string_to_metric_families

REPO = Path(__file__).resolve().parents[2]
MODEL_NAME = "qwen-vl-chat"  # the default for a chat model

# Timeout in seconds, longer than any operation takes on a busy machine.
TIMEOUT = 300.0

_QWENVL = (sys.executable, "-c", "from paddlemix_qwenvl_plugin.cli.main import main; main()")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Command:
    """Process of `qwenvl serve` with the given flags, --ray among them.

    Attributes:
        lines: the lines of stdout and stderr so far.
    """

    def __init__(self, *flags: object) -> None:
        self.process = subprocess.Popen(
            [*_QWENVL, "serve", *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str] = queue.Queue()
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=[self.process.stdout], daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append(line)
            self._queue.put(line)
        self._queue.put("")  # end of the output

    def wait_for(self, text: str) -> str:
        """Wait for the next line that contains `text`, and return it."""
        while True:
            line = self._queue.get(timeout=TIMEOUT)
            assert line, "".join(self.lines)
            if text in line:
                return line

    def end(self, signal_number: Optional[int] = None) -> int:
        """Send a signal if one is given, wait for the exit, and return the exit code."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        code = self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        return code


@contextlib.contextmanager
def local_cluster(n_nodes: int, cpus: float) -> Iterator[Any]:
    """Run a ray.cluster_utils.Cluster on this machine, of nodes with `cpus` CPUs each, during the `with` block."""
    from ray.cluster_utils import Cluster

    node_arguments = {"num_cpus": cpus, "object_store_memory": 100 * 2**20}
    head_arguments = {**node_arguments, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head_arguments)
    try:
        for _ in range(n_nodes - 1):
            cluster.add_node(wait=False, **node_arguments)
        yield cluster
    finally:
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node, allow_graceful=False)
        cluster.remove_node(cluster.head_node, allow_graceful=False)


class Client:
    """HTTP client with an API key."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self.headers = {"Authorization": f"Bearer {key}"}

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers, timeout=TIMEOUT)

    def chat(self, messages: Any, **parameters: Any) -> httpx.Response:
        body = {"model": MODEL_NAME, "messages": messages, **parameters}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=self.headers, timeout=TIMEOUT)

    def metrics(self, name: str, **labels: str) -> dict[str, float]:
        """Sum a metric's values that have these labels, separately for each front and engine.

        The keys are the values of the label `front` or `engine`; "" for metrics with neither label.
        """
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    label = sample.labels.get("front") or sample.labels.get("engine") or ""
                    values[label] = values.get(label, 0.0) + sample.value
        return values


def wait_until(condition: Callable[[], Any], seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"condition is still false after {seconds:g} s"
        time.sleep(0.1)


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def engine_pids() -> dict[str, int]:
    """Map the replica ids of engines to process ids: a replica holds its log file open, whose name contains its id."""
    pids = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for file in (folder / "fd").iterdir():
                log = re.search(r"/replica_qwenvl_Engine_(\w+)\.log$", str(file.readlink()))
                if log is not None:
                    pids[log[1]] = int(folder.name)
    return pids
