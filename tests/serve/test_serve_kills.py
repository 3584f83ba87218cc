"""Processes of a server killed or hanging under load, and its shutdown. QWENVL_TEST_KILLS: number of kills (3)."""

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
from serve_load import Load, Pulse, Reply, ask
from serve_process import PATIENCE, ServerProcess, alive, metrics, sound_log, wait_until, wait_until_idle
from serve_questions import Question, questions

from paddlemix_qwenvl_plugin import QwenVL

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, which only Linux has"),
]

KILLS = int(os.environ.get("QWENVL_TEST_KILLS", 3))


@pytest.fixture(scope="module")
def asked(local_model: QwenVL) -> list[Question]:
    return questions(local_model, 25, seed=2)


@pytest.fixture(scope="module")
def long(asked: list[Question]) -> Question:
    """Question with a long answer, which is cancelled, or awaited without a comparison."""
    body = {name: asked[0].body[name] for name in ("model", "messages")}
    return Question(asked[0].path, {**body, "min_tokens": 1500, "max_tokens": 1500})


async def ask_each(url: str, asked: list[Question]) -> list[Reply]:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, verify=False) as http:
        return list(await asyncio.gather(*(ask(http, each, stream=True) for each in asked)))


async def begun(url: str, n: int) -> None:
    """Wait until this number of completions is running."""
    end = time.monotonic() + PATIENCE
    async with httpx.AsyncClient(timeout=PATIENCE, verify=False) as http:
        while f"\nqwenvl_engine_running {n}.0\n" not in (await http.get(f"{url}/metrics")).text:
            assert time.monotonic() < end, f"{n} completions never run at once"
            await asyncio.sleep(0.02)


async def refused(url: str) -> None:
    """Wait until connections are refused."""
    async with httpx.AsyncClient(timeout=PATIENCE, verify=False) as http:
        with contextlib.suppress(httpx.TransportError):
            while True:
                await http.get(f"{url}/health/live")


def test_the_engine_killed_under_load(
    serve_demo: Callable[..., ServerProcess], asked: list[Question], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve_demo(*FLAGS)
    url = server.ready()
    load = Load(url, asked, forgiving=True)
    engines: list[int] = []
    seconds: list[float] = []

    async def kill(http: httpx.AsyncClient) -> None:
        for n in range(KILLS):
            answered = load.tally.answered
            while load.tally.answered < answered + 10:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.02 * n)  # at another point of the requests' way each time
            engine = server.engine()
            assert engine is not None
            os.kill(engine, signal.SIGKILL)
            start = time.monotonic()
            while server.engine() in (engine, None) or (await http.get("/health/ready")).status_code != 200:
                await asyncio.sleep(0.01)
            engines.append(engine)
            seconds.append(time.monotonic() - start)

    async def run() -> Pulse:
        async with (
            httpx.AsyncClient(base_url=url, timeout=PATIENCE, verify=False) as http,
            Pulse(url) as pulse,
        ):
            killing = asyncio.ensure_future(kill(http))
            await load.run(12, lambda: not killing.done())
            await killing
        return pulse

    pulse = asyncio.run(run())
    tally = load.tally
    with capsys.disabled():
        print(f"\nready again after {', '.join(f'{each:.1f}' for each in seconds)} s;", end=" ")
        print(f"{tally.requests} requests, {tally.answered} answers, {dict(tally.errors)};", end=" ")
        print(f"alive within {pulse.late:.2f} s")
    assert tally.wrong == []
    assert pulse.wrong == []
    assert max(seconds) < 60  # 5 on a quiet machine
    assert tally.errors
    assert {error.partition(" ")[2] for error in tally.errors} == {"engine_unavailable"}
    replies = asyncio.run(ask_each(url, asked))
    assert [reply for reply, question in zip(replies, asked) if not reply.answers(question)] == []
    wait_until_idle(url)
    assert metrics(url)["qwenvl_engine_restarts_total"] == KILLS
    assert len(set(engines)) == KILLS
    assert [pid for pid in engines if alive(pid)] == []
    server.send(signal.SIGTERM)
    code, log = server.end()
    assert code == 0
    records = sound_log(log)
    assert sum("was killed (SIGKILL)" in record["event"] for record in records) == KILLS


