"""Measure the costs of Ray and of a cluster's shared processes, for docs/scaling.md and for COSTS in scale_times.py.

The cluster is local, with two CPUs. Each figure is the CPU time of the process that would become the bottleneck in a
real cluster, whose processes have separate CPUs; rows named "wall time" are elapsed times. Takes about a minute.
Run: python benchmarks/scale_ray.py --temp_dir /tmp/scale
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from typing import Any

import ray
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from paddlemix_qwenvl_plugin.cluster.serve.coordinator import Coordinator
from paddlemix_qwenvl_plugin.cluster.serve.routing import _weight
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings


def cpu_of(actor: Any) -> float:
    """Return the CPU time of an actor's process since its start, in seconds."""
    return float(ray.get(actor.__ray_call__.remote(lambda self: time.process_time())))


class Caller:
    """Actor that calls the coordinator as fronts and engines do."""

    async def requests(self, coordinator: Any, n: int, n_concurrent: int) -> None:
        async def acquire_and_release(lease: str) -> None:
            assert await coordinator.acquire.remote("front", lease, 1, "key") is None  # granted
            await coordinator.release.remote(lease)

        for begin in range(0, n, n_concurrent):
            leases = [f"{id(self)}-{begin + k}" for k in range(n_concurrent)]
            await asyncio.gather(*(acquire_and_release(lease) for lease in leases))

    async def reports(self, coordinator: Any, n: int, kind: str) -> None:
        metrics = metric_families(kind)
        for _ in range(n):
            await coordinator.report.remote(kind, kind, True, metrics, {} if kind == "front" else None)


def metric_families(kind: str) -> list[Any]:
    """Create metrics of about the size of a report: 6 counters and 4 gauges, for a front also 4 histograms."""
    families = [CounterMetricFamily(f"counter_{k}", "Documentation.", value=k) for k in range(6)]
    families += [GaugeMetricFamily(f"gauge_{k}", "Documentation.", value=k) for k in range(4)]
    if kind == "front":
        registry = CollectorRegistry()
        for k in range(4):
            Histogram(f"histogram_{k}", "Documentation.", registry=registry).observe(0.1)
        families += registry.collect()
    return families


class Producer:
    """Actor that streams chunks of one token."""

    async def stream(self, n_chunks: int) -> Any:
        for k in range(n_chunks):
            yield [k]


class Consumer:
    """Actor that reads concurrent streams of a producer."""

    async def read(self, producer: Any, n_chunks: int, n_streams: int) -> None:
        async def read_stream() -> None:
            async for item in producer.stream.options(num_returns="streaming").remote(n_chunks):
                await item

        await asyncio.gather(*(read_stream() for _ in range(n_streams)))


class Idle:
    """Actor whose only method returns immediately."""

    def nothing(self) -> None: ...


def coordinator_costs() -> None:
    settings = ServeSettings(max_running=64, max_replicas=1000, max_waiting=100_000)
    actor = ray.remote(Coordinator).options(num_cpus=0, max_concurrency=100_000).remote(settings)
    caller = ray.remote(Caller).options(num_cpus=0).remote()
    ray.get(caller.requests.remote(actor, 200, 50))  # warm-up
    for name, n, work in (
        ("acquire and release", 3000, lambda n: caller.requests.remote(actor, n, 100)),
        ("report of an engine", 1000, lambda n: caller.reports.remote(actor, n, "engine")),
        ("report of a front", 1000, lambda n: caller.reports.remote(actor, n, "front")),
    ):
        begin = cpu_of(actor)
        ray.get(work(n))
        row(f"coordinator: {name}", (cpu_of(actor) - begin) / n)


def stream_costs() -> None:
    producer, consumer = (ray.remote(actor).options(num_cpus=0).remote() for actor in (Producer, Consumer))
    ray.get(consumer.read.remote(producer, 50, 4))  # warm-up
    n_chunks, n_streams = 250, 16
    producer_begin, consumer_begin = cpu_of(producer), cpu_of(consumer)
    ray.get(consumer.read.remote(producer, n_chunks, n_streams))
    row("stream: producer, per chunk", (cpu_of(producer) - producer_begin) / (n_chunks * n_streams))
    row("stream: consumer, per chunk", (cpu_of(consumer) - consumer_begin) / (n_chunks * n_streams))


def driver_costs() -> None:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for n in (200, 1000):
        items = ray.data.from_items([{"part": b"x" * 2000} for _ in range(n)], override_num_blocks=n)
        cpu_begin, begin = time.process_time(), time.perf_counter()
        pool = ray.data.ActorPoolStrategy(size=1)
        n_results = sum(1 for _ in items.map_batches(PartActor, batch_size=1, compute=pool).iter_rows())
        assert n_results == n
        row(f"Ray Data's driver: per part, with {n} parts", (time.process_time() - cpu_begin) / n)
        row(f"Ray Data: wall time per part on one actor, with {n} parts", (time.perf_counter() - begin) / n)


class PartActor:
    """Actor of Ray Data whose parts need no computation."""

    def __call__(self, batch: Any) -> Any:
        return {"rows": [1]}


def actor_costs() -> None:
    begin = time.perf_counter()
    actors = [ray.remote(Idle).options(num_cpus=0).remote() for _ in range(10)]
    ray.get([actor.nothing.remote() for actor in actors])
    row("wall time per actor start, 10 concurrently", (time.perf_counter() - begin) / 10)


class Replica:
    """Stub of Ray Serve's replica, with the attributes that the router reads."""

    def __init__(self, number: int) -> None:
        self.replica_id = self
        self.unique_id = f"abcdef{number:04d}"


def router_costs() -> None:
    for n in (10, 100, 1000):
        replicas: Any = [Replica(number) for number in range(n)]
        prefixes = [f"{k:032x}" for k in range(200)]
        begin = time.process_time()
        for prefix in prefixes:
            sorted(replicas, key=lambda replica, prefix=prefix: _weight(prefix, replica))
        row(f"router: ranking of {n} replicas", (time.process_time() - begin) / len(prefixes))


def row(name: str, seconds: float) -> None:
    print(f"| {name} | {seconds * 1e6:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--temp_dir",
        required=True,
        help="folder for Ray's sockets and logs; must have a short path, because of the sockets",
    )
    arguments = parser.parse_args()
    print("| | µs |\n| --- | --- |")
    router_costs()
    ray.init(
        num_cpus=2,
        object_store_memory=100_000_000,
        include_dashboard=False,
        _temp_dir=arguments.temp_dir,
        log_to_driver=False,
        # With Ray's default, a lower priority, other programs slow the actors.
        _system_config={"worker_niceness": 0},
    )
    measures: list[Callable[[], None]] = [driver_costs, coordinator_costs, stream_costs, actor_costs]
    for measure in measures:
        measure()
    ray.shutdown()


if __name__ == "__main__":
    main()
