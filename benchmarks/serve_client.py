"""Load generator for an OpenAI-compatible server: HTTP/1.1 and event streams over plain sockets.

serve_targets.py runs it as a separate process. It reads a JSON object from standard input and writes one to standard
output: the CPU time of the run in seconds, without parsing (`client_cpu`), and a report of each response (`responses`,
see parse), grouped by client if `clients` is given. To take little CPU time from the server, which runs on the same
machine, it only records the time and bytes of each read during the run, and parses them when all requests have ended.

Input:
    port, path: of the server's endpoint for completions; events of chat completions are not parsed.
    body: the keys that all request bodies have; `stream` must be true.
    bodies: the further keys of each request body, one object per request.
    clients: number of concurrent clients (closed loop); or
    rate, seed: mean number of requests per second, and seed of their random times (open loop).
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

_END = b"\r\n0\r\n\r\n"  # end of a chunked body; events cannot contain it, because JSON is sent without line breaks
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class RawResponse(NamedTuple):
    """Raw response: time of the request, (time in seconds, bytes) of each read, and the error, if any."""

    start: float
    reads: list[tuple[float, bytes]]
    error: Optional[str]


class Connection(asyncio.Protocol):
    """Connection of one request; the result of `done` is None, or an error."""

    def __init__(self) -> None:
        self.reads: list[tuple[float, bytes]] = []
        self.done: asyncio.Future[Optional[str]] = asyncio.get_running_loop().create_future()
        self._tail = b""
        self._remaining: Optional[int] = None  # bytes still missing, if the response is not chunked

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.reads:
            headers, _, body = data.partition(b"\r\n\r\n")  # servers send the headers in one write
            length = _LENGTH.search(headers)
            self._remaining = int(length.group(1)) - len(body) if length else None
        elif self._remaining is not None:
            self._remaining -= len(data)
        self.reads.append((now, data))
        self._tail = (self._tail + data)[-len(_END) :]
        if self._tail == _END or self._remaining == 0:
            self._finish(None)

    def connection_lost(self, error: Optional[Exception]) -> None:
        self._finish(f"connection closed: {error}")

    def _finish(self, error: Optional[str]) -> None:
        if not self.done.done():
            self.done.set_result(error)


async def send(port: int, request: bytes) -> RawResponse:
    start = time.perf_counter()
    try:
        transport, connection = await asyncio.get_running_loop().create_connection(
            Connection, "127.0.0.1", port
        )
    except OSError as error:
        return RawResponse(start, [], str(error))
    transport.write(request)
    error = await connection.done
    transport.close()
    return RawResponse(start, connection.reads, error)


async def closed_loop(port: int, requests: list[bytes], clients: int) -> list[RawResponse]:
    """Run `clients` clients, each of which sends its next request after the previous response."""
    queue = iter(requests)  # shared by the clients

    async def client() -> list[RawResponse]:
        return [await send(port, request) for request in queue]

    responses_by_client = await asyncio.gather(*(client() for _ in range(clients)))
    return [response for responses in responses_by_client for response in responses]


async def open_loop(port: int, requests: list[bytes], rate: float, seed: int) -> list[RawResponse]:
    """Send requests at random times, `rate` per second on average, independent of the responses."""
    rng = random.Random(seed)
    tasks, due = [], time.perf_counter()
    for request in requests:
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(send(port, request)))
    return await asyncio.gather(*tasks)


def parse(response: RawResponse) -> dict[str, Any]:
    """Parse a response; return a report of it.

    `start` and `end` are the times of the request and of the last read, by time.perf_counter; `times` are those of the
    events with text, in seconds after `start`; `finish` (finish reason) and `usage` are as sent by the server, and
    `error` is the server's error, shortened, or None. If the connection failed, `error` is the reason, and `end` is
    absent.
    """
    report: dict[str, Any] = {"start": response.start, "times": [], "error": response.error, "finish": None}
    if response.error is not None:
        return report
    raw = b"".join(data for _, data in response.reads)
    headers, _, body = raw.partition(b"\r\n\r\n")
    report["end"] = response.reads[-1][0]
    status = headers.split(b" ", 2)[1]
    if status != b"200":
        report["error"] = f"{status.decode()} {body[:300].decode(errors='replace')}"
        return report
    for seconds, event in _events(response.reads, len(headers) + 4, raw):
        if event == b"[DONE]":
            continue
        content = json.loads(event)
        if "error" in content:
            report["error"] = json.dumps(content["error"])[:300]
        for choice in content.get("choices", ()):
            if choice.get("text"):
                report["times"].append(seconds - response.start)
            report["finish"] = choice.get("finish_reason") or report["finish"]
        if content.get("usage"):
            report["usage"] = content["usage"]
    return report


def _events(reads: list[tuple[float, bytes]], position: int, raw: bytes) -> Iterator[tuple[float, bytes]]:
    """Yield (time, data) of each event in a chunked body; the time is that of the read with the end of its chunk.

    Args:
        position: position of the body in `raw`, the bytes of all reads.
    """
    read_ends, total = [], 0  # (position after the read, time of the read)
    for seconds, data in reads:
        total += len(data)
        read_ends.append((total, seconds))
    remaining_reads = iter(read_ends)
    read_end, seconds = next(remaining_reads)
    partial_event = b""
    while True:
        # A chunk: its length in hexadecimal digits, optional extensions after ";", a line break, data, a line break.
        line_end = raw.index(b"\r\n", position)
        length = int(raw[position:line_end].partition(b";")[0], 16)
        if not length:
            return
        chunk_begin, chunk_end = line_end + 2, line_end + 2 + length
        while read_end < chunk_end:
            read_end, seconds = next(remaining_reads)
        position = chunk_end + 2
        text = partial_event + raw[chunk_begin:chunk_end]
        *events, partial_event = text.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
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
    begin = time.process_time()
    responses = asyncio.run(run)
    client_cpu = time.process_time() - begin
    json.dump(
        {"client_cpu": client_cpu, "responses": [parse(response) for response in responses]}, sys.stdout
    )


if __name__ == "__main__":
    main()
