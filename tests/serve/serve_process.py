"""Helpers for `qwenvl serve` as a process: output, log, metrics; on Linux only, child processes and memory."""

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

# Seconds; longer than any operation takes on a busy machine.
TIMEOUT = 120.0

_QWENVL = (sys.executable, "-c", "from paddlemix_qwenvl_plugin.cli.main import main; main()")


class ServerProcess:
    """Running `qwenvl serve`.

    Attributes:
        pid: process id.
        log: the lines on stderr so far.
    """

    def __init__(
        self,
        flags: Sequence[object],
        command: Sequence[str] = (*_QWENVL, "serve"),
        environment: Mapping[str, str] = {},
        **options: Any,
    ) -> None:
        """Start the process.

        Args:
            flags: arguments after the command.
            command: command in place of `qwenvl serve`, such as one that runs serve_fake_server.py.
            environment: additional environment variables.
            options: arguments of Popen.
        """
        self._process = subprocess.Popen(
            [*command, *map(str, flags)],
            env={**os.environ, "PYTHONPATH": str(REPO), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        self.pid = self._process.pid
        self.log: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        # Threads read both pipes all the time: a full pipe would block the server.
        consumers = {self._process.stdout: self._lines.put, self._process.stderr: self.log.append}
        self._readers = [threading.Thread(target=_read_lines, args=args) for args in consumers.items()]
        for thread in self._readers:
            thread.start()

    def read_line(self) -> str:
        """Read the next line of stdout; fails at the end of stdout, with the log as message."""
        line = self._lines.get(timeout=TIMEOUT)
        assert line, "".join(self.log)
        return line

    def wait_until_ready(self) -> str:
        """Wait until the server is ready and return its URL."""
        line = self.read_line()
        assert line.startswith("Serving "), line
        assert " on cpu at http://" in line
        return line.split()[-1]

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait_for_exit(self) -> tuple[int, str]:
        """Wait for the exit and return the exit code and stderr."""
        code = self._process.wait(TIMEOUT)
        for thread in self._readers:
            thread.join(TIMEOUT)
        return code, "".join(self.log)

    def close(self) -> None:
        """Kill the process and wait for its exit."""
        self._process.kill()
        self.wait_for_exit()

    def children(self) -> dict[int, str]:
        """Process id -> kind of all descendants: "engine", "images", or the command line; "" if it has exited."""
        family = {self.pid}
        kinds: dict[int, str] = {}
        parents = {pid: parent for pid, (parent, _) in _processes().items()}
        for pid in sorted(parents):  # a parent usually has a lower id than its children
            if parents[pid] in family:
                family.add(pid)
                kinds[pid] = _kind_of(pid)
        return kinds

    def engine_pid(self) -> Optional[int]:
        """Process id of the engine process, if any."""
        return next((pid for pid, kind in self.children().items() if kind == "engine"), None)

    def memory(self) -> dict[str, int]:
        """Kind of process -> private bytes of all processes of this kind, without file-mapped weights and libraries."""
        kinds = {self.pid: "front", **self.children()}
        memory: dict[str, int] = {}
        for pid, kind in kinds.items():
            memory[kind] = memory.get(kind, 0) + private_bytes(pid)
        return memory


def _read_lines(stream: IO[str], consume: Callable[[str], None]) -> None:
    """Call `consume` with each line, and with an empty string at the end."""
    with stream:
        for line in stream:
            consume(line)
    consume("")


def metrics(url: str) -> dict[str, float]:
    """Name -> value of the samples without labels."""
    text = httpx.get(f"{url}/metrics", timeout=TIMEOUT).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {sample.name: sample.value for sample in samples if not sample.labels}


def wait_until(condition: Callable[[], Any], seconds: float = TIMEOUT) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.02)


# Metrics that are 0 in an idle server, without the prefix "qwenvl_".
_IDLE_METRICS = ("slots_running", "queue_waiting", "engine_running", "engine_waiting", "kv_blocks_used")


def wait_until_idle(url: str) -> None:
    """Wait until no request runs or waits, in the front and in the engine, and no block is in use."""
    wait_until(lambda: not any(metrics(url)[f"qwenvl_{name}"] for name in _IDLE_METRICS))


def alive(pid: int) -> bool:
    """Whether a process runs and is not a zombie."""
    _, state = _processes().get(pid, (0, "Z"))
    return state not in "ZX"  # zombie, dead


def checked_records(text: str) -> list[dict[str, Any]]:
    """Records of a server's log; fails if a line is not JSON or contains a traceback."""
    records = [json.loads(line) for line in text.splitlines()]
    assert [record for record in records if "traceback" in record] == []
    return records


def private_bytes(pid: int) -> int:
    """Anonymous memory of a process in bytes; 0 if the process has exited."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def _processes() -> dict[int, tuple[int, str]]:
    """Process id -> parent's id and state, for all processes of the machine."""
    processes = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The name of the process, in parentheses, may itself contain spaces and parentheses.
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            processes[int(folder.name)] = int(parent), state
    return processes


def _kind_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        for module, kind in (("engine_process", "engine"), ("image_worker", "images")):
            if module in command:
                return kind
        return command.replace("\0", " ")
    return ""
