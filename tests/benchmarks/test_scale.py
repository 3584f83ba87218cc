"""The simulation of benchmarks/scale.py against closed forms of queueing theory, Little's law and measured times."""

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
from scale_times import H200_BF16, MEASURED_IMAGE, Times  # noqa: E402

BENCHMARKS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
# A service of tokens alone: no image, no prompt, a millisecond for each token of each request.
TOKENS = Times(0.0, 0.0, 0.0, ((1, 1e-3),), start=0.0, cached_tokens=0)


def erlang_c(servers: int, load: float) -> float:
    """Probability that an arrival of M/M/c waits; `load` is arrival rate times service time."""
    terms = [load**k / math.factorial(k) for k in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last)


def mmc_wait(servers: int, rate: float, service: float) -> float:
    """Mean waiting time of M/M/c."""
    load = rate * service
    return erlang_c(servers, load) * service / (servers - load)


# Closed forms


def test_erlang_c_is_that_of_the_tables() -> None:
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(5, 4.0) == pytest.approx(0.5541, abs=1e-4)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (1, 0.8), (4, 3.2), (16, 14.0)])
def test_a_station_waits_as_mmc(servers: int, load: float) -> None:
    rng, station, now = random.Random(1), Station(servers), 0.0
    n = 100_000
    for _ in range(n):
        now += rng.expovariate(load)
        station.visit(now, rng.expovariate(1.0))
    assert station.waited / n == pytest.approx(mmc_wait(servers, load, 1.0), rel=0.1)
    assert station.busy / now == pytest.approx(load, rel=0.02)


def test_a_station_of_constant_service_waits_as_md1() -> None:
    rng, station, now = random.Random(2), Station(), 0.0
    for _ in range(200_000):
        now += rng.expovariate(0.8)
        station.visit(now, 1.0)
    assert station.waited / station.visits == pytest.approx(0.8 / (2 * (1 - 0.8)), rel=0.05)


def completed(
    replicas: int, rate: float, tokens: float, n: int, times: Times = TOKENS, max_running: int = 1
) -> tuple[Service, list[Request]]:
    """Independent requests of a geometric number of tokens, until n are done."""
    env, rng = simpy.Environment(), random.Random(3)
    service = Service(env, times, replicas, TwoChoices(), max_running)
    env.process(
        arrivals(env, rate, rng, lambda: service.submit(Request(0, 0, 0, geometric_fast(rng, tokens), 0)))
    )
    while len(service.done) < n:
        env.run(env.now + 1000)
    return service, service.done


def geometric_fast(rng: random.Random, mean: float) -> int:
    """As scale_load.geometric, by inversion; the first token of a prompt without tokens takes no time here."""
    return 2 + int(math.log(1 - rng.random()) / math.log(1 - 1 / mean))


@pytest.mark.parametrize(("replicas", "load"), [(1, 0.7), (4, 3.0)])
def test_a_service_of_single_slots_waits_as_mmc(replicas: int, load: float) -> None:
    """A geometric number of tokens of a constant time each is nearly exponential: 1000 tokens, 1 s."""
    service, done = completed(replicas, load, 1000, 20_000)
    response = sum(request.finished - request.arrived for request in done) / len(done)
    assert response == pytest.approx(1.0 + mmc_wait(replicas, load, 1.0), rel=0.1)
    busy = sum(replica.busy for replica in service.live) / replicas / service.env.now
    assert busy == pytest.approx(load / replicas, rel=0.03)


def test_a_replica_that_shares_its_time_responds_as_processor_sharing() -> None:
    """Steps as long as they have rows: M/M/1 processor sharing, whose mean response is service / (1 - load)."""
    shared = Times(0.0, 0.0, 0.0, ((1, 0.01), (2, 0.02)), start=0.0, cached_tokens=0)
    _, done = completed(1, 0.6, 100, 12_000, shared, max_running=10_000)
    response = sum(request.finished - request.arrived for request in done) / len(done)
    assert response == pytest.approx(1 / (1 - 0.6), rel=0.08)


