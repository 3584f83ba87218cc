"""`qwenvl serve --ray` on a cluster of local nodes, and its clients."""

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
NAME = "qwen-vl-chat"

# Seconds; longer than any operation on a busy machine.
PATIENCE = 300.0

_QWENVL = (sys.executable, "-c", "from paddlemix_qwenvl_plugin.cli.main import main; main()")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Command:
    """Process of `qwenvl serve --ray`.

    Attributes:
        lines: its output lines, of stdout and stderr.
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
        self._queue.put("")

    def wait_for(self, words: str) -> str:
        """Wait for a line that contains `words`, and return it."""
        while True:
            line = self._queue.get(timeout=PATIENCE)
            assert line, "".join(self.lines)
            if words in line:
                return line

    def end(self, number: Optional[int] = None) -> int:
        """Send a signal, if any, and wait for the exit."""
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code


@contextlib.contextmanager
def local_cluster(n_nodes: int, cpus: float) -> Iterator[Any]:
    """Start a ray.cluster_utils.Cluster of nodes on this machine for the block."""
    from ray.cluster_utils import Cluster

    shares = {"num_cpus": cpus, "object_store_memory": 100 * 2**20}
    head = {**shares, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(n_nodes - 1):
            cluster.add_node(wait=False, **shares)
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
        return httpx.get(self.url + path, headers=self.headers, timeout=PATIENCE)

    def chat(self, messages: Any, **parameters: Any) -> httpx.Response:
        body = {"model": NAME, "messages": messages, **parameters}
        return httpx.post(
            f"{self.url}/v1/chat/completions", json=body, headers=self.headers, timeout=PATIENCE
        )

    def metrics(self, name: str) -> dict[str, float]:
        """Values of a metric by its label `front` or `engine`, "" without either, summed over the other labels."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name:
                    label = sample.labels.get("front") or sample.labels.get("engine") or ""
                    found[label] = found.get(label, 0.0) + sample.value
        return found


def wait_until(holds: Callable[[], Any], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"condition is still false after {seconds:g} s"
        time.sleep(0.1)


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def engine_pids() -> dict[str, int]:
    """Map the replica ids of engines to process ids, by the log files that processes hold open."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for file in (folder / "fd").iterdir():
                log = re.search(r"/replica_qwenvl_Engine_(\w+)\.log$", str(file.readlink()))
                if log is not None:
                    found[log[1]] = int(folder.name)
    return found
