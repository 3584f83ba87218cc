"""Soak test with concurrent clients, some of which disconnect or send invalid requests.

QWENVL_TEST_SOAK_CLIENTS and QWENVL_TEST_SOAK_SECONDS or QWENVL_TEST_SOAK_REQUESTS make it longer: 64 clients for 600 s,
or 10000 requests.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable

import httpx
import pytest
from engines import needs_compiler
from serve_invalid_requests import FLAGS, INVALID_REQUESTS
from serve_load import Load, Pulse
from serve_process import ServerProcess, alive, metrics, sound_log, wait_until_idle
from serve_questions import questions

from paddlemix_qwenvl_plugin import QwenVL

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, which only Linux has"),
]

CLIENTS = int(os.environ.get("QWENVL_TEST_SOAK_CLIENTS", 16))
REQUESTS = int(os.environ.get("QWENVL_TEST_SOAK_REQUESTS", 0))
SECONDS = float(os.environ.get("QWENVL_TEST_SOAK_SECONDS", 15))

# What a process may grow by after it has warmed up: fragments of the heap, not a little for each request.
GROWTH = 48 * 2**20
WARM_UP = 0.4  # of the run


def test_each_invalid_request_has_its_error(serve_demo: Callable[..., ServerProcess]) -> None:
    url = serve_demo(*FLAGS).ready()

    async def send_all() -> list[str | None]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            return await asyncio.gather(*(request.send(http) for request in INVALID_REQUESTS))

    problems = {
        each.name: problem for each, problem in zip(INVALID_REQUESTS, asyncio.run(send_all())) if problem
    }
    assert problems == {}


def test_answers_under_load_are_those_alone(
    serve_demo: Callable[..., ServerProcess], local_model: QwenVL, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = questions(local_model, 200 if SECONDS > 60 or REQUESTS else 40)
    assert len({text for each in asked for text in each.texts}) > len(asked) // 2
    server = serve_demo(*FLAGS)
    url = server.ready()
    load = Load(url, asked)
    start = time.monotonic()
    memory: list[dict[str, int]] = []

    def progress() -> float:
        return load.tally.requests / REQUESTS if REQUESTS else (time.monotonic() - start) / SECONDS

    async def watch() -> None:
        while progress() < 1:
            if len(memory) < 50 * progress():
                memory.append(server.memory())
            await asyncio.sleep(0.1)

    async def run() -> Pulse:
        async with Pulse(url) as pulse:
            await asyncio.gather(watch(), load.run(CLIENTS, lambda: progress() < 1))
        return pulse

    pulse = asyncio.run(run())
    seconds = time.monotonic() - start
    wait_until_idle(url)
    memory.append(server.memory())
    figures = metrics(url)
    below = server.children()
    server.send(signal.SIGTERM)
    code, log = server.end()
    tally = load.tally
    with capsys.disabled():
        print(f"\n{tally.requests} requests of {CLIENTS} clients in {seconds:.0f} s:", end=" ")
        print(
            f"{tally.answered} answers, {tally.hung_up} hung up, {sum(tally.invalid.values())} invalid,",
            end=" ",
        )
        print(f"{len(tally.wrong)} wrong; {figures['qwenvl_completion_tokens_total']:.0f} tokens,", end=" ")
        print(f"alive within {pulse.late:.2f} s")
        print(*tally.wrong[:10], sep="\n", end="")
        for each in (memory[0], memory[int(WARM_UP * len(memory))], memory[-1]):
            print({what: f"{value / 2**20:.0f} MiB" for what, value in each.items()})
    assert tally.wrong == []
    assert pulse.wrong == []
    assert tally.answered > 0
    assert tally.hung_up > 0
    assert tally.invalid
    assert figures["qwenvl_engine_restarts_total"] == 0
    assert figures["qwenvl_cached_prompt_tokens_total"] > 0
    warm = memory[int(WARM_UP * len(memory))]
    for what, value in memory[-1].items():
        assert value - warm[what] < GROWTH, f"{what}: {[each.get(what) for each in memory]}"
    assert code == 0
    assert [pid for pid in below if alive(pid)] == []
    records = sound_log(log)
    problems = {record["event"] for record in records if record["level"] in ("warning", "error")}
    assert problems <= {"Invalid HTTP request received."}  # of the request that is not HTTP
    paths = [record["path"] for record in records if record["event"] == "request"]
    assert len(paths) >= tally.answered
    assert json.dumps(asked[0].body)[:80] not in log
