"""The simulation of benchmarks/scale.py against closed forms of queueing theory, Little's law and measured times.

Also its routing, failures and autoscaling, and the figure.
"""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

simpy = pytest.importorskip("simpy", reason="pip install 'paddlemix-qwenvl-plugin[dev]'")

from scale_batch import BatchJob  # noqa: E402
from scale_cluster import Autoscaling, Failures, Service  # noqa: E402
from scale_figure import Line, figure, ticks  # noqa: E402
from scale_load import Conversations, Users, arrivals, geometric  # noqa: E402
from scale_replica import Request  # noqa: E402
from scale_router import ByPrefix, Router, TwoChoices  # noqa: E402
from scale_station import Station  # noqa: E402
from scale_times import H200_BF16, IMAGE_SECONDS, Times  # noqa: E402

BENCHMARKS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
# Service times of a millisecond per decode step; images and prompts take no time.
DECODE_ONLY = Times(0.0, 0.0, 0.0, ((1, 1e-3),), start=0.0, cached_tokens=0)


def erlang_c(servers: int, load: float) -> float:
    """Probability that an arrival of M/M/c waits; `load` is arrival rate times service time (Erlang's C formula)."""
    terms_below_c = [load**k / math.factorial(k) for k in range(servers)]
    all_busy = load**servers / math.factorial(servers) * servers / (servers - load)
    return all_busy / (sum(terms_below_c) + all_busy)


def mmc_wait(servers: int, rate: float, service: float) -> float:
    """Mean waiting time of M/M/c."""
    load = rate * service
    return erlang_c(servers, load) * service / (servers - load)


# Closed forms


def test_erlang_c_agrees_with_published_tables() -> None:
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(5, 4.0) == pytest.approx(0.5541, abs=1e-4)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (1, 0.8), (4, 3.2), (16, 14.0)])
def test_station_waiting_time_is_that_of_mmc(servers: int, load: float) -> None:
    rng, station, now = random.Random(1), Station(servers), 0.0
    n = 100_000
    for _ in range(n):
        now += rng.expovariate(load)
        station.visit(now, rng.expovariate(1.0))
    assert station.waited / n == pytest.approx(mmc_wait(servers, load, 1.0), rel=0.1)
    assert station.busy / now == pytest.approx(load, rel=0.02)


def test_station_with_constant_service_time_waits_as_md1() -> None:
    rng, station, now = random.Random(2), Station(), 0.0
    load = 0.8
    for _ in range(200_000):
        now += rng.expovariate(load)
        station.visit(now, 1.0)
    assert station.waited / station.visits == pytest.approx(load / (2 * (1 - load)), rel=0.05)


def simulate(
    replicas: int,
    rate: float,
    mean_tokens: float,
    n_requests: int,
    times: Times = DECODE_ONLY,
    max_running: int = 1,
) -> Service:
    """Service with Poisson arrivals of requests without images and prompts, until n_requests or more are done."""
    env, rng = simpy.Environment(), random.Random(3)
    service = Service(env, times, replicas, TwoChoices(), max_running)

    def submit() -> None:
        tokens = geometric_plus_one(rng, mean_tokens)
        service.submit(Request(conversation=0, prefix=0, prompt=0, tokens=tokens, images=0))

    env.process(arrivals(env, rate, rng, submit))
    while len(service.done) < n_requests:
        env.run(env.now + 1000)
    return service


def geometric_plus_one(rng: random.Random, mean: float) -> int:
    """Draw from the geometric distribution by inversion, and add the first token, which takes no time here."""
    return 2 + int(math.log(1 - rng.random()) / math.log(1 - 1 / mean))


def mean_response_time(service: Service) -> float:
    return sum(request.finished - request.arrived for request in service.done) / len(service.done)


@pytest.mark.parametrize(("replicas", "load"), [(1, 0.7), (4, 3.0)])
def test_service_with_one_slot_per_replica_waits_as_mmc(replicas: int, load: float) -> None:
    """Service times are nearly exponential with a mean of 1 s: a geometric number of tokens, mean 1000, 1 ms each."""
    service = simulate(replicas, load, 1000, 20_000)
    assert mean_response_time(service) == pytest.approx(1.0 + mmc_wait(replicas, load, 1.0), rel=0.1)
    utilisation = sum(replica.busy for replica in service.live) / replicas / service.env.now
    assert utilisation == pytest.approx(load / replicas, rel=0.03)


def test_replica_with_steps_proportional_to_rows_responds_as_processor_sharing() -> None:
    """M/M/1 processor sharing: the mean response time is service time / (1 - load), here with a service time of 1 s."""
    proportional = Times(0.0, 0.0, 0.0, ((1, 0.01), (2, 0.02)), start=0.0, cached_tokens=0)
    service = simulate(1, 0.6, 100, 12_000, proportional, max_running=10_000)
    assert mean_response_time(service) == pytest.approx(1 / (1 - 0.6), rel=0.08)


