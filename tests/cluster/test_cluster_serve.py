"""`qwenvl serve --ray` on three local nodes, compared with the model in this process.

The test marked `kills`, which removes a node under load, runs only with QWENVL_TEST_CLUSTER_KILLS=1 (conftest.py); the
one that kills a single replica always runs.
"""

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
    MODEL_NAME,
    REPO,
    TIMEOUT,
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

N_ENGINES = 3
N_CLIENTS = 32
KEYS = ("key-a", "key-b", "key-c")
# Slots per engine. The three engines have 48, enough for the 32 clients and for slots that a killed front holds until
# its loss is detected.
MAX_RUNNING = 16
MAX_WAITING = 24
# More than the 48 slots and less than slots and queue together (72): one key alone reaches its own limit, and only with
# a second key the queue's.
MAX_PER_KEY = 60
LONG = "Tell me a long story about two squares and a dog."


class Service(NamedTuple):
    """Running service on a cluster.

    Attributes:
        cluster: the ray.cluster_utils.Cluster.
        flags: flags of the first `qwenvl serve` command.
        commands: the `qwenvl serve` commands, in the order of their start.
        clients: a client for each of KEYS.
        reference: the same model, opened in this process.
    """

    cluster: Any
    flags: list[object]
    commands: list[Command]
    clients: list[Client]
    reference: QwenVL


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
        reference = QwenVL.from_exported(*demo_stages(print))
        reference.load()
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
            yield Service(cluster, flags, commands, clients, reference)
    finally:
        for command in commands:
            command.process.kill()
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)


class Request(NamedTuple):
    """Body of a chat request, and the expected text of the answer."""

    messages: list[dict[str, Any]]
    parameters: dict[str, Any]
    expected: str


def chat_requests(reference: QwenVL) -> list[Request]:
    """Build requests with and without images, greedy and sampled, with the reference's answers."""
    rng = random.Random(5)
    questions = [question for question in QUESTIONS if question.sample.form == "chat"][:8]
    requests: list[Request] = []
    for number, question in enumerate(questions):
        text = question.turn.question if number % 2 else LONG
        images = question.images if number % 3 else ()
        content: list[dict[str, Any]] = [
            *({"type": "image_url", "image_url": {"url": data_url(path)}} for path in images),
            {"type": "text", "text": text},
        ]
        query = [*({"image": path.read_bytes()} for path in images), {"text": text}]
        sampling: dict[str, Any] = {}
        if number % 2:
            sampling = {"temperature": 1.1, "top_p": 0.95, "seed": rng.randrange(2**60)}
        answer = reference.generate(query, chat=True, max_new_tokens=60, **sampling)
        requests.append(
            Request([{"role": "user", "content": content}], {"max_tokens": 60, **sampling}, answer.text)
        )
    return requests


