"""`qwenvl serve --ray` on three local nodes, compared with the model in this process."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")

from cluster_serve_helpers import (
    NAME,
    PATIENCE,
    REPO,
    Client,
    Command,
    data_url,
    engine_pids,
    free_port,
    local_cluster,
    wait_until,
)

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.demo.questions import QUESTIONS
from paddlemix_qwenvl_plugin.serve.demo_model import demo_stages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

N_ENGINES, N_CLIENTS = 3, 32
KEYS = ("key-a", "key-b", "key-c")
# 48 slots: enough for all clients and for the slots of a killed front until its loss is detected.
MAX_RUNNING, MAX_WAITING, MAX_PER_KEY = 16, 24, 60
LONG = "Tell me a long story about two squares and a dog."


class Service(NamedTuple):
    """Running service: cluster, flags, commands, a client per key, and the model in this process as reference."""

    cluster: Any
    flags: list[object]
    commands: list[Command]
    clients: list[Client]
    alone: QwenVL


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    folder = Path(tempfile.mkdtemp(prefix="qr"))  # short: the paths of sockets are limited
    (folder / "keys").write_text("\n".join(KEYS))
    (folder / "keys").chmod(0o600)
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(REPO))
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_TMPDIR", str(folder))
    patch.setenv("RAY_prestart_worker_first_driver", "0")  # unused workers take seconds to start
    # Ray Serve restarts a proxy that is not ready after 5 s, which resets its connections. On two busy CPUs the start
    # of a proxy takes longer.
    patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
    commands: list[Command] = []
    try:
        alone = QwenVL.from_exported(*demo_stages(print))
        alone.load()
        with local_cluster(N_ENGINES, 2) as cluster:
            port = free_port()
            flags = ["--ray", cluster.address, "--demo", "--port", port, "--api_key_file", folder / "keys"]
            flags += ["--min_replicas", N_ENGINES, "--replica_cpus", 0.5, "--max_running", MAX_RUNNING]
            flags += ["--max_waiting", MAX_WAITING, "--max_per_key", MAX_PER_KEY]
            commands.append(Command(*flags))
            line = commands[0].wait_for("Serving")
            assert line == f"Serving on {N_ENGINES} engine replicas at http://127.0.0.1:{port}\n"
            clients = [Client(f"http://127.0.0.1:{port}", key) for key in KEYS]
            wait_until(lambda: sum(clients[0].metrics("qwenvl_engine_ready").values()) == N_ENGINES)
            yield Service(cluster, flags, commands, clients, alone)
    finally:
        for command in commands:
            command.process.kill()
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)


class Question(NamedTuple):
    messages: list[dict[str, Any]]
    parameters: dict[str, Any]
    text: str


def questions(alone: QwenVL) -> list[Question]:
    """Build questions with and without images, greedy and sampled, with the reference answers."""
    rng = random.Random(5)
    chosen = [question for question in QUESTIONS if question.sample.form == "chat"][:8]
    asked: list[Question] = []
    for number, question in enumerate(chosen):
        text = question.turn.question if number % 2 else LONG
        images = question.images if number % 3 else ()
        parts: list[dict[str, Any]] = [
            *({"type": "image_url", "image_url": {"url": data_url(path)}} for path in images),
            {"type": "text", "text": text},
        ]
        local = [*({"image": path.read_bytes()} for path in images), {"text": text}]
        options: dict[str, Any] = {}
        if number % 2:
            options = {"temperature": 1.1, "top_p": 0.95, "seed": rng.randrange(2**60)}
        answer = alone.generate(local, chat=True, max_new_tokens=60, **options)
        asked.append(
            Question([{"role": "user", "content": parts}], {"max_tokens": 60, **options}, answer.text)
        )
    return asked


class Load:
    """Load of threads, each with an `openai` client that sends one request after another.

    Every fourth thread streams. OpenAI's client retries requests, but not a stream that has begun: the thread itself
    retries when a stream breaks, which happens when the front or the proxy fails.
    """

    def __init__(self, url: str, asked: list[Question]) -> None:
        self._url = url
        self._asked = asked
        self._end = threading.Event()
        self.answered = 0
        self.broken_streams = 0
        self.problems: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=[n], daemon=True) for n in range(N_CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a request has no answer"

    def wait_for_answers(self, n: int = 2 * N_CLIENTS) -> None:
        """Wait for n more correct answers."""
        goal = self.answered + n
        wait_until(lambda: self.answered >= goal or self.problems)
        assert self.problems == []

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        http = httpx.Client(verify=False, timeout=PATIENCE)  # loading the certificates is slow
        client = openai.OpenAI(base_url=f"{self._url}/v1", api_key=KEYS[0], http_client=http)
        while not self._end.is_set():
            question = rng.choice(self._asked)
            try:
                text = self._stream(client, question) if number % 4 == 0 else self._whole(client, question)
            except Exception as error:
                self.problems.append(f"{type(error).__name__}: {error}")
            else:
                if text == question.text:
                    self.answered += 1
                else:
                    self.problems.append(f"{text!r}, expected {question.text!r}")

    def _whole(self, client: Any, question: Question) -> str:
        answer = client.chat.completions.create(model=NAME, messages=question.messages, **question.parameters)
        return str(answer.choices[0].message.content)

    def _stream(self, client: Any, question: Question) -> str:
        while True:
            chunks = client.chat.completions.create(
                model=NAME, messages=question.messages, stream=True, **question.parameters
            )
            try:
                read = list(chunks)
            except (httpx.HTTPError, openai.APIError):
                self.broken_streams += 1
                continue
            if read and read[-1].choices[0].finish_reason is None:
                self.broken_streams += 1
                continue
            return "".join(chunk.choices[0].delta.content or "" for chunk in read)


def test_interface(service: Service) -> None:
    client = service.clients[0]
    assert client.get("/health/ready").json() == {"status": "ready", "model": NAME}
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [NAME]
    assert httpx.get(f"{client.url}/v1/models").status_code == 401
    assert Client(client.url, "another-key").get("/v1/models").status_code == 401
    asked = [{"role": "user", "content": "?"}]
    response = client.chat(asked, max_tokens=5)
    assert response.json()["usage"]["completion_tokens"] <= 5
    assert len(response.headers.get_list("x-request-id")) == 1
    refused = client.chat(asked, temperature=7)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")


def test_turns_of_a_conversation_reach_the_replica_with_their_prefix(service: Service) -> None:
    client = service.clients[0]
    for number in range(8):
        text = f"Story {number}. " + LONG * 3
        messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
        n_prompt = 0
        for turn in range(3):
            reply = client.chat(messages, max_tokens=20).json()
            if turn:
                cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert cached > n_prompt - 33, (number, turn)  # at least all full blocks of the earlier turn
            n_prompt = reply["usage"]["prompt_tokens"]
            answer = reply["choices"][0]["message"]["content"]
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]


def test_limits_hold_over_all_fronts(service: Service) -> None:
    """Requests over the limit of a key or of the queue are refused; all others run or wait."""
    url = f"{service.clients[0].url}/v1/chat/completions"
    body = {"model": NAME, "messages": [{"role": "user", "content": LONG}], "max_tokens": 1500}
    body["min_tokens"] = 1500
    served = service.clients[0].metrics("qwenvl_requests_total")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    n_slots = N_ENGINES * MAX_RUNNING

    async def scenario() -> None:
        async with httpx.AsyncClient(verify=False, timeout=PATIENCE, limits=limits) as http:

            async def flood(key: str, n: int, n_refused: int, words: str) -> list[Any]:
                tasks = [
                    asyncio.ensure_future(
                        http.post(url, json=body, headers={"Authorization": f"Bearer {key}"})
                    )
                    for _ in range(n)
                ]
                while sum(task.done() for task in tasks) < n_refused:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(0.5)
                replies = [task.result() for task in tasks if task.done()]
                assert len(replies) == n_refused
                assert {reply.status_code for reply in replies} == {429}
                assert all(int(reply.headers["Retry-After"]) > 0 for reply in replies)
                assert all(words in reply.json()["error"]["message"] for reply in replies)
                return tasks

            tasks = await flood(KEYS[1], MAX_PER_KEY + 10, 10, f"This API key has {MAX_PER_KEY} of at most")
            n_free = n_slots + MAX_WAITING - MAX_PER_KEY
            tasks += await flood(KEYS[2], n_free + 8, 8, f"{MAX_WAITING} requests are waiting")
            running = await asyncio.to_thread(service.clients[0].metrics, "qwenvl_slots_running")
            waiting = await asyncio.to_thread(service.clients[0].metrics, "qwenvl_queue_waiting")
            assert (running, waiting) == ({"": n_slots}, {"": MAX_WAITING})
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())
    # The clients have disconnected: all slots are free again, and the engines are idle.
    wait_until(lambda: service.clients[0].metrics("qwenvl_slots_running") == {"": 0})
    wait_until(lambda: not any(service.clients[0].metrics("qwenvl_engine_running").values()))
    now = service.clients[0].metrics("qwenvl_requests_total")
    assert sum(now[front] > served.get(front, 0) + 10 for front in now) >= 2


def test_a_stream_survives_its_replica(service: Service) -> None:
    """After the kill of the replica that computes a stream, the stream continues with the same tokens."""
    n = 700
    expected = service.alone.generate([{"text": LONG}], chat=True, max_new_tokens=n, min_new_tokens=n).text
    client = openai.OpenAI(base_url=f"{service.clients[0].url}/v1", api_key=KEYS[0])
    stream = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": LONG}],
        stream=True,
        max_tokens=n,
        extra_body={"min_tokens": n},
    )
    text, killed = "", 0
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        if not killed and len(text) > 20:
            wait_until(lambda: any(service.clients[0].metrics("qwenvl_engine_running").values()), 20)
            running = service.clients[0].metrics("qwenvl_engine_running")
            (killed,) = [pid for name, pid in engine_pids().items() if running.get(name)]
            os.kill(killed, signal.SIGKILL)
    assert killed
    assert text == expected


@pytest.mark.kills
def test_no_request_fails_during_a_node_failure_and_an_update(service: Service) -> None:
    asked = questions(service.alone)
    with Load(service.clients[0].url, asked) as load:
        load.wait_for_answers()
        engines = set(service.clients[0].metrics("qwenvl_engine_ready"))
        service.cluster.remove_node(min(service.cluster.worker_nodes, key=id), allow_graceful=False)
        load.wait_for_answers()
        wait_until(lambda: set(service.clients[0].metrics("qwenvl_engine_ready")) - engines)
        engines |= set(service.clients[0].metrics("qwenvl_engine_ready"))
        service.commands.append(Command(*service.flags, "--default_max_new_tokens", 77))
        service.commands[1].wait_for("Serving")
        assert "Another command has updated the application" in service.commands[0].wait_for("ends")
        assert service.commands[0].end() == 0
        load.wait_for_answers()
        wait_until(lambda: not engines & set(service.clients[0].metrics("qwenvl_engine_ready")))
        load.wait_for_answers()
    assert load.problems == []
    print(f"{load.answered} answers, {load.broken_streams} broken streams")


def test_end(service: Service) -> None:
    """On SIGTERM an admitted request completes, a new one is refused, and the command exits with 0."""
    client = service.clients[0]
    wait_until(lambda: client.metrics("qwenvl_slots_running") == {"": 0})
    begun = time.monotonic()
    replies: list[httpx.Response] = []
    asked = [{"role": "user", "content": LONG}]
    thread = threading.Thread(
        target=lambda: replies.append(client.chat(asked, max_tokens=600, min_tokens=600))
    )
    thread.start()
    wait_until(lambda: client.metrics("qwenvl_slots_running") == {"": 1})
    assert service.commands[-1].process.poll() is None
    service.commands[-1].process.send_signal(signal.SIGTERM)
    refused = client.chat(asked)
    while refused.status_code == 200 and time.monotonic() < begun + 60:
        refused = client.chat(asked, max_tokens=1)
    assert refused.status_code in (503, 404), refused.text
    thread.join(PATIENCE)
    assert [reply.status_code for reply in replies] == [200]
    assert replies[0].json()["usage"]["completion_tokens"] == 600
    assert service.commands[-1].end() == 0
