"""Simulation of 1 to 1,000 replicas with measured service times: queueing, routing, autoscaling, failures, limits.

docs/scaling.md contains the results. Takes some minutes.
Run: python benchmarks/scale.py [--only NAME] [--profile h200-int4] [--figure FILE.svg]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import simpy
from scale_batch import BatchJob
from scale_cluster import Autoscaling, Failures, Service
from scale_figure import Line, figure
from scale_load import Conversations, Users
from scale_router import ByPrefix, Router, TwoChoices
from scale_station import Station
from scale_times import COSTS, FRONT_TOKEN, MEASURED_IMAGE, PROFILES, Times

# The conversations of docs/scaling.md; a short think time, so that a run reaches its steady state soon.
CONVERSATIONS = Conversations(think=1.0)
# Requests per second per replica, and replicas per cell, in the scenario `replicas`.
RATE = 30
CELL = 8


def table(*heads: str) -> None:
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")


def row(*cells: Any) -> None:
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"


def quantile(values: list[float], share: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def steady(
    times: Times, n: int, each: float, router: Router, seconds: tuple[float, float], **options: Any
) -> tuple[Service, list[Any]]:
    """Simulate a service under constant load; return it and its completed requests that arrived after the warm-up."""
    env = simpy.Environment()
    service = Service(env, times, n, router, **options)
    Users(service, n * each, CONVERSATIONS)
    warm_up, measured = seconds
    env.run(warm_up + measured)
    return service, [request for request in service.done if request.arrived > warm_up]


def first_tokens(requests: list[Any]) -> list[float]:
    return [request.first - request.arrived for request in requests]


def length(n: int) -> tuple[float, float]:
    """Return (warm-up, measured) seconds of a run: shorter with more replicas, which serve more requests."""
    return (8.0, 30.0) if n <= 4 else (6.0, 12.0) if n <= 16 else (6.0, 4.0) if n <= 128 else (2.0, 0.5)


def routing(times: Times) -> list[Line]:
    """Latency of 16 replicas by requests per second and router."""
    table(
        "requests/s per replica",
        "router",
        "prefix hit rate",
        "time to first token, p50",
        "p95",
        "latency, p95",
        "completed",
    )
    lines = []
    for name, kind in (("prefix", ByPrefix), ("two choices", TwoChoices)):
        points = []
        for each in (10, 20, 30, 40, 50, 60):
            service, done = steady(times, 16, each, kind(), length(16))
            firsts, hits = first_tokens(done), sum(request.hit for request in done) / max(1, len(done))
            whole = quantile([request.finished - request.arrived for request in done], 0.95)
            arrived = len(done) + sum(request.arrived > 6.0 for request in service._waiting)
            row(
                each,
                name,
                f"{hits:.0%}",
                ms(quantile(firsts, 0.5)),
                ms(quantile(firsts, 0.95)),
                ms(whole),
                f"{len(done) / arrived:.0%}",
            )
            points.append((float(each), quantile(firsts, 0.95)))
        lines.append(Line(name, points))
    return lines


def replicas(times: Times) -> list[Line]:
    """1 to 1,000 replicas at 30 requests per second each: with one coordinator, without, and in cells."""
    table(
        "replicas",
        "requests/s",
        "coordinator utilisation",
        "time to first token, p50",
        "p95",
        "p95 without a coordinator",
        "p95 in cells",
    )
    for n in (1, 4, 8, 12, 14, 64, 1000):
        free = quantile(first_tokens(steady(times, n, RATE, ByPrefix(), length(n))[1]), 0.95)
        busy = coordinator_busy(n)
        one = with_coordinator(times, n) if busy < 1 else []
        cells = quantile(with_coordinator(times, CELL), 0.95)
        row(
            n,
            n * RATE,
            f"{busy:.0%}",
            *((ms(quantile(one, 0.5)), ms(quantile(one, 0.95))) if one else ("unbounded", "unbounded")),
            ms(free),
            f"{ms(cells)}, {-(-n // CELL)} cells" if n > CELL else "",
        )
    return []


def coordinator_busy(n: int) -> float:
    """CPU utilisation of the coordinator with n replicas and n fronts; over 1, it is overloaded."""
    return n * (RATE * COSTS["admission"] + COSTS["report_engine"] + COSTS["report_front"])


def with_coordinator(times: Times, n: int) -> list[float]:
    """Times to first token of n replicas with a coordinator, whose calls are slowed down by the reports."""
    call = COSTS["admission"] / (1 - n * (COSTS["report_engine"] + COSTS["report_front"]))
    options = {"admission": Station(), "admission_call": call}
    return first_tokens(steady(times, n, RATE, ByPrefix(), length(n), **options)[1])


def scaling(times: Times) -> list[Line]:
    """Autoscaling after a step to four times the load, by provisioning time of a machine."""
    table(
        "provisioning",
        "upscale_delay",
        "time to first token, p95",
        "maximum queue length",
        "time to drain the queue",
    )
    lines, surge = [], 60.0
    for provision, delay in ((0.0, 5.0), (0.0, 30.0), (60.0, 30.0), (180.0, 30.0)):
        env = simpy.Environment()
        service = Service(env, times, 2, ByPrefix())
        rule = Autoscaling(2, 20, target=32, upscale_delay=delay, provision=provision)
        env.process(service.autoscale(rule))
        Users(service, lambda now: 40.0 if now < surge else 160.0, CONVERSATIONS)
        queue: list[tuple[float, float]] = []

        def watch(env: simpy.Environment = env, queue: Any = queue, service: Service = service) -> Any:
            while True:
                yield env.timeout(1.0)
                queue.append((env.now, len(service.queue)))

        env.process(watch())
        env.run(surge + 90 + 1.6 * provision)
        late = [at for at, waiting in queue if waiting > 0]
        firsts = first_tokens([request for request in service.done if request.arrived > surge])
        row(
            f"{provision:.0f} s",
            f"{delay:.0f} s",
            ms(quantile(firsts, 0.95)),
            int(max(waiting for _, waiting in queue)),
            f"{max(late) - surge:.0f} s" if late else "no queue",
        )
        lines.append(Line(f"machine {provision:.0f} s, delay {delay:.0f} s", queue))
    return lines


def failures(times: Times) -> list[Line]:
    """Failures of replicas, detected after 0.5 s (processes) or 15 s (nodes)."""
    table(
        "replica failures per minute",
        "detected after",
        "latency, p99",
        "p99.9",
        "maximum",
        "restarted requests",
    )
    for per_minute, detect in ((0, 0.0), (10, 0.5), (10, 15.0)):
        life = Failures(60.0 * 16 / per_minute, detect) if per_minute else None
        _, done = steady(times, 16, 20, ByPrefix(), (6.0, 60.0), failures=life)
        whole = [request.finished - request.arrived for request in done]
        again = sum(request.restarts > 0 for request in done) / len(done)
        row(per_minute, f"{detect:g} s", *(ms(quantile(whole, q)) for q in (0.99, 0.999, 1)), f"{again:.2%}")
    return []


def fronts(times: Times) -> list[Line]:
    """Latency of 16 replicas by number of fronts."""
    table("fronts with one CPU", "requests/s", "utilisation", "time to first token, p95", "latency, p95")
    for n in (16, 24, 32, 48):
        front = Station(n)
        service, done = steady(
            times, 16, 30, ByPrefix(), (6.0, 6.0), front=front, front_token=FRONT_TOKEN + COSTS["stream"]
        )
        whole = quantile([request.finished - request.arrived for request in done], 0.95)
        busy = front.busy / n / service.env.now
        row(n, 480, f"{busy:.0%}", ms(quantile(first_tokens(done), 0.95)), ms(whole))
    return []


def batch(times: Times) -> list[Line]:
    """Utilisation of the workers of a batch job, by rows per part and number of workers."""
    image_row = times.image + times.prompt(284) + 64 * times.decode_step(64) / 64
    table("rows per part", "seconds per part", *(f"{n} workers" for n in (10, 100, 1000)))
    lines = []
    for rows in (8, 64, 512, 4096):
        points, cells = [], []
        for n in (10, 100, 1000):
            env = simpy.Environment()
            part = rows * image_row
            job = BatchJob(env, n, lambda part=part: part, lambda: COSTS["part"], in_advance=1)
            horizon = 20 * part + 20 * n * COSTS["part"]
            env.run(horizon)
            share = job.parts * part / horizon / n
            cells.append(f"{min(1.0, share):.0%}")
            points.append((float(n), share))
        row(rows, f"{rows * image_row:.1f}", *cells)
        lines.append(Line(f"{rows} rows per part", points))
    return lines


def costs(times: Times, price: float = 1.0) -> list[Line]:
    """Machine hours and price of a million images with captions of 64 tokens."""
    table("machine", "seconds per image", "machine hours per million", f"at {price:g} per hour")
    for name, seconds in MEASURED_IMAGE.items():
        hours = seconds * 1e6 / 3600
        row(name, f"{seconds:.3g}", f"{hours:,.1f}", f"{hours * price:,.1f}")
    return []


SCENARIOS: dict[str, Callable[..., list[Line]]] = {
    each.__name__: each for each in (routing, replicas, fronts, scaling, failures, batch, costs)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SCENARIOS, help="run only this scenario")
    parser.add_argument(
        "--profile", choices=PROFILES, default="h200-bf16", help="service times of the engines"
    )
    parser.add_argument(
        "--price", type=float, default=1.0, help="price of a machine per hour, for the scenario `costs`"
    )
    parser.add_argument(
        "--figure", type=Path, help="SVG file for the queue lengths of the scenario `scaling`"
    )
    arguments = parser.parse_args()
    for name, scenario in SCENARIOS.items():
        if arguments.only in (None, name):
            print(f"\n{name}: {(scenario.__doc__ or '').splitlines()[0]}")
            lines = scenario(PROFILES[arguments.profile], *([arguments.price] if scenario is costs else []))
            if arguments.figure and name == "scaling":
                arguments.figure.write_text(figure(lines, "seconds", "waiting requests"), "utf-8")


if __name__ == "__main__":
    main()