@pytest.mark.parametrize("workers", [2, 5, 12])
def test_a_batch_job_is_the_machine_repair_model(workers: int) -> None:
    """M/M/1//N: exponential parts of mean 1, driver of mean 0.2."""
    env, rng, driver = simpy.Environment(), random.Random(4), 0.2
    job = BatchJob(env, workers, lambda: rng.expovariate(1.0), lambda: rng.expovariate(1 / driver))
    env.run(3000)
    idle = 1 / sum(
        math.factorial(workers) / math.factorial(workers - k) * driver**k for k in range(workers + 1)
    )
    assert job.parts / env.now == pytest.approx((1 - idle) / driver, rel=0.04)


def test_parts_in_advance_hide_the_driver_until_it_is_the_limit() -> None:
    for workers, expected in ((4, 4.0), (10, 5.0)):
        env = simpy.Environment()
        job = BatchJob(env, workers, lambda: 1.0, lambda: 0.2, in_advance=1)
        env.run(500)
        assert job.parts / env.now == pytest.approx(expected, rel=0.02)


# Little's law


@pytest.mark.parametrize("router", [TwoChoices(), ByPrefix()], ids=["two choices", "prefix"])
def test_littles_law(router: Router) -> None:
    """Mean number inside = rate x mean time, with images, prefixes, dying replicas and a busy admission actor."""
    env = simpy.Environment()
    service = Service(
        env,
        H200_BF16,
        4,
        router,
        admission=Station(),
        admission_call=3e-3,
        failures=Failures(20.0, detect=0.5),
    )
    Users(service, 80.0)
    env.run(40)
    inside = service.area_until_now() / env.now
    times = [request.finished - request.arrived for request in service.done]
    # The requests still inside have spent part of their time.
    assert inside * env.now == pytest.approx(
        sum(times) + sum(env.now - request.arrived for request in service._waiting)
    )
    assert inside == pytest.approx(len(times) / env.now * (sum(times) / len(times)), rel=0.05)
    assert service.admission is not None
    assert service.admission.busy / env.now == pytest.approx(service.admission.visits * 3e-3 / env.now)


# Measured times


def test_the_times_are_those_of_the_tables() -> None:
    text = BENCHMARKS.read_text("utf-8")

    def measured(row: str) -> float:
        found = re.search(rf"^\| {re.escape(row)} \| bf16 \| ([\d.]+) \|", text, re.MULTILINE)
        assert found, row
        return float(found[1]) / 1000

    assert H200_BF16.image == measured("vision, 1 image")
    for rows in (1, 8, 32, 64):
        assert H200_BF16.decode_step(rows) == pytest.approx(measured(f"decode, batch {rows}, 300 positions"))
    for tokens in (284, 2000):
        assert H200_BF16.prompt(tokens) == pytest.approx(measured(f"prefill, {tokens} tokens"))
    env = simpy.Environment()
    service = Service(env, H200_BF16, 1)
    service.submit(Request(1, 0, 284, 64, images=1))
    env.run()
    assert env.now == pytest.approx(measured("caption of 64 tokens, one image"), rel=0.02)
    for _ in range(64):
        service.submit(Request(1, 0, 284, 64, images=1))
    begin = env.now
    env.run()
    # The server computes images one at a time, between steps; the measured run all of them first, in batches of 8.
    at_once = measured("64 requests at once, an image and 64 tokens each")
    assert at_once < env.now - begin < 1.4 * at_once


def test_the_costs_of_the_page_are_those_of_the_tables() -> None:
    page = BENCHMARKS.with_name("scaling.md").read_text("utf-8")
    text = BENCHMARKS.read_text("utf-8")
    for name, seconds in MEASURED_IMAGE.items():
        assert f"| {name} | {seconds:.3g} | {seconds * 1e6 / 3600:,.1f} |" in page
        if name.startswith("NVIDIA"):
            dtype = name.split()[-1].replace("bfloat16", "bf16")
            row = f"| 64 requests at once, an image and 64 tokens each | {dtype} | {seconds * 64000:.0f} |"
            assert row in text
    # Of two CPUs: an image, a prompt, a step of 64 rows for each of 64 tokens.
    assert "| an image | 16.9 s | | 10.9 | |" in text
    assert "| a prompt of 300 tokens, and a token | 11.9 s | | 9.7 | |" in text


