"""Each invalid request once, and a soak test with clients that sometimes disconnect early or send such a request.

QWENVL_TEST_SOAK_CLIENTS sets the number of clients (default 16). The load lasts QWENVL_TEST_SOAK_SECONDS (default 15);
if QWENVL_TEST_SOAK_REQUESTS is set, it lasts for this number of requests instead. Examples of a long test: 64 clients
for 600 s, or 64 clients with 10000 requests.
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
from serve_load import HealthPoller, Load
from serve_process import ServerProcess, alive, checked_records, metrics, wait_until_idle
from serve_questions import questions

from paddlemix_qwenvl_plugin import QwenVL

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has"),
]

CLIENTS = int(os.environ.get("QWENVL_TEST_SOAK_CLIENTS", 16))
REQUESTS = int(os.environ.get("QWENVL_TEST_SOAK_REQUESTS", 0))  # 0: SECONDS decides
SECONDS = float(os.environ.get("QWENVL_TEST_SOAK_SECONDS", 15))

# Maximum growth of the memory of the processes of a kind after warm-up, in bytes. It allows fragmentation of the heap,
# but no leak per request.
MAX_GROWTH = 48 * 2**20
WARM_UP = 0.4  # fraction of the run


def test_each_invalid_request_gets_the_expected_error(serve_demo: Callable[..., ServerProcess]) -> None:
    url = serve_demo(*FLAGS).wait_until_ready()

    async def send_all() -> list[str | None]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            return await asyncio.gather(*(request.send(http) for request in INVALID_REQUESTS))

    problems = zip(INVALID_REQUESTS, asyncio.run(send_all()))
    assert {request.name: problem for request, problem in problems if problem is not None} == {}


def test_answers_under_load_equal_those_without_a_server(
    serve_demo: Callable[..., ServerProcess], local_model: QwenVL, capsys: pytest.CaptureFixture[str]
) -> None:
    known_questions = questions(local_model, 200 if SECONDS > 60 or REQUESTS else 40)
    # With many equal answers, an exchange of two answers could remain unnoticed.
    distinct_texts = {text for question in known_questions for text in question.texts}
    assert len(distinct_texts) > len(known_questions) // 2
    server = serve_demo(*FLAGS)
    url = server.wait_until_ready()
    load = Load(url, known_questions)
    start = time.monotonic()
    memory: list[dict[str, int]] = []

    def progress() -> float:
        """The fraction of the run so far."""
        return load.tally.requests / REQUESTS if REQUESTS else (time.monotonic() - start) / SECONDS

    async def record_memory() -> None:
        while progress() < 1:
            if len(memory) < 50 * progress():  # at most 50 samples
                memory.append(server.memory())
            await asyncio.sleep(0.1)

    async def run() -> HealthPoller:
        async with HealthPoller(url) as poller:
            await asyncio.gather(record_memory(), load.run(CLIENTS, lambda: progress() < 1))
        return poller

    poller = asyncio.run(run())
    seconds = time.monotonic() - start
    wait_until_idle(url)
    memory.append(server.memory())
    final_metrics = metrics(url)
    children = server.children()
    server.send_signal(signal.SIGTERM)
    code, log = server.wait_for_exit()
    tally = load.tally
    warm = memory[int(WARM_UP * len(memory))]
    with capsys.disabled():
        print(f"\n{tally.requests} requests of {CLIENTS} clients in {seconds:.0f} s:", end=" ")
        print(
            f"{tally.answered} answers, {tally.disconnected} disconnected, {sum(tally.invalid.values())} invalid,",
            end=" ",
        )
        print(
            f"{len(tally.failures)} failures; {final_metrics['qwenvl_completion_tokens_total']:.0f} tokens,",
            end=" ",
        )
        print(f"/health/live within {poller.max_seconds:.2f} s")
        print(*tally.failures[:10], sep="\n", end="")
        for sample in (memory[0], warm, memory[-1]):
            print({kind: f"{n_bytes / 2**20:.0f} MiB" for kind, n_bytes in sample.items()})
    assert tally.failures == []
    assert poller.failures == []
    assert tally.answered > 0
    assert tally.disconnected > 0
    assert tally.invalid
    assert final_metrics["qwenvl_engine_restarts_total"] == 0
    assert final_metrics["qwenvl_cached_prompt_tokens_total"] > 0
    for kind, n_bytes in memory[-1].items():
        assert n_bytes - warm[kind] < MAX_GROWTH, f"{kind}: {[sample.get(kind) for sample in memory]}"
    assert code == 0
    assert [pid for pid in children if alive(pid)] == []
    records = checked_records(log)
    problems = {record["event"] for record in records if record["level"] in ("warning", "error")}
    assert problems <= {"Invalid HTTP request received."}  # uvicorn's, for the request that is not HTTP
    paths = [record["path"] for record in records if record["event"] == "request"]
    assert len(paths) >= tally.answered
    assert json.dumps(known_questions[0].body)[:80] not in log  # prompts are not logged
