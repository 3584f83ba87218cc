"""Components of `qwenvl serve --ray` without a cluster: queue, retries, prefixes, routing, metrics, start, signals."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import pytest
from prometheus_client import Counter
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")

from ray.exceptions import RayActorError
from ray.serve.schema import ProxyStatus

from paddlemix_qwenvl_plugin.cluster.serve import coordinator, engine_handle, start
from paddlemix_qwenvl_plugin.cluster.serve.cluster_metrics import render
from paddlemix_qwenvl_plugin.cluster.serve.coordinator import Coordinator, Totals
from paddlemix_qwenvl_plugin.cluster.serve.engine import Chunk
from paddlemix_qwenvl_plugin.cluster.serve.engine_handle import HandleEngineClient
from paddlemix_qwenvl_plugin.cluster.serve.front import Front
from paddlemix_qwenvl_plugin.cluster.serve.prefix import prefix_of
from paddlemix_qwenvl_plugin.cluster.serve.replicas import front_cpus, front_requests, max_fronts
from paddlemix_qwenvl_plugin.cluster.serve.routing import PrefixRouter
from paddlemix_qwenvl_plugin.cluster.serve.start import check_version
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.serve.engine_api import Ended, EngineRequest, EngineUnavailable, Token
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.serve.token_stream import CANCEL_SECONDS
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError


def serve_settings(**values: Any) -> ServeSettings:
    """Create settings with small limits; `values` replace them."""
    return ServeSettings(**{"max_running": 2, "max_waiting": 2, "max_per_key": 3, **values})


async def run_pending_tasks() -> None:
    """Give all tasks time to run until they wait for something."""
    for _ in range(10):
        await asyncio.sleep(0)


class TestCoordinator:
    """Coordinator: acquire(front, lease id, number of slots, API key) returns None, or the error of a refusal.

    A lease is the slots of one request.
    """

    def test_limits_count_the_slots_of_all_replicas(self) -> None:
        async def scenario() -> None:
            queue = Coordinator(serve_settings(min_replicas=1, max_replicas=2, max_per_key=None))
            leases = [
                asyncio.ensure_future(queue.acquire(f"front{i % 2}", f"lease{i}", 1, None)) for i in range(6)
            ]
            await run_pending_tasks()
            totals = await queue.drain()
            # max_running = 2 for each of up to two replicas; max_waiting = 2 for all together.
            assert (totals.running, totals.waiting) == (4, 2)
            # drain() makes the queue refuse new requests; configure() makes it accept them again.
            await queue.configure(serve_settings(min_replicas=1, max_replicas=2, max_per_key=None))
            refusal = await queue.acquire("front0", "too many", 1, None)
            assert refusal is not None
            assert (refusal["status"], refusal["code"]) == (429, "rate_limit_exceeded")
            await queue.release("lease0")
            await queue.release("lease1")
            assert await asyncio.gather(*leases) == [None] * 6

        asyncio.run(scenario())

    def test_limit_of_a_key_holds_over_fronts(self) -> None:
        async def scenario() -> None:
            queue = Coordinator(serve_settings(max_running=9))
            for i in range(3):
                assert await queue.acquire(f"front{i}", f"lease{i}", 1, "key") is None
            refusal = await queue.acquire("front3", "lease3", 1, "key")
            assert refusal is not None
            assert "This API key" in refusal["message"]
            assert await queue.acquire("front3", "lease4", 1, "another key") is None

        asyncio.run(scenario())

    def test_a_waiting_request_is_removed_when_its_client_disconnects(self) -> None:
        async def scenario() -> None:
            queue = Coordinator(serve_settings())
            assert [await queue.acquire("front", f"lease{i}", 1, None) for i in range(2)] == [None, None]
            waiting = asyncio.ensure_future(queue.acquire("front", "waiting", 1, None))
            await run_pending_tasks()
            assert (await queue.drain()).waiting == 1
            await queue.release("waiting")
            assert await waiting is None  # not a grant: the client is gone, and the result is not used
            totals = await queue.drain()
            assert (totals.running, totals.waiting) == (2, 0)

        asyncio.run(scenario())

    def test_a_repeated_call_waits_like_the_first(self) -> None:
        """A front repeats `acquire` after an error of Ray; in the coordinator the first call may still wait."""

        async def scenario() -> None:
            queue = Coordinator(serve_settings())
            for lease_id in ("a", "b"):
                assert await queue.acquire("front", lease_id, 1, None) is None
            waiting = [asyncio.ensure_future(queue.acquire("front", "c", 1, None)) for _ in range(2)]
            await run_pending_tasks()
            assert not any(call.done() for call in waiting)
            await queue.release("a")
            assert await asyncio.gather(*waiting) == [None, None]
            assert (await queue.drain()).running == 2

        asyncio.run(asyncio.wait_for(scenario(), 20))

    def test_slots_of_unreported_leases_are_freed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are freed only after a grace period (here 0.2 s): a grant may still be on its way to the front."""
        monkeypatch.setattr(coordinator, "_UNCLAIMED_SECONDS", 0.2)

        async def scenario() -> None:
            queue = Coordinator(serve_settings())
            await queue.release("released")  # arrives before its acquire
            for lease_id in ("released", "held"):
                assert await queue.acquire("front", lease_id, 1, None) is None
            leases = {"held": (1, None)}
            assert (await queue.report("front", "front", ready=True, metrics=[], leases=leases)).running == 2
            await asyncio.sleep(0.3)
            # Only a report of the front that acquired the lease "released" frees it; the other front's does not.
            assert (
                await queue.report("another front", "front", ready=True, metrics=[], leases={})
            ).running == 2
            assert (await queue.report("front", "front", ready=True, metrics=[], leases=leases)).running == 1

        asyncio.run(scenario())

    def test_slots_of_a_lost_front_are_freed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(coordinator, "REPORT_SECONDS", 0.01)
        monkeypatch.setattr(coordinator, "_LOST_SECONDS", 0.2)

        async def scenario() -> None:
            queue = Coordinator(serve_settings())
            for front in ("lost", "live"):
                await queue.report(front, "front", ready=True, metrics=[])
                assert await queue.acquire(front, f"lease of {front}", 1, "key") is None
            waiting = asyncio.ensure_future(queue.acquire("live", "waiting", 1, None))
            while not waiting.done():  # only the live front continues to report
                totals = await queue.report(
                    "live", "front", ready=True, metrics=[], leases={"lease of live": (1, "key")}
                )
                await asyncio.sleep(0.02)
            assert totals.running <= 2
            assert set((await queue.metrics())[0]) == {"live"}

        asyncio.run(asyncio.wait_for(scenario(), 20))

    def test_a_restarted_coordinator_adopts_the_leases(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(coordinator, "REPORT_SECONDS", 0.1)

        async def scenario() -> None:
            queue = Coordinator(serve_settings(), restarted=True)
            new = asyncio.ensure_future(queue.acquire("front", "new", 1, None))
            # The front repeats a call that the coordinator granted before its restart.
            repeated = asyncio.ensure_future(queue.acquire("front", "old0", 1, "key"))
            await run_pending_tasks()
            leases = {"old0": (1, "key"), "old1": (1, None)}
            for _ in range(3):  # repeated reports count a lease once
                totals = await queue.report("front", "front", ready=True, metrics=[], leases=leases)
            assert totals.running == 2
            assert await repeated is None
            await run_pending_tasks()
            assert not new.done()
            await queue.release("old0")
            assert await new is None
            assert (await queue.drain()).running == 2

        asyncio.run(scenario())


class Call:
    """Stub of a streaming call to an engine replica: yields chunks of tokens, then raises the error, if any.

    Without an error, the call ends if the last chunk has a finish reason and otherwise hangs.
    """

    def __init__(self, chunks: list[Chunk], error: Optional[BaseException]) -> None:
        self._chunks = chunks
        self._error = error
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        for chunk in self._chunks:
            await asyncio.sleep(0)
            yield chunk
        if self._error is not None:
            raise self._error
        if not self._chunks or self._chunks[-1].reason is None:
            await asyncio.sleep(60)

    def cancel(self) -> None:
        self.cancelled = True


class Replicas:
    """Stub of the DeploymentHandle of engine replicas that complete every request with the tokens 0 to 9.

    The i-th call takes (stop, error) from `failures[i]`: it yields the tokens from n_skip to stop - 1, and then raises
    the error, or hangs if the error is None. Calls after the last failure yield all tokens from n_skip on.

    Attributes:
        calls: request, n_skip and routing arguments of each call.
        last_call: the last call; None before the first.
    """

    def __init__(self, *failures: Any) -> None:
        self._failures = list(failures)
        self.calls: list[tuple[EngineRequest, int, dict[str, Any]]] = []
        self.last_call: Optional[Call] = None
        self.generate = SimpleNamespace(remote=self._generate)

    def options(self, stream: bool) -> Replicas:
        return self

    def _generate(self, request: EngineRequest, n_skip: int, **routing: Any) -> Call:
        self.calls.append((request, n_skip, routing))
        stop, error = self._failures.pop(0) if self._failures else (10, None)
        chunks = [Chunk([Token(i)], n_cached=7) for i in range(n_skip, stop)]
        if error is None and stop == 10:
            chunks.append(Chunk([], 7, "length"))
        self.last_call = Call(chunks, error)
        return self.last_call


def collect(replicas: Replicas, request: Optional[EngineRequest] = None) -> tuple[list[int], Optional[Ended]]:
    """Run a request on stub replicas; return its token ids and its end (finish reason, cached prompt tokens)."""

    async def scenario() -> tuple[list[int], Optional[Ended]]:
        stream = HandleEngineClient(replicas).submit(request or engine_request([1, 2, 3]))
        token_ids = [token.id async for tokens in stream for token in tokens]
        return token_ids, stream.ended

    return asyncio.run(asyncio.wait_for(scenario(), 20))


def engine_request(prompt: list[int], generated: Any = (), images: Any = (), **options: Any) -> EngineRequest:
    stop_tokens = [9]
    return EngineRequest(prompt, list(images), stop_tokens, GenerationOptions(**options), generated)


class TestEngineHandle:
    @pytest.fixture(autouse=True)
    def _no_pauses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine_handle, "_PAUSES", (0.0, 0.0, 0.0))

    def test_a_completion_continues_on_another_replica(self) -> None:
        replicas = Replicas((3, RayActorError()), (3, EngineUnavailable("gone")), (8, RayActorError()))
        assert collect(replicas) == (list(range(10)), Ended("length", 7))
        assert [n_skip for _, n_skip, _ in replicas.calls] == [0, 3, 3, 8]
        assert [routing["attempt"] for *_, routing in replicas.calls] == [0, 1, 2, 3]
        seeds = {request.options.seed for request, *_ in replicas.calls}
        assert len(seeds) == 1
        assert None not in seeds

    def test_the_seed_of_a_request_is_kept(self) -> None:
        replicas = Replicas()
        collect(replicas, engine_request([1], seed=5))
        assert replicas.calls[0][0].options.seed == 5

    def test_after_four_attempts_the_error_asks_the_client_to_try_again(self) -> None:
        replicas = Replicas(*[(0, RayActorError())] * 4)
        with pytest.raises(EngineUnavailable, match="try again"):
            collect(replicas)
        assert len(replicas.calls) == 4

    def test_an_error_of_the_request_itself_is_not_retried(self) -> None:
        replicas = Replicas((2, QwenVLError("the logits are not finite")))
        with pytest.raises(QwenVLError, match="not finite"):
            collect(replicas)
        assert len(replicas.calls) == 1

    def test_an_unexpected_exception_ends_the_request(self) -> None:
        replicas = Replicas((2, KeyError("a defect")))
        with pytest.raises(QwenVLError, match="internal error: KeyError"):
            collect(replicas)

    def test_cancel(self) -> None:
        async def scenario() -> None:
            replicas = Replicas((4, None))
            stream = HandleEngineClient(replicas).submit(engine_request([1]))
            async for tokens in stream:
                if tokens[-1].id == 3:
                    stream.cancel()
            assert stream.ended == Ended("cancelled", 7)
            assert replicas.last_call is not None
            assert replicas.last_call.cancelled

        asyncio.run(asyncio.wait_for(scenario(), 20))

    @pytest.mark.parametrize("n_calls", [0, 1])
    def test_cancel_before_a_call_or_between_two(self, monkeypatch: pytest.MonkeyPatch, n_calls: int) -> None:
        monkeypatch.setattr(engine_handle, "_PAUSES", (60.0,))

        async def scenario() -> None:
            replicas = Replicas((0, RayActorError()))
            stream = HandleEngineClient(replicas).submit(engine_request([1]))
            while len(replicas.calls) < n_calls:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05 * n_calls)  # until the pause after the failed call has begun
            stream.cancel()
            assert [tokens async for tokens in stream] == []
            assert stream.ended == Ended("cancelled", 0)

        asyncio.run(asyncio.wait_for(scenario(), CANCEL_SECONDS / 2))