class Load:
    """Load generator: threads with an `openai` client each, which send requests one after another.

    Every fourth thread streams. OpenAI's client retries failed requests, but no stream that has begun. If a front or
    the proxy fails and breaks a stream, the thread sends the request again.

    Attributes:
        answered: number of correct answers.
        broken_streams: number of broken streams.
        problems: errors and wrong answers.
    """

    def __init__(self, url: str, requests: list[Request]) -> None:
        self._url = url
        self._requests = requests
        self._stop = threading.Event()
        self.answered = 0
        self.broken_streams = 0
        self.problems: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=[n], daemon=True) for n in range(N_CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "a request has no answer"

    def wait_for_answers(self, n: int = 2 * N_CLIENTS) -> None:
        """Wait for n correct answers from now on."""
        goal = self.answered + n
        wait_until(lambda: self.answered >= goal or self.problems)
        assert self.problems == []

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        http = httpx.Client(verify=False, timeout=TIMEOUT)  # loading the certificates is slow
        client = openai.OpenAI(base_url=f"{self._url}/v1", api_key=KEYS[0], http_client=http)
        ask = self._ask_streaming if number % 4 == 0 else self._ask
        while not self._stop.is_set():
            request = rng.choice(self._requests)
            try:
                text = ask(client, request)
            except Exception as error:
                self.problems.append(f"{type(error).__name__}: {error}")
            else:
                if text == request.expected:
                    self.answered += 1
                else:
                    self.problems.append(f"{text!r}, expected {request.expected!r}")

    def _ask(self, client: Any, request: Request) -> str:
        answer = client.chat.completions.create(
            model=MODEL_NAME, messages=request.messages, **request.parameters
        )
        return str(answer.choices[0].message.content)

    def _ask_streaming(self, client: Any, request: Request) -> str:
        while True:
            stream = client.chat.completions.create(
                model=MODEL_NAME, messages=request.messages, stream=True, **request.parameters
            )
            try:
                deltas = list(stream)
            except (httpx.HTTPError, openai.APIError):
                self.broken_streams += 1
                continue
            if deltas and deltas[-1].choices[0].finish_reason is None:
                self.broken_streams += 1
                continue
            return "".join(delta.choices[0].delta.content or "" for delta in deltas)


def test_interface(service: Service) -> None:
    client = service.clients[0]
    assert client.get("/health/ready").json() == {"status": "ready", "model": MODEL_NAME}
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [MODEL_NAME]
    assert httpx.get(f"{client.url}/v1/models").status_code == 401
    assert Client(client.url, "another-key").get("/v1/models").status_code == 401
    messages = [{"role": "user", "content": "?"}]
    response = client.chat(messages, max_tokens=5)
    assert response.json()["usage"]["completion_tokens"] <= 5
    assert len(response.headers.get_list("x-request-id")) == 1
    refused = client.chat(messages, temperature=7)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")


def test_turns_of_a_conversation_reach_the_replica_with_their_prefix(service: Service) -> None:
    client = service.clients[0]
    for number in range(8):
        text = f"Story {number}. " + LONG * 3
        messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
        n_prompt = 0
        for turn in range(3):
            response = client.chat(messages, max_tokens=20).json()
            if turn:
                n_cached = response["usage"]["prompt_tokens_details"]["cached_tokens"]
                # All tokens of the previous turn's prompt except at most its last 32, the size of a block.
                assert n_cached > n_prompt - 33, (number, turn)
            n_prompt = response["usage"]["prompt_tokens"]
            answer = response["choices"][0]["message"]["content"]
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]


def test_limits_hold_over_all_fronts(service: Service) -> None:
    """Requests over a key's limit or over the queue's limit are refused; all others run or wait."""
    url = f"{service.clients[0].url}/v1/chat/completions"
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": LONG}], "max_tokens": 1500}
    body["min_tokens"] = 1500

    def ended() -> dict[str, float]:
        """Number of ended chat requests of each front; the tests' requests for metrics are not counted."""
        return service.clients[0].metrics("qwenvl_requests_total", path="/v1/chat/completions")

    ended_before = ended()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    n_slots = N_ENGINES * MAX_RUNNING

    async def scenario() -> None:
        async with httpx.AsyncClient(verify=False, timeout=TIMEOUT, limits=limits) as http:

            async def flood(key: str, n: int, n_refused: int, message: str) -> list[Any]:
                """Send n requests; check that exactly n_refused are refused, with `message` in the error."""
                tasks = [
                    asyncio.ensure_future(
                        http.post(url, json=body, headers={"Authorization": f"Bearer {key}"})
                    )
                    for _ in range(n)
                ]
                while sum(task.done() for task in tasks) < n_refused:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(0.5)  # time for further refusals, which would be errors
                refusals = [task.result() for task in tasks if task.done()]
                assert len(refusals) == n_refused
                assert {refusal.status_code for refusal in refusals} == {429}
                assert all(int(refusal.headers["Retry-After"]) > 0 for refusal in refusals)
                assert all(message in refusal.json()["error"]["message"] for refusal in refusals)
                return tasks

            tasks = await flood(KEYS[1], MAX_PER_KEY + 10, 10, f"This API key has {MAX_PER_KEY} of at most")
            n_admitted = n_slots + MAX_WAITING - MAX_PER_KEY  # the requests of KEYS[1] still run or wait
            tasks += await flood(KEYS[2], n_admitted + 8, 8, f"{MAX_WAITING} requests are waiting")
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
    # At least two fronts have each had more than ten of the requests.
    wait_until(lambda: sum(n > ended_before.get(front, 0) + 10 for front, n in ended().items()) >= 2)


