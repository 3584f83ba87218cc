"""Simulation of 1 to 1,000 replicas with measured service times: routing, fronts, autoscaling, failures, batch jobs.

docs/scaling.md contains the results. Needs simpy, which is in the extra `dev`; takes some minutes. The scenario `costs`
is computed, not simulated.
Run: python benchmarks/scale.py [--only NAME] [--profile NAME] [--price PRICE] [--figure FILE.svg]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import simpy
from scale_batch import BatchJob
from scale_cluster import Autoscaling, Failures, Service
from scale_figure import Line, figure
from scale_load import Conversations, Users
from scale_replica import Request
from scale_router import ByPrefix, Router, TwoChoices
from scale_station import Station
from scale_times import COSTS, FRONT_TOKEN, IMAGE_SECONDS, PROFILES, Times

# The conversations of docs/scaling.md. The think time is shorter than the default of 5 s, so that a run reaches its
# steady state soon.
CONVERSATIONS = Conversations(think=1.0)
# Requests per second per replica, in the scenarios `replicas` and `fronts`.
RATE = 30
# The scenario `replicas`: replicas per cell. A cell is a service with its own coordinator, the process that admits the
# requests of all fronts (cluster/serve/coordinator.py).
CELL = 8
# A row of a batch job: tokens of a prompt with one image, and of its caption; rows that an engine decodes concurrently.
PROMPT_TOKENS = CONVERSATIONS.first
CAPTION_TOKENS = 64
BATCH_ROWS = 64


def table(*headers: str) -> None:
    print(f"\n| {' | '.join(headers)} |\n|{' --- |' * len(headers)}")


def row(*cells: Any) -> None:
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def ms(seconds: float) -> str:
    """Format a duration in milliseconds, from 10 seconds on in seconds."""
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"


def quantile(values: list[float], fraction: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, int(fraction * len(values)))] if values else float("nan")


def steady(
    times: Times, n_replicas: int, rate: float, router: Router, seconds: tuple[float, float], **options: Any
) -> tuple[Service, list[Request]]:
    """Simulate a service under constant load; return it and its completed requests that arrived after the warm-up.

    Args:
        rate: requests per second per replica.
        seconds: duration of the warm-up, and of the measurement after it.
        options: further arguments of Service.
    """
    env = simpy.Environment()
    service = Service(env, times, n_replicas, router, **options)
    Users(service, n_replicas * rate, CONVERSATIONS)
    warm_up, measured = seconds
    env.run(warm_up + measured)
    return service, [request for request in service.done if request.arrived > warm_up]


def first_token_times(requests: list[Request]) -> list[float]:
    """Time to first token of each request, in seconds."""
    return [request.first - request.arrived for request in requests]


def latencies(requests: list[Request]) -> list[float]:
    """Time from arrival to completion of each request, in seconds."""
    return [request.finished - request.arrived for request in requests]


def run_seconds(n_replicas: int) -> tuple[float, float]:
    """Return (warm-up, measured) seconds of a run: shorter with more replicas, which serve more requests."""
    if n_replicas <= 4:
        return 8.0, 30.0
    if n_replicas <= 16:
        return 6.0, 12.0
    if n_replicas <= 128:
        return 6.0, 4.0
    return 2.0, 0.5


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
    seconds = warm_up, _ = run_seconds(16)
    for name, router_class in (("prefix", ByPrefix), ("two choices", TwoChoices)):
        for rate in (10, 20, 30, 40, 50, 60):
            service, done = steady(times, 16, rate, router_class(), seconds)
            firsts = first_token_times(done)
            hit_rate = sum(request.hit for request in done) / max(1, len(done))
            n_arrived = len(done) + sum(request.arrived > warm_up for request in service.unfinished)
            row(
                rate,
                name,
                f"{hit_rate:.0%}",
                ms(quantile(firsts, 0.5)),
                ms(quantile(firsts, 0.95)),
                ms(quantile(latencies(done), 0.95)),
                f"{len(done) / n_arrived:.0%}",
            )
    return []


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
        _, uncoordinated = steady(times, n, RATE, ByPrefix(), run_seconds(n))
        utilisation = coordinator_utilisation(n)
        if utilisation < 1:
            firsts = with_coordinator(times, n)
            coordinated = [ms(quantile(firsts, fraction)) for fraction in (0.5, 0.95)]
        else:
            coordinated = ["unbounded", "unbounded"]
        n_cells = math.ceil(n / CELL)
        # Cells are independent of each other, so one full cell is simulated, whatever n is.
        in_cells = quantile(with_coordinator(times, CELL), 0.95)
        row(
            n,
            n * RATE,
            f"{utilisation:.0%}",
            *coordinated,
            ms(quantile(first_token_times(uncoordinated), 0.95)),
            f"{ms(in_cells)}, {n_cells} cells" if n_cells > 1 else "",
        )
    return []


def coordinator_utilisation(n: int) -> float:
    """CPU utilisation of the coordinator with n replicas and n fronts; from 1 on, it is overloaded."""
    return n * (RATE * COSTS["admission"] + COSTS["report_engine"] + COSTS["report_front"])


def with_coordinator(times: Times, n: int) -> list[float]:
    """Times to first token of a service with n replicas, n fronts and a coordinator, in seconds.

    The reports of engines and fronts occupy a share of the coordinator's CPU, which slows down each admission.
    """
    reports = n * (COSTS["report_engine"] + COSTS["report_front"])  # each process reports once per second
    call = COSTS["admission"] / (1 - reports)
    options = {"admission": Station(), "admission_call": call}
    _, done = steady(times, n, RATE, ByPrefix(), run_seconds(n), **options)
    return first_token_times(done)


def scaling(times: Times) -> list[Line]:
    """Autoscaling when the load rises from 40 to 160 requests per second, by provisioning time of a machine."""
    table(
        "provisioning",
        "upscale_delay",
        "time to first token, p95",
        "maximum queue length",
        "time to drain the queue",
    )
    lines, surge = [], 60.0  # time of the rise, in seconds
    for provision, delay in ((0.0, 5.0), (0.0, 30.0), (60.0, 30.0), (180.0, 30.0)):
        env = simpy.Environment()
        service = Service(env, times, 2, ByPrefix())
        rule = Autoscaling(smallest=2, largest=20, target=32, upscale_delay=delay, provision=provision)
        env.process(service.autoscale(rule))
        Users(service, lambda now: 40.0 if now < surge else 160.0, CONVERSATIONS)
        samples: list[tuple[float, float]] = []  # (time, length of the queue), once per second

        def watch(env: simpy.Environment = env, samples: Any = samples, service: Service = service) -> Any:
            while True:
                yield env.timeout(1.0)
                samples.append((env.now, len(service.queue)))

        env.process(watch())
        env.run(surge + 90 + 1.6 * provision)  # long enough to drain the queue
        queue_times = [now for now, length in samples if length > 0]
        firsts = first_token_times([request for request in service.done if request.arrived > surge])
        row(
            f"{provision:.0f} s",
            f"{delay:.0f} s",
            ms(quantile(firsts, 0.95)),
            int(max(length for _, length in samples)),
            f"{max(queue_times) - surge:.0f} s" if queue_times else "no queue",
        )
        lines.append(Line(f"machine {provision:.0f} s, delay {delay:.0f} s", samples))
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
    n_replicas = 16
    for per_minute, detect in ((0, 0.0), (10, 0.5), (10, 15.0)):
        # per_minute counts the failures of all replicas together.
        rule = Failures(60.0 * n_replicas / per_minute, detect) if per_minute else None
        _, done = steady(times, n_replicas, 20, ByPrefix(), (6.0, 60.0), failures=rule)
        restarted = sum(request.restarts > 0 for request in done) / len(done)
        row(
            per_minute,
            f"{detect:g} s",
            *(ms(quantile(latencies(done), fraction)) for fraction in (0.99, 0.999, 1)),
            f"{restarted:.2%}",
        )
    return []


def fronts(times: Times) -> list[Line]:
    """Latency of 16 replicas by number of fronts."""
    table("fronts with one CPU", "requests/s", "utilisation", "time to first token, p95", "latency, p95")
    n_replicas = 16
    for n in (16, 24, 32, 48):
        front = Station(n)
        options = {"front": front, "front_token": FRONT_TOKEN + COSTS["stream"]}
        service, done = steady(times, n_replicas, RATE, ByPrefix(), (6.0, 6.0), **options)
        utilisation = front.busy / n / service.env.now
        row(
            n,
            n_replicas * RATE,
            f"{utilisation:.0%}",
            ms(quantile(first_token_times(done), 0.95)),
            ms(quantile(latencies(done), 0.95)),
        )
    return []


def batch(times: Times) -> list[Line]:
    """Utilisation of the workers of a batch job, by rows per part and number of workers."""
    decode = CAPTION_TOKENS * times.decode_step(BATCH_ROWS) / BATCH_ROWS
    row_seconds = times.image + times.prompt(PROMPT_TOKENS) + decode
    table("rows per part", "seconds per part", *(f"{n} workers" for n in (10, 100, 1000)))
    for rows in (8, 64, 512, 4096):
        part_seconds = rows * row_seconds
        cells = []
        for n in (10, 100, 1000):
            env = simpy.Environment()
            job = BatchJob(
                env, n, lambda part_seconds=part_seconds: part_seconds, lambda: COSTS["part"], in_advance=1
            )
            # The time of 20 parts per worker if the driver assigned all of them before the workers start.
            horizon = 20 * part_seconds + 20 * n * COSTS["part"]
            env.run(horizon)
            cells.append(f"{job.parts * part_seconds / horizon / n:.0%}")
        row(rows, f"{part_seconds:.1f}", *cells)
    return []


def costs(times: Times, price: float = 1.0) -> list[Line]:
    """Machine hours and price of a million images with captions of 64 tokens.

    The table has all machines; `times`, of one of them, is not used.
    """
    table("machine", "seconds per image", "machine hours per million", f"at {price:g} per hour")
    for name, seconds in IMAGE_SECONDS.items():
        hours = seconds * 1e6 / 3600
        row(name, f"{seconds:.3g}", f"{hours:,.1f}", f"{hours * price:,.1f}")
    return []


# A scenario prints a table. It returns the lines of the figure, which only `scaling` has.
SCENARIOS: dict[str, Callable[..., list[Line]]] = {
    scenario.__name__: scenario for scenario in (routing, replicas, fronts, scaling, failures, batch, costs)
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
            if arguments.figure and lines:
                arguments.figure.write_text(figure(lines, "seconds", "waiting requests"), "utf-8")


if __name__ == "__main__":
    main()