IMAGE_END = 99  # id of the token `</img>`, which follows an image's slots


class TestPrefix:
    def test_turns_of_a_conversation_have_the_same_prefix(self) -> None:
        first_turn = prefix_of(engine_request([1, 2, 3]), IMAGE_END)
        second_turn = engine_request([1, 2, 3, 7, 8, 9, 4], generated=[(3, 5)])  # 7, 8: the completion
        assert prefix_of(second_turn, IMAGE_END) == first_turn
        assert prefix_of(engine_request([1, 2, 4]), IMAGE_END) != first_turn

    def test_questions_about_an_image_have_the_same_prefix(self) -> None:
        cat, dog = (np.full((4, 4, 3), value, np.uint8) for value in (1, 2))
        prefix = prefix_of(engine_request([1, IMAGE_END, 5, 6], images=[cat]), IMAGE_END)
        assert prefix_of(engine_request([1, IMAGE_END, 7], images=[cat]), IMAGE_END) == prefix
        assert prefix_of(engine_request([1, IMAGE_END, 7], images=[dog]), IMAGE_END) != prefix
        # An image of a later turn does not change the prefix.
        second_turn = engine_request(
            [1, IMAGE_END, 5, 6, 8, IMAGE_END, 3], generated=[(4, 5)], images=[cat, dog]
        )
        assert prefix_of(second_turn, IMAGE_END) == prefix