def test_a_stream_survives_its_replica(service: Service) -> None:
    """A stream continues with the same tokens when the replica that computes it is killed."""
    n_tokens = 700
    expected = service.reference.generate(
        [{"text": LONG}], chat=True, max_new_tokens=n_tokens, min_new_tokens=n_tokens
    ).text
    client = openai.OpenAI(base_url=f"{service.clients[0].url}/v1", api_key=KEYS[0])
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": LONG}],
        stream=True,
        max_tokens=n_tokens,
        extra_body={"min_tokens": n_tokens},
    )
    text = ""
    killed_pid = 0
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        if not killed_pid and len(text) > 20:
            wait_until(lambda: any(service.clients[0].metrics("qwenvl_engine_running").values()), 20)
            running = service.clients[0].metrics("qwenvl_engine_running")
            (killed_pid,) = [pid for name, pid in engine_pids().items() if running.get(name)]
            os.kill(killed_pid, signal.SIGKILL)
    assert killed_pid
    assert text == expected


def test_an_update_that_does_not_start_drops_no_request(service: Service, tmp_path: Path) -> None:
    flags = [flag for flag in service.flags if flag != "--demo"]
    paths = ("--first_model_path", tmp_path / "vision", "--second_model_path", tmp_path / "qwen")
    with Load(service.clients[0].url, chat_requests(service.reference)) as load:
        load.wait_for_answers()
        update = Command(*flags, *paths)
        assert update.end() == 1
        assert "the update does not start; the earlier replicas that still run continue: " in update.lines[-1]
        assert "no exported vision stage there" in update.lines[-1]
        load.wait_for_answers()
    assert load.problems == []
    assert service.commands[0].process.poll() is None


@pytest.mark.kills
def test_no_request_fails_during_a_node_failure_and_an_update(service: Service) -> None:
    def engine_names() -> set[str]:
        return set(service.clients[0].metrics("qwenvl_engine_ready"))

    with Load(service.clients[0].url, chat_requests(service.reference)) as load:
        load.wait_for_answers()
        old_engines = engine_names()
        any_but_the_head = next(iter(service.cluster.worker_nodes))
        service.cluster.remove_node(any_but_the_head, allow_graceful=False)
        load.wait_for_answers()
        # A new engine replaces the killed one.
        wait_until(lambda: engine_names() - old_engines)
        old_engines |= engine_names()
        service.commands.append(Command(*service.flags, "--default_max_new_tokens", 77))
        service.commands[1].wait_for("Serving")
        assert "Another command has updated the application" in service.commands[0].wait_for("ends")
        assert service.commands[0].end() == 0
        load.wait_for_answers()
        # The update replaces all engines.
        wait_until(lambda: not old_engines & engine_names())
        load.wait_for_answers()
    assert load.problems == []
    print(f"{load.answered} answers, {load.broken_streams} broken streams")


def test_shutdown(service: Service) -> None:
    """On SIGTERM an admitted request completes, a new one is refused, and the command exits with 0.

    The last test of this file: it ends the service.
    """
    client = service.clients[0]
    wait_until(lambda: client.metrics("qwenvl_slots_running") == {"": 0})
    start = time.monotonic()
    completed: list[httpx.Response] = []
    messages = [{"role": "user", "content": LONG}]
    thread = threading.Thread(
        target=lambda: completed.append(client.chat(messages, max_tokens=600, min_tokens=600))
    )
    thread.start()
    wait_until(lambda: client.metrics("qwenvl_slots_running") == {"": 1})
    assert service.commands[-1].process.poll() is None
    service.commands[-1].process.send_signal(signal.SIGTERM)
    # Fronts accept requests for a moment after the signal.
    new = client.chat(messages)
    while new.status_code == 200 and time.monotonic() < start + 60:
        new = client.chat(messages, max_tokens=1)
    # 503: a front refuses the request. 404: Ray's proxy, after the application has been removed.
    assert new.status_code in (503, 404), new.text
    thread.join(TIMEOUT)
    assert [response.status_code for response in completed] == [200]
    assert completed[0].json()["usage"]["completion_tokens"] == 600
    assert service.commands[-1].end() == 0
