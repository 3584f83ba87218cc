"""`qwenvl serve` as a process: output, log, child processes, memory, metrics."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Optional

import httpx
from prometheus_client.parser import text_string_to_metric_families

REPO = Path(__file__).resolve().parents[2]

# Longer than anything takes on a busy machine.
PATIENCE = 120.0

_QWENVL = (sys.executable, "-c", "from paddlemix_qwenvl_plugin.cli.main import main; main()")


class ServerProcess:
    """`qwenvl serve` with flags.

    Attributes:
        log: the lines on stderr so far.
    """

    def __init__(
        self,
        flags: Sequence[object],
        command: Sequence[str] = (*_QWENVL, "serve"),
        environment: Mapping[str, str] = {},
        **options: Any,
    ) -> None:
        """Start the process; `options` are Popen's."""
        path = os.pathsep.join(map(str, (REPO, REPO / "tests" / "serve")))
        self._process = subprocess.Popen(
            [*command, *map(str, flags)],
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        self.pid = self._process.pid
        self.log: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        readers = {self._process.stdout: self._lines.put, self._process.stderr: self.log.append}
        # A full pipe that is not read blocks the server.
        self._readers = [threading.Thread(target=_each_line, args=reader) for reader in readers.items()]
        for thread in self._readers:
            thread.start()

    def line(self) -> str:
        """Read the next line of stdout."""
        line = self._lines.get(timeout=PATIENCE)
        assert line, "".join(self.log)
        return line

    def ready(self) -> str:
        """Wait until the server is ready; return its URL."""
        line = self.line()
        assert line.startswith("Serving "), line
        assert " on cpu at http://" in line
        return line.split()[-1]

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Wait for the exit; return the exit code and stderr."""
        code = self._process.wait(PATIENCE)
        for thread in self._readers:
            thread.join(PATIENCE)
        return code, "".join(self.log)

    def close(self) -> None:
        self._process.kill()
        self.end()

    def children(self) -> dict[int, str]:
        """Child processes by kind: "engine", "images" or the command."""
        below = {self.pid}
        found: dict[int, str] = {}
        parents = {pid: parent for pid, (parent, _) in _processes().items()}
        for pid in sorted(parents):
            if parents[pid] in below:
                below.add(pid)
                found[pid] = _what(pid)
        return found

    def engine(self) -> Optional[int]:
        """Process id of the engine process, if any."""
        return next((pid for pid, what in self.children().items() if what == "engine"), None)

    def memory(self) -> dict[str, int]:
        """Private bytes of each process, without file-mapped weights and libraries."""
        named = {self.pid: "front", **self.children()}
        memory: dict[str, int] = {}
        for pid, what in named.items():
            memory[what] = memory.get(what, 0) + private_bytes(pid)
        return memory


def _each_line(stream: IO[str], take: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            take(line)
    take("")


def metrics(url: str) -> dict[str, float]:
    """Gauges and counters without labels."""
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {sample.name: sample.value for sample in samples if not sample.labels}


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never became so"
        time.sleep(0.02)


_AT_REST = ("slots_running", "queue_waiting", "engine_running", "engine_waiting", "kv_blocks_used")


def wait_until_idle(url: str) -> None:
    """Wait until no request holds or waits for a slot or a block."""
    wait_until(lambda: not any(metrics(url)[f"qwenvl_{name}"] for name in _AT_REST))


def alive(pid: int) -> bool:
    """Whether a process runs and is not a zombie."""
    return _processes().get(pid, (0, "Z"))[1] not in "ZX"


def sound_log(text: str) -> list[dict[str, Any]]:
    """Records of a log: each line must be JSON, and none an exception."""
    records = [json.loads(line) for line in text.splitlines()]
    assert [record for record in records if "traceback" in record] == []
    return records


def private_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def _processes() -> dict[int, tuple[int, str]]:
    """Parent and state of each process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            found[int(folder.name)] = int(parent), state
    return found


def _what(pid: int) -> str:
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        for word, name in (("engine_process", "engine"), ("image_worker", "images")):
            if word in command:
                return name
        return command.replace("\0", " ")
    return ""