def test_requests_with_equal_images_can_be_compared() -> None:
    """Ray compares requests when it removes a request from its queue; a comparison of NumPy arrays would raise."""
    image = np.zeros((4, 4, 3), np.uint8)
    first, second = (engine_request([1, IMAGE_END], images=[image.copy()]) for _ in range(2))
    queue = [first, second]
    queue.remove(second)
    assert queue == [first]


class Router(PrefixRouter):
    """PrefixRouter with fixed queue lengths, without Ray."""

    def __init__(self, queue_lengths: dict[str, int]) -> None:
        self.queue_lengths = queue_lengths
        self.replicas: Any = [
            SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in queue_lengths
        ]

    def _queued(self, replica: Any) -> int:
        return self.queue_lengths[replica.replica_id.unique_id]

    def ranking(self, prefix: str, attempt: int = 0) -> list[str]:
        """List the names of the replicas in the order of preference for a request."""
        request: Any = SimpleNamespace(kwargs={"prefix": prefix, "attempt": attempt})
        ranks: Any = asyncio.run(self.choose_replicas(self.replicas, request))
        assert all(len(rank) == 1 for rank in ranks)
        return [replica.replica_id.unique_id for (replica,) in ranks]


class TestRouter:
    def test_prefixes_are_balanced_and_stable(self) -> None:
        prefixes = [f"p{i}" for i in range(300)]

        def first_replicas(names: str, queue_length: int) -> dict[str, str]:
            router = Router(dict.fromkeys(names, queue_length))
            return {prefix: router.ranking(prefix)[0] for prefix in prefixes}

        first = first_replicas("abc", 0)
        # About 100 of the 300 prefixes for each replica.
        assert all(60 < [*first.values()].count(name) < 140 for name in "abc")
        assert first_replicas("cab", 3) == first
        # Without replica c, only its prefixes move.
        without_c = first_replicas("ab", 0)
        assert all(without_c[prefix] == first[prefix] for prefix in prefixes if first[prefix] != "c")

    def test_an_overloaded_replica_comes_last(self) -> None:
        first, second, third = Router(dict.fromkeys("abc", 0)).ranking("p")
        # Up to 4 requests more than in the shortest queue are no overload (_SLACK in routing.py).
        assert Router({first: 4, second: 0, third: 0}).ranking("p") == [first, second, third]
        assert Router({first: 5, second: 0, third: 0}).ranking("p") == [second, third, first]

    def test_each_attempt_begins_at_another_replica(self) -> None:
        router = Router(dict.fromkeys("abc", 0))
        assert {router.ranking("p", attempt)[0] for attempt in range(3)} == set("abc")

    @pytest.mark.parametrize("names", ["ab", "abc"])
    def test_the_retries_reach_another_replica_than_a_failed_one_without_load(self, names: str) -> None:
        for failed in names:
            router = Router({name: 0 if name == failed else 9 for name in names})
            # The first three of four attempts: the pause before the last is long.
            first_replicas = [router.ranking("p", attempt)[0] for attempt in range(3)]
            assert first_replicas[0] == failed
            assert set(first_replicas) != {failed}


