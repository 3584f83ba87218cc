"""Components of `qwenvl serve --ray` without a cluster: queue with leases, retries, prefixes, routing, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
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
from paddlemix_qwenvl_plugin.cluster.serve.prefix import prefix_of
from paddlemix_qwenvl_plugin.cluster.serve.replicas import front_cpus, front_requests, max_fronts
from paddlemix_qwenvl_plugin.cluster.serve.routing import PrefixRouter
from paddlemix_qwenvl_plugin.cluster.serve.start import check_version
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.serve.engine_api import Ended, EngineRequest, EngineUnavailable, Token
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError


def limits(**values: Any) -> ServeSettings:
    return ServeSettings(**{"max_running": 2, "max_waiting": 2, "max_per_key": 3, **values})


async def run_pending_tasks() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class TestCoordinator:
    def test_limits_are_those_of_all_replicas(self) -> None:
        async def scenario() -> None:
            queue = Coordinator(limits(min_replicas=1, max_replicas=2, max_per_key=None))
            waiting = [asyncio.ensure_future(queue.acquire(f"f{i % 2}", f"l{i}", 1, None)) for i in range(6)]
            await run_pending_tasks()
            totals = await queue.drain()
            assert (totals.running, totals.waiting) == (4, 2)
            # Accept requests again.
            await queue.configure(limits(min_replicas=1, max_replicas=2, max_per_key=None))
            refusal = await queue.acquire("f0", "too many", 1, None)
            assert refusal is not None
            assert (refusal["status"], refusal["code"]) == (429, "rate_limit_exceeded")
            await queue.release("l0")
            await queue.release("l1")
            assert await asyncio.gather(*waiting) == [None] * 6

        asyncio.run(scenario())

    def test_limit_of_a_key_holds_over_fronts(self) -> None:
        async def scenario() -> None:
            queue = Coordinator(limits(max_running=9))
            for i in range(3):
                assert await queue.acquire(f"f{i}", f"l{i}", 1, "key") is None
            refusal = await queue.acquire("f3", "l3", 1, "key")
            assert refusal is not None
            assert "This API key" in refusal["message"]
            assert await queue.acquire("f3", "l4", 1, "another") is None

        asyncio.run(scenario())

    def test_a_client_that_leaves_the_queue_frees_its_place(self) -> None:
        async def scenario() -> None:
            queue = Coordinator(limits())
            assert [await queue.acquire("f", f"l{i}", 1, None) for i in range(2)] == [None, None]
            waits = asyncio.ensure_future(queue.acquire("f", "waits", 1, None))
            await run_pending_tasks()
            assert (await queue.drain()).waiting == 1
            await queue.release("waits")
            assert await waits is None
            totals = await queue.drain()
            assert (totals.running, totals.waiting) == (2, 0)

        asyncio.run(scenario())

    def test_slots_that_their_front_does_not_hold_are_freed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are freed after a grace period, because the grant may still be on its way to the front."""
        monkeypatch.setattr(coordinator, "_UNCLAIMED_SECONDS", 0.2)

        async def scenario() -> None:
            queue = Coordinator(limits())
            await queue.release("left")  # arrives before its acquire
            for lease in ("left", "held"):
                assert await queue.acquire("f", lease, 1, None) is None
            held = {"held": (1, None)}
            assert (await queue.report("f", "front", True, [], held)).running == 2
            await asyncio.sleep(0.3)
            assert (await queue.report("other", "front", True, [], {})).running == 2
            assert (await queue.report("f", "front", True, [], held)).running == 1

        asyncio.run(scenario())

    def test_slots_of_a_lost_front_are_freed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(coordinator, "REPORT_SECONDS", 0.01)
        monkeypatch.setattr(coordinator, "_LOST_SECONDS", 0.2)

        async def scenario() -> None:
            queue = Coordinator(limits())
            for front in ("dies", "lives"):
                await queue.report(front, "front", True, [])
                assert await queue.acquire(front, front, 1, "key") is None
            waits = asyncio.ensure_future(queue.acquire("lives", "waits", 1, None))
            while not waits.done():
                totals = await queue.report("lives", "front", True, [], {"lives": (1, "key")})
                await asyncio.sleep(0.02)
            assert totals.running <= 2
            assert set((await queue.metrics())[0]) == {"lives"}

        asyncio.run(asyncio.wait_for(scenario(), 20))

    def test_a_restarted_coordinator_adopts_the_leases(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(coordinator, "REPORT_SECONDS", 0.1)

        async def scenario() -> None:
            queue = Coordinator(limits(), restarted=True)
            waits = asyncio.ensure_future(queue.acquire("f", "new", 1, None))
            known = asyncio.ensure_future(queue.acquire("f", "a", 1, "key"))  # granted before the restart
            await run_pending_tasks()
            for _ in range(3):  # a lease counts once, however often it is reported
                totals = await queue.report("f", "front", True, [], {"a": (1, "key"), "b": (1, None)})
            assert totals.running == 2
            assert await known is None
            await run_pending_tasks()
            assert not waits.done()
            await queue.release("a")
            assert await waits is None
            assert (await queue.drain()).running == 2

        asyncio.run(scenario())


class Call:
    """Stub of a streaming call to an engine replica: yields chunks of tokens, then raises or hangs."""

    def __init__(self, chunks: list[Chunk], then: Optional[BaseException]) -> None:
        self._chunks = chunks
        self._then = then
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        for chunk in self._chunks:
            await asyncio.sleep(0)
            yield chunk
        if self._then is not None:
            raise self._then
        if not self._chunks or self._chunks[-1].reason is None:
            await asyncio.sleep(60)

    def cancel(self) -> None:
        self.cancelled = True


class Replicas:
    """Stub of a DeploymentHandle: each call generates tokens from n_skip on, of ten tokens 0, 1, … 9.

    A call takes the next (n, error) of `ends`, and yields tokens up to n - 1; then it raises the error, or hangs if the
    error is None. Without one left, it completes all tokens.
    """

    def __init__(self, *ends: Any) -> None:
        self._ends = list(ends)
        self.calls: list[tuple[EngineRequest, int, dict[str, Any]]] = []
        self.last: Optional[Call] = None
        self.generate = SimpleNamespace(remote=self._generate)

    def options(self, stream: bool) -> Replicas:
        return self

    def _generate(self, request: EngineRequest, n_skip: int, **routing: Any) -> Call:
        self.calls.append((request, n_skip, routing))
        n, error = self._ends.pop(0) if self._ends else (10, None)
        chunks = [Chunk([Token(i)], 7) for i in range(n_skip, n)]
        if error is None and n == 10:
            chunks.append(Chunk([], 7, "length"))
        self.last = Call(chunks, error)
        return self.last


def collect(replicas: Replicas, request: Optional[EngineRequest] = None) -> tuple[list[int], Optional[Ended]]:
    async def scenario() -> tuple[list[int], Optional[Ended]]:
        stream = HandleEngineClient(replicas).submit(request or engine_request([1, 2, 3]))
        tokens = [token.id async for new in stream for token in new]
        return tokens, stream.ended

    return asyncio.run(asyncio.wait_for(scenario(), 20))


def engine_request(prompt: list[int], generated: Any = (), images: Any = (), **options: Any) -> EngineRequest:
    return EngineRequest(prompt, list(images), [9], GenerationOptions(**options), generated)


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

    def test_a_given_seed_stays(self) -> None:
        replicas = Replicas()
        collect(replicas, engine_request([1], seed=5))
        assert replicas.calls[0][0].options.seed == 5

    def test_it_gives_up_with_an_error_that_clients_retry(self) -> None:
        replicas = Replicas(*[(0, RayActorError())] * 4)
        with pytest.raises(EngineUnavailable, match="try again"):
            collect(replicas)
        assert len(replicas.calls) == 4

    def test_an_error_of_the_request_is_not_repeated(self) -> None:
        replicas = Replicas((2, QwenVLError("the logits are not finite")))
        with pytest.raises(QwenVLError, match="not finite"):
            collect(replicas)
        assert len(replicas.calls) == 1

    def test_cancel(self) -> None:
        async def scenario() -> None:
            replicas = Replicas((4, None))
            stream = HandleEngineClient(replicas).submit(engine_request([1]))
            async for new in stream:
                if new[-1].id == 3:
                    stream.cancel()
            assert stream.ended == Ended("cancelled", 7)
            assert replicas.last is not None
            assert replicas.last.cancelled

        asyncio.run(asyncio.wait_for(scenario(), 20))


IMAGE_END = 99


class TestPrefix:
    def test_turns_of_a_conversation_have_one_prefix(self) -> None:
        first = engine_request([1, 2, 3])
        assert prefix_of(engine_request([1, 2, 3, 7, 8, 9, 4], generated=[(3, 5)]), IMAGE_END) == prefix_of(
            first, IMAGE_END
        )
        assert prefix_of(engine_request([1, 2, 4]), IMAGE_END) != prefix_of(first, IMAGE_END)

    def test_questions_about_an_image_have_one_prefix(self) -> None:
        cat, dog = (np.full((4, 4, 3), value, np.uint8) for value in (1, 2))
        asked = prefix_of(engine_request([1, 99, 5, 6], images=[cat]), IMAGE_END)
        assert prefix_of(engine_request([1, 99, 7], images=[cat]), IMAGE_END) == asked
        assert prefix_of(engine_request([1, 99, 7], images=[dog]), IMAGE_END) != asked
        # An image of a later turn does not matter.
        later = engine_request([1, 99, 5, 6, 8, 99, 3], generated=[(4, 5)], images=[cat, dog])
        assert prefix_of(later, IMAGE_END) == asked


def test_requests_with_the_same_image_can_be_compared() -> None:
    """Ray compares requests when it removes one from its queue."""
    image = np.zeros((4, 4, 3), np.uint8)
    first, second = (engine_request([1, 99], images=[image.copy()]) for _ in range(2))
    waiting = [first, second]
    waiting.remove(second)
    assert waiting == [first]


class Router(PrefixRouter):
    """PrefixRouter with fixed queue lengths, without Ray."""

    def __init__(self, queued: dict[str, int]) -> None:
        self.queued = queued
        self.replicas: Any = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in queued]

    def _queued(self, replica: Any) -> int:
        return self.queued[replica.replica_id.unique_id]

    def ranking(self, prefix: str, attempt: int = 0) -> list[str]:
        request: Any = SimpleNamespace(kwargs={"prefix": prefix, "attempt": attempt})
        ranks: Any = asyncio.run(self.choose_replicas(self.replicas, request))
        assert all(len(rank) == 1 for rank in ranks)
        return [replica.replica_id.unique_id for (replica,) in ranks]