@pytest.mark.parametrize("workers", [2, 5, 12])
def test_batch_job_throughput_is_that_of_the_machine_repair_model(workers: int) -> None:
    """M/M/1//N: durations are exponential, with mean 1 for parts and mean 0.2 for the driver."""
    env, rng, driver = simpy.Environment(), random.Random(4), 0.2
    job = BatchJob(env, workers, lambda: rng.expovariate(1.0), lambda: rng.expovariate(1 / driver))
    env.run(3000)
    driver_idle = 1 / sum(
        math.factorial(workers) / math.factorial(workers - k) * driver**k for k in range(workers + 1)
    )
    assert job.parts / env.now == pytest.approx((1 - driver_idle) / driver, rel=0.04)


@pytest.mark.parametrize(
    ("workers", "parts_per_second"),
    [(4, 4.0), (10, 5.0)],
    ids=["limited by the workers", "limited by the driver"],
)
def test_parts_in_advance_hide_the_driver_until_it_is_the_limit(
    workers: int, parts_per_second: float
) -> None:
    env = simpy.Environment()
    job = BatchJob(env, workers, lambda: 1.0, lambda: 0.2, in_advance=1)
    env.run(500)
    assert job.parts / env.now == pytest.approx(parts_per_second, rel=0.02)


# Little's law


@pytest.mark.parametrize("router", [TwoChoices(), ByPrefix()], ids=["two choices", "prefix"])
def test_littles_law(router: Router) -> None:
    """Mean number of ongoing requests = rate x mean latency, with admission of each request and failing replicas."""
    env = simpy.Environment()
    service = Service(
        env,
        H200_BF16,
        4,
        router,
        admission=Station(),
        admission_call=3e-3,
        failures=Failures(mean_time_to_failure=20.0, detect=0.5),
    )
    Users(service, 80.0)
    env.run(40)
    mean_ongoing = service.area_until_now() / env.now
    latencies = [request.finished - request.arrived for request in service.done]
    rate, mean_latency = len(latencies) / env.now, sum(latencies) / len(latencies)
    assert mean_ongoing == pytest.approx(rate * mean_latency, rel=0.05)
    # Exact if the time of the unfinished requests is included.
    unfinished = [env.now - request.arrived for request in service.unfinished]
    assert mean_ongoing * env.now == pytest.approx(sum(latencies) + sum(unfinished))
    assert service.admission is not None
    assert service.admission.busy == pytest.approx(service.admission.visits * 3e-3)


# Measured times


def test_simulated_times_agree_with_the_table_of_benchmarks_md() -> None:
    text = BENCHMARKS.read_text("utf-8")

    def measured(row: str) -> float:
        """Time of a row of the GPU table, in seconds; its second cell is the storage type, its third milliseconds."""
        match = re.search(rf"^\| {re.escape(row)} \| bf16 \| ([\d.]+) \|", text, re.MULTILINE)
        assert match, row
        return float(match[1]) / 1000

    assert H200_BF16.image == measured("vision, 1 image")
    for rows in (1, 8, 32, 64):
        assert H200_BF16.decode_step(rows) == pytest.approx(measured(f"decode, batch {rows}, 300 positions"))
    for tokens in (284, 2000):
        assert H200_BF16.prompt(tokens) == pytest.approx(measured(f"prefill, {tokens} tokens"))
    env = simpy.Environment()
    service = Service(env, H200_BF16, 1)
    service.submit(Request(conversation=1, prefix=0, prompt=284, tokens=64, images=1))
    env.run()
    assert env.now == pytest.approx(measured("caption of 64 tokens, one image"), rel=0.02)
    for _ in range(64):
        service.submit(Request(conversation=1, prefix=0, prompt=284, tokens=64, images=1))
    begin = env.now
    env.run()
    # Slower than measured: the simulated engine encodes the image of one request per step. The measured run encoded all
    # images first, in batches of eight.
    concurrent = measured("64 requests at once, an image and 64 tokens each")
    assert concurrent < env.now - begin < 1.4 * concurrent


def test_costs_per_image_agree_with_the_tables_of_scaling_md_and_benchmarks_md() -> None:
    scaling = BENCHMARKS.with_name("scaling.md").read_text("utf-8")
    benchmarks = BENCHMARKS.read_text("utf-8")
    for name, seconds in IMAGE_SECONDS.items():
        assert f"| {name} | {seconds:.3g} | {seconds * 1e6 / 3600:,.1f} |" in scaling
        if name.startswith("NVIDIA"):
            dtype = name.split()[-1].replace("bfloat16", "bf16")
            milliseconds = seconds * 64 * 1000
            row = f"| 64 requests at once, an image and 64 tokens each | {dtype} | {milliseconds:.0f} |"
            assert row in benchmarks
    # The measured parts of the figure for two CPUs: image and prompt.
    assert "| an image | 16.9 s | | 10.9 | |" in benchmarks
    assert "| a prompt of 300 tokens, and a token | 11.9 s | | 9.7 | |" in benchmarks


