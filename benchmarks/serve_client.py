"""Load generator for an OpenAI-compatible server: HTTP/1.1 and event streams over plain sockets.

Reads a JSON object from standard input and writes one to standard output; serve.py runs it as a separate process.
During the run it only records the time and bytes of each read, and parses them when all requests have ended, so that
the client takes as little CPU time as possible from a server on the same machine. The report contains that time.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

_END = b"\r\n0\r\n\r\n"  # end of a chunked body; JSON has no line ends, so no event contains it
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Received(NamedTuple):
    """Raw response: time in seconds and bytes of each read, and the error, if any."""

    start: float
    reads: list[tuple[float, bytes]]
    error: Optional[str]


class Connection(asyncio.Protocol):
    """Connection of one request."""

    def __init__(self) -> None:
        self.reads: list[tuple[float, bytes]] = []
        self.done: asyncio.Future[Optional[str]] = asyncio.get_running_loop().create_future()
        self._tail = b""
        self._left: Optional[int] = None  # remaining bytes of a response that is not chunked

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.reads:
            head, _, body = data.partition(b"\r\n\r\n")  # servers send the head in one write
            length = _LENGTH.search(head)
            self._left = int(length.group(1)) - len(body) if length else None
        elif self._left is not None:
            self._left -= len(data)
        self.reads.append((now, data))
        self._tail = (self._tail + data)[-len(_END) :]
        if self._tail == _END or self._left == 0:
            self._finish(None)

    def connection_lost(self, error: Optional[Exception]) -> None:
        self._finish(f"connection closed: {error}")

    def _finish(self, error: Optional[str]) -> None:
        if not self.done.done():
            self.done.set_result(error)


async def ask(port: int, request: bytes) -> Received:
    start = time.perf_counter()
    try:
        transport, connection = await asyncio.get_running_loop().create_connection(
            Connection, "127.0.0.1", port
        )
    except OSError as error:
        return Received(start, [], str(error))
    transport.write(request)
    error = await connection.done
    transport.close()
    return Received(start, connection.reads, error)


async def closed_loop(port: int, requests: list[bytes], clients: int) -> list[Received]:
    """Run `clients` clients, each of which sends its next request after the previous response."""
    waiting = iter(requests)

    async def client() -> list[Received]:
        return [await ask(port, request) for request in waiting]

    return [
        answer for answers in await asyncio.gather(*(client() for _ in range(clients))) for answer in answers
    ]


async def open_loop(port: int, requests: list[bytes], rate: float, seed: int) -> list[Received]:
    """Send requests at random times, `rate` per second, independent of the responses."""
    pauses = random.Random(seed)
    tasks, due = [], time.perf_counter()
    for request in requests:
        due += pauses.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(port, request)))
    return await asyncio.gather(*tasks)


def read(answer: Received) -> dict[str, Any]:
    """Parse a response: time of each event with text, in seconds since the request, and how it ended."""
    report: dict[str, Any] = {"start": answer.start, "times": [], "error": answer.error, "finish": None}
    if answer.error is not None:
        return report
    raw = b"".join(data for _, data in answer.reads)
    head, _, body = raw.partition(b"\r\n\r\n")
    report["end"] = answer.reads[-1][0]
    if head.split(b" ", 2)[1] != b"200":
        report["error"] = f"{head.split()[1].decode()} {body[:300].decode(errors='replace')}"
        return report
    for seconds, event in _events(answer.reads, len(head) + 4, raw):
        if event == b"[DONE]":
            continue
        content = json.loads(event)
        if "error" in content:
            report["error"] = json.dumps(content["error"])[:300]
        for choice in content.get("choices", ()):
            if choice.get("text"):
                report["times"].append(seconds - answer.start)
            report["finish"] = choice.get("finish_reason") or report["finish"]
        if content.get("usage"):
            report["usage"] = content["usage"]
    return report


def _events(reads: list[tuple[float, bytes]], position: int, raw: bytes) -> Iterator[tuple[float, bytes]]:
    """Yield (time of the last byte, data) of each event."""
    ends, total = [], 0
    for seconds, data in reads:
        total += len(data)
        ends.append((total, seconds))
    came = iter(ends)
    end, seconds = next(came)
    held = b""
    while True:
        line_end = raw.index(b"\r\n", position)
        length = int(raw[position:line_end].partition(b";")[0], 16)
        if not length:
            return
        held += raw[line_end + 2 : line_end + 2 + length]
        while end < line_end + 2 + length:
            end, seconds = next(came)
        position = line_end + 2 + length + 2
        *whole, held = held.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield seconds, line[5:].strip()


def main() -> None:
    task = json.load(sys.stdin)
    requests = []
    for body in task["bodies"]:
        content = json.dumps({**task["body"], **body}).encode()
        head = (
            f"POST {task['path']} HTTP/1.1\r\nHost: 127.0.0.1:{task['port']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        requests.append(head.encode() + content)
    if "rate" in task:
        run = open_loop(task["port"], requests, task["rate"], task["seed"])
    else:
        run = closed_loop(task["port"], requests, task["clients"])
    before = time.process_time()
    answers = asyncio.run(run)
    used = time.process_time() - before
    json.dump({"client_cpu": used, "answers": [read(answer) for answer in answers]}, sys.stdout)


if __name__ == "__main__":
    main()
