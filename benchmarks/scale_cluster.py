"""Simulated service of many replicas: admission, routing, a common queue, autoscaling, failures."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import simpy
from scale_replica import Replica, Request
from scale_router import ByPrefix, Router, TwoChoices
from scale_station import Station
from scale_times import Times


@dataclass
class Autoscaling:
    """Ray Serve's autoscaling rule: mean ongoing requests of `look_back` seconds over the target, after a delay."""

    smallest: int
    largest: int
    target: float
    upscale_delay: float = 30.0
    downscale_delay: float = 600.0
    look_back: float = 30.0
    # Seconds until the engine of a new replica can start: new machine, container image, files.
    provision: float = 0.0


@dataclass
class Failures:
    """Failures of replicas.

    Attributes:
        mean_life: mean time to failure of a replica, exponentially distributed.
        detect: time until its requests are resubmitted: about 0 for a process, 15 s or more for a node.
        repair: time until the engine of its replacement starts.
    """

    mean_life: float
    detect: float = 0.0
    repair: float = 0.0


@dataclass
class Service:
    """Simulated service, with measurements.

    Attributes:
        max_running: maximum number of requests per replica.
        front, front_token: station of the fronts' CPUs, and its seconds per token.
        admission, admission_call: station of the coordinator, and its seconds per request.
        done: the completed requests.
        area: integral of the number of requests in the system, in request seconds.
    """

    env: simpy.Environment
    times: Times
    replicas: int
    router: Router = field(default_factory=TwoChoices)
    max_running: int = 64
    front: Station | None = None
    front_token: float = 0.0
    admission: Station | None = None
    admission_call: float = 0.0
    failures: Failures | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.live: list[Replica] = []
        self.starting = 0
        self.queue: deque[Request] = deque()
        self.done: list[Request] = []
        self.inside = 0
        self.area = self._since = 0.0
        self.history: list[tuple[float, int, int]] = []
        self._number = 0
        self._random = random.Random(self.seed)
        for _ in range(self.replicas):
            self._join()

    # Requests

    def submit(self, request: Request) -> simpy.Event:
        """Submit a request; the returned event is its completion."""
        request.arrived = self.env.now
        self._count(1)
        request_done = self.env.event()
        self._waiting[request] = request_done
        wait = self.admission.visit(self.env.now, self.admission_call) if self.admission else 0.0
        self._after(wait + self.admission_call, lambda: self._dispatch(request))
        return request_done

    @property
    def _waiting(self) -> dict[Request, simpy.Event]:
        return self.__dict__.setdefault("_events", {})

    def _dispatch(self, request: Request) -> None:
        replica = None if self.queue else self._choose(request)
        if replica is None:
            self.queue.append(request)
        else:
            replica.submit(request)

    def _choose(self, request: Request) -> Replica | None:
        if isinstance(self.router, ByPrefix):
            self.router.ongoing = self.inside
        return self.router.choose(self.live, request, self.max_running)

    def _drain(self) -> None:
        while self.queue:
            replica = self._choose(self.queue[0])
            if replica is None:
                return
            replica.submit(self.queue.popleft())

    def _first_token(self, request: Request) -> None:
        if request.first < 0:
            request.first = self.env.now + (self.front.backlog(self.env.now) if self.front else 0.0)

    def _finish(self, replica: Replica, request: Request) -> None:
        # The front sends tokens while the engine computes: only its backlog adds to the latency.
        late = self.front.visit(self.env.now, request.tokens * self.front_token) if self.front else 0.0
        self._after(late, lambda: self._leave(request))
        self._drain()

    def _leave(self, request: Request) -> None:
        request.finished = self.env.now
        self._count(-1)
        self.done.append(request)
        self._waiting.pop(request).succeed(request)

    def _count(self, change: int) -> None:
        self.area += self.inside * (self.env.now - self._since)
        self._since = self.env.now
        self.inside += change

    def area_until_now(self) -> float:
        """Return `area` up to the current time."""
        self._count(0)
        return self.area

    def _after(self, seconds: float, act: Any) -> None:
        if seconds <= 0:
            act()
        else:
            self.env.timeout(seconds).callbacks.append(lambda event: act())

    # Replicas

    def _join(self) -> None:
        self._number += 1
        replica = Replica(self._number, self.env, self.times, self._finish, self._first_token)
        self.live.append(replica)
        self.router.changed(self.live)
        if self.failures:
            self._after(self._random.expovariate(1 / self.failures.mean_life), lambda: self.kill(replica))
        self._drain()

    def start(self, delay: float) -> None:
        """Add a replica, which accepts requests after `delay` and the start of its engine."""
        self.starting += 1

        def ready() -> None:
            self.starting -= 1
            self._join()

        self._after(delay + self.times.start, ready)

    def kill(self, replica: Replica) -> None:
        """Fail a replica; after the detection time, start a replacement and resubmit its requests."""
        if replica not in self.live:
            return
        replica.alive = False
        failures = self.failures or Failures(math.inf)

        def detected() -> None:
            self.live.remove(replica)
            self.router.changed(self.live)
            self.start(failures.repair)
            for request in replica.lost():
                request.restarts += 1
                self._dispatch(request)

        self._after(failures.detect, detected)

    def retire(self) -> None:
        """Remove the least loaded replica from routing; it completes its requests."""
        replica = min(self.live, key=lambda each: each.ongoing)
        self.live.remove(replica)
        self.router.changed(self.live)

    def autoscale(self, rule: Autoscaling) -> Iterator[Any]:
        """Simulation process that applies the rule once per second."""
        samples: deque[float] = deque(maxlen=round(rule.look_back))
        above = below = 0.0
        area = self.area_until_now()
        while True:
            yield self.env.timeout(1.0)
            now_area = self.area_until_now()
            samples.append(now_area - area)
            area = now_area
            have = len(self.live) + self.starting
            mean = sum(samples) / len(samples)
            wanted = min(rule.largest, max(rule.smallest, math.ceil(mean / rule.target)))
            above, below = (above + 1 if wanted > have else 0), (below + 1 if wanted < have else 0)
            if above > rule.upscale_delay:
                for _ in range(wanted - have):
                    self.start(rule.provision)
            elif below > rule.downscale_delay:
                for _ in range(min(have - wanted, len(self.live) - rule.smallest)):
                    self.retire()
            self.history.append((self.env.now, self.inside, len(self.live)))