def test_figure_is_xml_and_contains_its_lines() -> None:
    text = figure([Line("a < b", [(0.0, 0.0), (10.0, 200.0)]), Line("c", [(5.0, 100.0)])], "x", "y")
    root = ElementTree.fromstring(text)
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 1]
    assert "a < b" in [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert ticks(200.0) == [0, 50, 100, 150, 200]


def test_decode_steps_are_interpolated_and_extrapolated() -> None:
    times = Times(image=0, chunk=0, token=0, decode=((1, 1.0), (3, 2.0)), start=0, cached_tokens=0)
    assert [times.decode_step(rows) for rows in (0, 1, 2, 3, 5)] == [0, 1.0, 1.5, 2.0, 3.0]


# Routing


def test_only_conversations_of_a_removed_replica_move() -> None:
    class StubReplica:
        ongoing = 0

        def __init__(self, number: int) -> None:
            self.number = number

    replicas: list[Any] = [StubReplica(number) for number in range(1, 21)]
    requests = [Request(number, prefix=0, prompt=0, tokens=1, images=0) for number in range(4000)]
    router = ByPrefix()

    def route(replicas: list[Any]) -> list[int]:
        """Numbers of the replicas that the router chooses for the requests."""
        router.changed(replicas)
        chosen = [router.choose(replicas, request, limit=1) for request in requests]
        return [replica.number for replica in chosen if replica is not None]

    before = route(replicas)
    after = route([replica for replica in replicas if replica.number != 7])
    assert len(before) == len(after) == len(requests)
    assert {number for number, new_number in zip(before, after) if number != new_number} == {7}
    # 200 conversations per replica on average.
    counts = [before.count(replica.number) for replica in replicas]
    assert min(counts) > 120
    assert max(counts) < 280


def hit_rate(router: Router) -> float:
    """Prefix hit rate of eight replicas, for requests after a warm-up of 5 seconds."""
    env = simpy.Environment()
    service = Service(env, H200_BF16, 8, router)
    Users(service, 100.0, Conversations(turns=3.0, think=1.0))
    env.run(25)
    requests = [request for request in service.done if request.arrived > 5]
    return sum(request.hit for request in requests) / len(requests)


def test_hit_rate_of_prefix_routing_is_the_share_of_follow_up_questions() -> None:
    """Two of three requests are follow-up questions; a random one of eight replicas has the prefix in 1 of 8 cases."""
    assert hit_rate(ByPrefix()) == pytest.approx(2 / 3, abs=0.06)
    assert hit_rate(TwoChoices()) < 2 / 3 * 2 / 8  # twice the rate of a random choice


# Failures and scaling


def test_failures_neither_lose_nor_repeat_requests() -> None:
    env = simpy.Environment()
    detect = 2.0
    service = Service(
        env, H200_BF16, 6, ByPrefix(), failures=Failures(mean_time_to_failure=10.0, detect=detect, repair=1.0)
    )
    submitted: list[Request] = []
    submit = service.submit

    def record_and_submit(request: Request) -> simpy.Event:
        submitted.append(request)
        return submit(request)

    service.submit = record_and_submit  # type: ignore[method-assign]
    Users(service, 60.0, Conversations(turns=1.0))
    env.run(30)
    assert sum(request.restarts for request in service.done) > 20
    assert len(set(map(id, service.done))) == len(service.done)
    assert set(map(id, submitted)) == {id(request) for request in [*service.done, *service.unfinished]}
    # Requests that were running at a failure wait until it is detected.
    assert max(request.finished - request.arrived for request in service.done if request.restarts) > detect


def test_surge_starts_replicas_after_the_delays() -> None:
    env = simpy.Environment()
    service = Service(env, H200_BF16, 2)
    rule = Autoscaling(smallest=2, largest=16, target=2, upscale_delay=5, look_back=5, provision=20)
    env.process(service.autoscale(rule))
    surge = 30
    Users(service, lambda now: 5.0 if now < surge else 60.0, Conversations(turns=1.0))
    env.run(90)
    n_replicas = {now: n for now, _, n in service.history}  # an entry per second
    first_upscale = min(now for now, n in n_replicas.items() if n > 2)
    assert first_upscale >= surge + rule.upscale_delay + rule.provision + H200_BF16.start
    assert 4 < n_replicas[89.0] <= 16


def test_downscaling_restarts_no_requests() -> None:
    env = simpy.Environment()
    service = Service(env, H200_BF16, 10)
    env.process(
        service.autoscale(Autoscaling(smallest=2, largest=10, target=8, downscale_delay=10, look_back=5))
    )
    Users(service, 10.0, Conversations(turns=1.0))
    env.run(40)
    assert len(service.live) == 2
    assert len(service.done) > 200
    assert not any(request.restarts for request in service.done)


def test_geometric_distribution_has_the_given_mean() -> None:
    rng = random.Random(5)
    values = [geometric(rng, 3.0) for _ in range(20_000)]
    assert min(values) == 1
    assert sum(values) / len(values) == pytest.approx(3.0, rel=0.03)