class TestRouter:
    def test_prefixes_are_balanced_and_stable(self) -> None:
        prefixes = [f"p{i}" for i in range(300)]
        before = {prefix: Router(dict.fromkeys("abc", 0)).ranking(prefix)[0] for prefix in prefixes}
        assert all(60 < sum(chosen == name for chosen in before.values()) < 140 for name in "abc")
        after = {prefix: Router(dict.fromkeys("cab", 3)).ranking(prefix)[0] for prefix in prefixes}
        assert after == before
        without = {prefix: Router(dict.fromkeys("ab", 0)).ranking(prefix)[0] for prefix in prefixes}
        assert all(without[prefix] == before[prefix] for prefix in prefixes if before[prefix] != "c")

    def test_an_overloaded_replica_comes_last(self) -> None:
        first, second, third = Router(dict.fromkeys("abc", 0)).ranking("p")
        assert Router({first: 4, second: 0, third: 0}).ranking("p") == [first, second, third]
        assert Router({first: 5, second: 0, third: 0}).ranking("p") == [second, third, first]

    def test_each_attempt_begins_at_another_replica(self) -> None:
        router = Router(dict.fromkeys("abc", 0))
        assert {router.ranking("p", attempt)[0] for attempt in range(3)} == set("abc")


def test_metrics_of_all_processes() -> None:
    def counted(n: int) -> list[Metric]:
        registry = CollectorRegistry()
        Counter("qwenvl_requests", "HTTP requests.", ["path"], registry=registry).labels("/").inc(n)
        return list(registry.collect())

    processes = {"a": ("front", counted(3)), "b": ("front", counted(4)), "c": ("engine", counted(5))}
    page, content_type = render(processes, Totals(6, 7, 1, False, False), "")
    assert content_type.startswith("text/plain")
    families = list(text_string_to_metric_families(page.decode()))
    assert len(families) == len({family.name for family in families})
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    assert found == {
        ("qwenvl_slots_running",): 6,
        ("qwenvl_queue_waiting",): 7,
        ("qwenvl_requests_total", ("front", "a"), ("path", "/")): 3,
        ("qwenvl_requests_total", ("front", "b"), ("path", "/")): 4,
        ("qwenvl_requests_total", ("engine", "c"), ("path", "/")): 5,
    }