def test_metrics_of_all_processes() -> None:
    def request_counter(n: int) -> list[Metric]:
        registry = CollectorRegistry()
        Counter("qwenvl_requests", "HTTP requests.", ["path"], registry=registry).labels("/").inc(n)
        return list(registry.collect())

    processes = {
        "a": ("front", request_counter(3)),
        "b": ("front", request_counter(4)),
        "c": ("engine", request_counter(5)),
    }
    totals = Totals(running=6, waiting=7, engines=1, draining=False, ending=False)
    page, content_type = render(processes, totals, "")
    assert content_type.startswith("text/plain")
    families = list(text_string_to_metric_families(page.decode()))
    assert len(families) == len({family.name for family in families})
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")  # creation times
    }
    assert values == {
        ("qwenvl_slots_running",): 6,
        ("qwenvl_queue_waiting",): 7,
        ("qwenvl_requests_total", ("front", "a"), ("path", "/")): 3,
        ("qwenvl_requests_total", ("front", "b"), ("path", "/")): 4,
        ("qwenvl_requests_total", ("engine", "c"), ("path", "/")): 5,
    }


def test_metrics_while_the_coordinator_restarts() -> None:
    async def fail() -> None:
        raise RayActorError()

    front = SimpleNamespace(_member=SimpleNamespace(report=fail))
    with pytest.raises(ApiError) as error:
        asyncio.run(Front._render_metrics(front, ""))  # type: ignore[arg-type]
    assert (error.value.status, error.value.code) == (503, "queue_unavailable")