def test_a_figure_is_xml_and_shows_its_lines() -> None:
    text = figure([Line("a < b", [(0.0, 0.0), (10.0, 200.0)]), Line("c", [(5.0, 100.0)])], "x", "y")
    root = ElementTree.fromstring(text)
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 1]
    assert "a < b" in [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert ticks(200.0) == [0, 50, 100, 150, 200]


def test_decode_steps_are_interpolated_and_extended() -> None:
    times = Times(0, 0, 0, ((1, 1.0), (3, 2.0)), 0, 0)
    assert [times.decode_step(rows) for rows in (0, 1, 2, 3, 5)] == [0, 1.0, 1.5, 2.0, 3.0]


# Routing


def test_rendezvous_moves_only_the_share_of_the_replica_that_leaves() -> None:
    class Numbered:
        ongoing = 0

        def __init__(self, number: int) -> None:
            self.number = number

    replicas: list[Any] = [Numbered(number) for number in range(1, 21)]
    requests = [Request(one, 0, 0, 1, 0) for one in range(4000)]
    router = ByPrefix()

    def homes(among: list[Any]) -> list[int]:
        router.changed(among)
        found = [router.choose(among, request, 1) for request in requests]
        return [each.number for each in found if each is not None]

    before, after = homes(replicas), homes([each for each in replicas if each.number != 7])
    assert len(before) == len(after) == len(requests)
    assert {one for one, other in zip(before, after) if one != other} == {7}
    counts = [before.count(each.number) for each in replicas]
    assert min(counts) > 120
    assert max(counts) < 280


def hits(router: Router) -> float:
    env = simpy.Environment()
    service = Service(env, H200_BF16, 8, router)
    Users(service, 100.0, Conversations(turns=3.0, think=1.0))
    env.run(25)
    later = [request for request in service.done if request.arrived > 5]
    return sum(request.hit for request in later) / len(later)


def test_prefix_routing_finds_the_prefix() -> None:
    """Two of three requests are further turns; at random, one in eight of these comes to the same replica."""
    assert hits(ByPrefix()) == pytest.approx(2 / 3, abs=0.06)
    assert hits(TwoChoices()) < 2 / 3 * 2 / 8


# Failures and scaling


def test_no_request_is_lost_and_none_is_done_twice() -> None:
    env = simpy.Environment()
    service = Service(env, H200_BF16, 6, ByPrefix(), failures=Failures(10.0, detect=2.0, repair=1.0))
    started: list[Request] = []
    submit = service.submit
    service.submit = lambda request: (started.append(request), submit(request))[1]  # type: ignore[method-assign]
    Users(service, 60.0, Conversations(turns=1.0))
    env.run(30)
    assert sum(request.restarts for request in service.done) > 20
    assert len(set(map(id, service.done))) == len(service.done)
    assert set(map(id, started)) == {id(request) for request in [*service.done, *service._waiting]}
    # Those that were running waited until the death was noticed; others came to the dead replica later.
    assert max(request.finished - request.arrived for request in service.done if request.restarts) > 2.0


def test_a_surge_starts_replicas_after_the_delays() -> None:
    env = simpy.Environment()
    service = Service(env, H200_BF16, 2)
    rule = Autoscaling(2, 16, target=2, upscale_delay=5, look_back=5, provision=20)
    env.process(service.autoscale(rule))
    Users(service, lambda now: 5.0 if now < 30 else 60.0, Conversations(turns=1.0))
    env.run(90)
    sizes = {now: live for now, _, live in service.history}
    grown = min(now for now, live in sizes.items() if live > 2)
    assert grown >= 30 + rule.upscale_delay + rule.provision + H200_BF16.start
    assert 4 < sizes[89.0] <= 16


def test_a_quiet_service_gives_replicas_back_one_request_at_a_time() -> None:
    env = simpy.Environment()
    service = Service(env, H200_BF16, 10)
    env.process(service.autoscale(Autoscaling(2, 10, target=8, downscale_delay=10, look_back=5)))
    Users(service, 10.0, Conversations(turns=1.0))
    env.run(40)
    assert len(service.live) == 2
    assert len(service.done) > 200
    assert not any(request.restarts for request in service.done)


def test_geometric_numbers() -> None:
    rng = random.Random(5)
    values = [geometric(rng, 3.0) for _ in range(20_000)]
    assert min(values) == 1
    assert sum(values) / len(values) == pytest.approx(3.0, rel=0.03)