def test_an_engine_that_hangs(
    serve_demo: Callable[..., ServerProcess], asked: list[Question], long: Question
) -> None:
    """Waiting and running requests time out."""
    limits = ("--max_running", 4, "--running_timeout", 8, "--waiting_timeout", 3)
    server = serve_demo(*limits)
    url = server.ready()

    async def run() -> tuple[Pulse, list[Reply]]:
        async with Pulse(url) as pulse:
            asking = asyncio.ensure_future(ask_each(url, [long] * 4))
            await begun(url, 4)
            engine = server.engine()
            assert engine is not None
            os.kill(engine, signal.SIGSTOP)
            try:
                waiting = await ask_each(url, [long] * 4)
                running = await asking
            finally:
                os.kill(engine, signal.SIGCONT)
        return pulse, [*running, *waiting]

    pulse, replies = asyncio.run(run())
    errors = [(reply.status, reply.error and reply.error["code"]) for reply in replies]
    assert errors == [(200, "timeout")] * 4 + [(503, "waiting_timeout")] * 4
    assert pulse.wrong == []
    wait_until_idle(url)
    assert metrics(url)["qwenvl_engine_restarts_total"] == 0
    short = [question for question in asked if question.body.get("n", 1) == 1][:4]
    assert [reply.answers(q) for reply, q in zip(asyncio.run(ask_each(url, short)), short)] == [True] * 4
    server.send(signal.SIGTERM)
    code, log = server.end()
    assert code == 0
    sound_log(log)


def test_the_end_under_load(
    serve_demo: Callable[..., ServerProcess], asked: list[Question], long: Question
) -> None:
    """SIGTERM: running requests finish, new ones are refused, no process is left."""
    server = serve_demo("--shutdown_timeout", 300)
    url = server.ready()

    async def run() -> list[Reply]:
        asking = asyncio.ensure_future(ask_each(url, [*asked, long]))
        await begun(url, 1)
        server.send(signal.SIGTERM)
        await refused(url)
        return await asking

    begin = asyncio.run(ask_each(url, asked[:3]))
    assert all(reply.answers(question) for reply, question in zip(begin, asked))
    below = server.children()
    assert sorted(below.values())[0] == "engine"
    *replies, last = asyncio.run(run())
    # A connection that was not yet taken may be refused.
    late = [reply for reply in replies if reply.error and reply.error["code"] == "shutting_down"]
    wrong = [r for r, q in zip(replies, asked) if r not in late and not r.answers(q)]
    assert wrong == []
    assert last in late or (last.whole and last.reasons == ["length"])
    assert len(late) < len(replies)
    code, log = server.end()
    assert code == 0, log
    assert [pid for pid in below if alive(pid)] == []
    sound_log(log)


@pytest.mark.parametrize("loaded", [False, True])
def test_no_orphan_survives_the_front(
    serve_demo: Callable[..., ServerProcess], asked: list[Question], long: Question, loaded: bool
) -> None:
    server = serve_demo()
    if loaded:
        url = server.ready()

        async def run() -> dict[int, str]:
            await ask_each(url, asked[:2])
            asking = asyncio.ensure_future(ask_each(url, [long] * 8))
            await begun(url, 8)
            below = server.children()
            server.send(signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                await asking
            return below

        below = asyncio.run(run())
        assert set(below.values()) == {"engine", "images"}
    else:
        wait_until(lambda: server.engine() is not None)
        below = server.children()
        server.send(signal.SIGKILL)
    server.end()
    wait_until(lambda: not any(map(alive, below)))


def test_a_process_for_images_that_is_killed(
    serve_demo: Callable[..., ServerProcess], local_model: QwenVL
) -> None:
    """Another one decodes the next image."""
    server = serve_demo("--image_workers", 1)
    url = server.ready()
    with_image = [q for q in questions(local_model, 40, seed=3) if "data:image" in str(q.body)]
    kinds = {str(question.body)[:3000]: question for question in with_image}  # of other images
    first, second = list(kinds.values())[:2]
    assert [reply.answers(first) for reply in asyncio.run(ask_each(url, [first]))] == [True]
    (killed,) = (pid for pid, what in server.children().items() if what == "images")
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: killed not in server.children())
    assert [reply.answers(second) for reply in asyncio.run(ask_each(url, [second]))] == [True]
    (other,) = (pid for pid, what in server.children().items() if what == "images")
    assert other != killed