def test_enough_fronts_for_all_slots() -> None:
    """At 1340 tokens/s per CPU the fronts can send what the GPUs generate, 2890 tokens/s each (docs/scaling.md)."""
    gpu = serve_settings(device="gpu", max_running=64, min_replicas=16)
    assert max_fronts(gpu) * front_cpus(gpu) * 1340 >= 16 * 2890
    assert max_fronts(gpu) * front_requests(gpu) >= 16 * 64
    # On CPUs: a front for every 64 slots, and at least min_fronts.
    assert max_fronts(serve_settings(max_running=64, max_replicas=10)) == 10
    assert max_fronts(serve_settings(max_running=65, min_fronts=1)) == 2
    assert max_fronts(serve_settings(max_running=2)) == serve_settings().min_fronts


@pytest.mark.parametrize(
    ("ray", "protobuf", "message"),
    [
        ("2.49.2", "6.33.6", "qwenvl serve needs Ray 2.50 or newer, and this is 2.49.2; pip install -U 'ray"),
        ("2.56.1", "7.36.2", "Ray Serve 2.56.1 does not work with protobuf 7.36.2; pip install 'protobuf<7'"),
        ("2.50.0", "6.33.6", None),
        ("2.57.0", "7.36.2", None),
    ],
)
def test_unsupported_versions_of_ray_are_refused(
    monkeypatch: pytest.MonkeyPatch, ray: str, protobuf: str, message: Optional[str]
) -> None:
    check_version()  # the installed versions are accepted
    monkeypatch.setattr(start, "version", {"ray": ray, "protobuf": protobuf}.__getitem__)
    with contextlib.nullcontext() if message is None else pytest.raises(UsageError, match=re.escape(message)):
        check_version()