def test_fronts_for_all_slots() -> None:
    """Fronts with one CPU, 1340 tokens/s each, keep up with GPUs, 2890 tokens/s each (docs/scaling.md)."""
    gpu = limits(device="gpu", max_running=64, min_replicas=16)
    assert max_fronts(gpu) * front_cpus(gpu) * 1340 >= 16 * 2890
    assert max_fronts(gpu) * front_requests(gpu) >= 16 * 64
    assert max_fronts(limits(max_running=64, max_replicas=10)) == 10
    assert max_fronts(limits(max_running=65, min_fronts=1)) == 2
    assert max_fronts(limits(max_running=2)) == limits().min_fronts


@pytest.mark.parametrize(
    ("found", "protobuf", "message"),
    [
        ("2.49.2", "6.33.6", "qwenvl serve needs Ray 2.50 or newer, and this is 2.49.2; pip install -U 'ray"),
        ("2.56.1", "7.36.2", "Ray Serve 2.56.1 does not work with protobuf 7.36.2; pip install 'protobuf<7'"),
        ("2.50.0", "6.33.6", None),
        ("2.57.0", "7.36.2", None),
    ],
)
def test_an_old_ray_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str, protobuf: str, message: Optional[str]
) -> None:
    check_version()
    monkeypatch.setattr(start, "version", {"ray": found, "protobuf": protobuf}.__getitem__)
    with contextlib.nullcontext() if message is None else pytest.raises(UsageError, match=re.escape(message)):
        check_version()


def test_a_controller_that_dies_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    def died(*_: Any, **__: Any) -> None:
        raise RayActorError

    monkeypatch.setattr(serve, "start", died)
    monkeypatch.setattr(serve, "status", died)
    with pytest.raises(QwenVLError, match=r"^the application does not start on the cluster: The actor"):
        start._deploy(limits(first_model_path="vision", second_model_path="text"))


def test_a_restarted_proxy_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    polls = ["HEALTHY STARTING", "HEALTHY UNHEALTHY", "HEALTHY STARTING", "HEALTHY HEALTHY", "not polled"]

    def status() -> SimpleNamespace:
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
