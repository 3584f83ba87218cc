"""Processes of a server that are killed or hang under load; the server's shutdown.

QWENVL_TEST_KILLS sets how often the engine process is killed (default 3).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable

import httpx
import pytest
from engines import needs_compiler
from serve_invalid_requests import FLAGS
from serve_load import HealthPoller, Load, Reply, ask
from serve_process import TIMEOUT, ServerProcess, alive, checked_records, metrics, wait_until, wait_until_idle
from serve_questions import Question, questions

from paddlemix_qwenvl_plugin import QwenVL

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has"),
]

KILLS = int(os.environ.get("QWENVL_TEST_KILLS", 3))


@pytest.fixture(scope="module")
def known_questions(local_model: QwenVL) -> list[Question]:
    """Questions with their expected answers."""
    return questions(local_model, 25, seed=2)


@pytest.fixture(scope="module")
def long_question(known_questions: list[Question]) -> Question:
    """Question with an answer of 1500 tokens, without the expected text."""
    question = known_questions[0]  # a chat: which question is the first depends on the seed
    body = {name: question.body[name] for name in ("model", "messages")}
    return Question(question.path, {**body, "min_tokens": 1500, "max_tokens": 1500})


async def ask_all(url: str, questions: list[Question]) -> list[Reply]:
    """Send all questions concurrently."""
    # Without verify=False httpx reads a file of CA certificates, which takes longer than a request.
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, verify=False) as http:
        return list(await asyncio.gather(*(ask(http, question, stream=True) for question in questions)))


async def wait_until_running(url: str, n: int) -> None:
    """Wait until this number of completions is running."""
    end = time.monotonic() + TIMEOUT
    async with httpx.AsyncClient(timeout=TIMEOUT, verify=False) as http:
        while f"\nqwenvl_engine_running {n}.0\n" not in (await http.get(f"{url}/metrics")).text:
            assert time.monotonic() < end, f"timeout: not {n} running completions"
            await asyncio.sleep(0.02)


async def wait_until_refused(url: str) -> None:
    """Wait until the server refuses connections."""
    async with httpx.AsyncClient(timeout=TIMEOUT, verify=False) as http:
        with contextlib.suppress(httpx.TransportError):
            while True:
                await http.get(f"{url}/health/live")


def test_engine_killed_under_load(
    serve_demo: Callable[..., ServerProcess],
    known_questions: list[Question],
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = serve_demo(*FLAGS)  # for the invalid requests, some of which the clients of Load send
    url = server.wait_until_ready()
    load = Load(url, known_questions, allow_errors=True)
    killed_pids: list[int] = []
    recovery_seconds: list[float] = []

    async def kill_engines(http: httpx.AsyncClient) -> None:
        for n in range(KILLS):
            answered = load.tally.answered
            while load.tally.answered < answered + 10:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.02 * n)  # each kill meets the requests in another state
            pid = server.engine_pid()
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            start = time.monotonic()
            while server.engine_pid() in (pid, None) or (await http.get("/health/ready")).status_code != 200:
                await asyncio.sleep(0.01)
            killed_pids.append(pid)
            recovery_seconds.append(time.monotonic() - start)

    async def run() -> HealthPoller:
        async with (
            httpx.AsyncClient(base_url=url, timeout=TIMEOUT, verify=False) as http,
            HealthPoller(url) as poller,
        ):
            killing = asyncio.ensure_future(kill_engines(http))
            await load.run(12, lambda: not killing.done())
            await killing
        return poller

    poller = asyncio.run(run())
    tally = load.tally
    with capsys.disabled():
        print(
            f"\nready again after {', '.join(f'{seconds:.1f}' for seconds in recovery_seconds)} s;", end=" "
        )
        print(f"{tally.requests} requests, {tally.answered} answers, {dict(tally.errors)};", end=" ")
        print(f"/health/live within {poller.max_seconds:.2f} s")
    assert tally.failures == []
    assert poller.failures == []
    assert max(recovery_seconds) < 60  # about 5 s on an idle machine
    assert tally.errors
    assert {error.partition(" ")[2] for error in tally.errors} == {"engine_unavailable"}
    replies = asyncio.run(ask_all(url, known_questions))
    assert wrong_replies(replies, known_questions) == []
    wait_until_idle(url)
    assert metrics(url)["qwenvl_engine_restarts_total"] == KILLS
    assert len(set(killed_pids)) == KILLS
    assert [pid for pid in killed_pids if alive(pid)] == []
    server.send_signal(signal.SIGTERM)
    code, log = server.wait_for_exit()
    assert code == 0
    records = checked_records(log)
    assert sum("was killed (SIGKILL)" in record["event"] for record in records) == KILLS


def test_requests_time_out_while_the_engine_hangs(
    serve_demo: Callable[..., ServerProcess], known_questions: list[Question], long_question: Question
) -> None:
    """The engine process is suspended (SIGSTOP) while four requests run; four more requests wait."""
    server = serve_demo("--max_running", 4, "--running_timeout", 8, "--waiting_timeout", 3)
    url = server.wait_until_ready()

    async def run() -> tuple[HealthPoller, list[Reply]]:
        async with HealthPoller(url) as poller:
            running = asyncio.ensure_future(ask_all(url, [long_question] * 4))
            await wait_until_running(url, 4)
            pid = server.engine_pid()
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            try:
                waiting_replies = await ask_all(url, [long_question] * 4)
                running_replies = await running
            finally:
                os.kill(pid, signal.SIGCONT)
        return poller, [*running_replies, *waiting_replies]

    poller, replies = asyncio.run(run())
    errors = [(reply.status, reply.error and reply.error["code"]) for reply in replies]
    assert errors == [(200, "timeout")] * 4 + [(503, "waiting_timeout")] * 4
    assert poller.failures == []
    wait_until_idle(url)
    assert metrics(url)["qwenvl_engine_restarts_total"] == 0
    # Four completions, as many as --max_running, so that no request waits.
    single_choice = [question for question in known_questions if question.body.get("n", 1) == 1][:4]
    assert len(single_choice) == 4
    assert wrong_replies(asyncio.run(ask_all(url, single_choice)), single_choice) == []
    server.send_signal(signal.SIGTERM)
    code, log = server.wait_for_exit()
    assert code == 0
    checked_records(log)


def test_shutdown_under_load(
    serve_demo: Callable[..., ServerProcess], known_questions: list[Question], long_question: Question
) -> None:
    """After SIGTERM running requests finish, new requests are refused, and all processes exit."""
    server = serve_demo("--shutdown_timeout", 300)
    url = server.wait_until_ready()

    async def run() -> list[Reply]:
        asking = asyncio.ensure_future(ask_all(url, [*known_questions, long_question]))
        await wait_until_running(url, 1)
        server.send_signal(signal.SIGTERM)
        await wait_until_refused(url)
        return await asking

    first_replies = asyncio.run(ask_all(url, known_questions[:3]))
    assert wrong_replies(first_replies, known_questions[:3]) == []
    wait_until_idle(url)  # the engine's metrics may still count one of these completions as running
    children = server.children()
    assert set(children.values()) == {"engine", "images"}
    replies = asyncio.run(run())
    # Requests on connections that the server accepted only after SIGTERM may be refused, but not the running one.
    refused = [reply for reply in replies if reply.error and reply.error["code"] == "shutting_down"]
    assert len(refused) < len(replies)
    *known_replies, long_reply = replies
    assert [reply for reply in wrong_replies(known_replies, known_questions) if reply not in refused] == []
    assert long_reply in refused or (long_reply.complete and long_reply.finish_reasons == ["length"])
    code, log = server.wait_for_exit()
    assert code == 0, log
    assert [pid for pid in children if alive(pid)] == []
    checked_records(log)


@pytest.mark.parametrize("under_load", [False, True])
def test_child_processes_exit_when_the_front_is_killed(
    serve_demo: Callable[..., ServerProcess],
    known_questions: list[Question],
    long_question: Question,
    under_load: bool,
) -> None:
    """Under load, or while the engine process starts."""
    server = serve_demo()
    if under_load:
        url = server.wait_until_ready()

        async def run() -> dict[int, str]:
            await ask_all(url, known_questions[:2])
            asking = asyncio.ensure_future(ask_all(url, [long_question] * 8))
            await wait_until_running(url, 8)
            children = server.children()
            server.send_signal(signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                await asking
            return children

        children = asyncio.run(run())
        assert set(children.values()) == {"engine", "images"}
    else:
        wait_until(lambda: server.engine_pid() is not None)
        children = server.children()
        server.send_signal(signal.SIGKILL)
    server.wait_for_exit()
    wait_until(lambda: not any(map(alive, children)))


def test_killed_image_process_is_replaced(
    serve_demo: Callable[..., ServerProcess], local_model: QwenVL
) -> None:
    server = serve_demo("--image_workers", 1)
    url = server.wait_until_ready()
    with_image = [
        question for question in questions(local_model, 40, seed=3) if "data:image" in str(question.body)
    ]
    # Two questions about different images: a cached image would not need the image process. The image comes first in
    # a body, so that 3000 characters distinguish the images.
    by_image = {str(question.body)[:3000]: question for question in with_image}
    first, second = list(by_image.values())[:2]
    assert wrong_replies(asyncio.run(ask_all(url, [first])), [first]) == []
    (killed_pid,) = image_pids(server)
    os.kill(killed_pid, signal.SIGKILL)
    wait_until(lambda: killed_pid not in server.children())
    assert wrong_replies(asyncio.run(ask_all(url, [second])), [second]) == []
    (new_pid,) = image_pids(server)
    assert new_pid != killed_pid


def image_pids(server: ServerProcess) -> list[int]:
    return [pid for pid, kind in server.children().items() if kind == "images"]


def wrong_replies(replies: list[Reply], questions: list[Question]) -> list[Reply]:
    """The replies that differ from the expected answers."""
    assert len(replies) == len(questions)
    return [reply for reply, question in zip(replies, questions) if not reply.is_answer_to(question)]