@pytest.mark.parametrize("step", ["connect", "check_version", "disconnect", "_remove"])
def test_a_signal_outside_the_deployment_ends_the_command(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """In `_remove` and `disconnect` it is the second one, after SIGINT in `_deploy`, which stands for a running server.

    The caller turns the number into the exit code.
    """
    steps: list[str] = []

    def run(name: str) -> None:
        steps.append(name)
        if name == step:
            signal.raise_signal(signal.SIGTERM)

    @contextlib.contextmanager
    def connect(_: str) -> Iterator[None]:
        run("connect")
        try:
            yield
        finally:
            run("disconnect")

    monkeypatch.setattr(start, "_check", lambda settings: None)
    monkeypatch.setattr(start, "connect", connect)
    monkeypatch.setattr(start, "check_version", lambda: run("check_version"))
    monkeypatch.setattr(start, "_deploy", lambda settings: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(start, "_remove", lambda settings: run("_remove"))
    settings = serve_settings(first_model_path="vision", second_model_path="text")
    number = start.start_on("", settings, [signal.SIGINT, signal.SIGTERM], lambda line: None)
    assert number == signal.SIGTERM
    assert steps == {
        "connect": ["connect"],
        "check_version": ["connect", "check_version", "disconnect"],
    }.get(step, ["connect", "check_version", "_remove", "disconnect"])


def test_error_if_the_controller_dies_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    def raise_actor_error(*_: Any, **__: Any) -> None:
        raise RayActorError

    monkeypatch.setattr(serve, "start", raise_actor_error)
    monkeypatch.setattr(serve, "status", raise_actor_error)
    with pytest.raises(QwenVLError, match=r"^the application does not start on the cluster: The actor"):
        start._deploy(serve_settings(first_model_path="vision", second_model_path="text"))


def test_a_restarted_proxy_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    polls = ["HEALTHY STARTING", "HEALTHY UNHEALTHY", "no controller", "HEALTHY HEALTHY", "not polled"]

    def status() -> SimpleNamespace:
        if polls[0] == "no controller":
            polls.pop(0)
            raise RayActorError
        return SimpleNamespace(
            proxies={str(n): ProxyStatus(name) for n, name in enumerate(polls.pop(0).split())}
        )

    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(start, "_POLL_SECONDS", 0.0)
    assert start._wait_for_proxies() == 0
    assert polls == ["not polled"]


def test_number_of_machines_without_a_proxy_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    # A proxy drains once its machine has no replica: it is not waited for.
    names = ["STARTING", "HEALTHY", "UNHEALTHY", "DRAINING"]
    proxies = {name: ProxyStatus(name) for name in names}
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(proxies=proxies))
    monkeypatch.setattr(start, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(start, "_PROXY_SECONDS", 0.05)
    assert start._wait_for_proxies() == 2
