"""Simulated service of several replicas: admission, routing, one queue for all replicas, autoscaling, failures."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import simpy
from scale_replica import Replica, Request
from scale_router import ByPrefix, Router, TwoChoices
from scale_station import Station
from scale_times import Times


@dataclass
class Autoscaling:
    """Ray Serve's autoscaling rule.

    The desired number of replicas is the mean number of ongoing requests, divided by `target`.

    Attributes:
        smallest, largest: limits of the number of replicas.
        target: ongoing requests per replica.
        upscale_delay, downscale_delay: seconds for which more or fewer replicas must be desired before a change.
        look_back: seconds over which the mean is taken.
        provision: seconds until the engine of a new replica can start: new machine, container image, files.
    """

    smallest: int
    largest: int
    target: float
    upscale_delay: float = 30.0
    downscale_delay: float = 600.0
    look_back: float = 30.0
    provision: float = 0.0


@dataclass
class Failures:
    """Failures of replicas; all times are in seconds.

    Attributes:
        mean_time_to_failure: mean of the exponentially distributed time from the start of a replica to its failure.
        detect: from a failure to its detection, when the requests are resubmitted: less than 1 for a process, 15 or
            more for a node.
        repair: from the detection until the engine of the replacement starts.
    """

    mean_time_to_failure: float
    detect: float = 0.0
    repair: float = 0.0


@dataclass
class Service:
    """Simulated service, with measurements.

    Attributes:
        max_running: maximum number of requests per replica.
        front, front_token: station of the fronts' CPUs (None: they take no time), and its seconds per token.
        admission, admission_call: station of the coordinator, the process that admits requests (None: none is
            simulated), and its seconds per request.
        failures: None: no replica fails. Not together with `autoscale`, which may retire a failed replica before the
            failure is detected.
        live: the replicas to which requests are routed, including a failed replica until its failure is detected.
        starting: number of replicas that are starting.
        queue: requests for which no replica has a slot.
        unfinished: completion event of each request in the system.
        ongoing: number of requests in the system.
        done: the completed requests.
        area: integral of `ongoing` over time, in request seconds, up to the last change of `ongoing`.
        history: (time, requests in the system, live replicas), once per second if the service is autoscaled.
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
        self.unfinished: dict[Request, simpy.Event] = {}
        self.done: list[Request] = []
        self.ongoing = 0
        self.area = self._last_change = 0.0
        self.history: list[tuple[float, int, int]] = []
        self._number = 0
        self._random = random.Random(self.seed)
        for _ in range(self.replicas):
            self._add_replica()

    # Requests

    def submit(self, request: Request) -> simpy.Event:
        """Submit a request; the returned event is its completion."""
        request.arrived = self.env.now
        self._count(1)
        completion = self.env.event()
        self.unfinished[request] = completion
        wait = self.admission.visit(self.env.now, self.admission_call) if self.admission else 0.0
        self._after(wait + self.admission_call, lambda: self._dispatch(request))
        return completion

    def _dispatch(self, request: Request) -> None:
        replica = None if self.queue else self._choose(request)
        if replica is None:
            self.queue.append(request)
        else:
            replica.submit(request)

    def _choose(self, request: Request) -> Replica | None:
        if isinstance(self.router, ByPrefix):
            self.router.ongoing = self.ongoing  # for its limit of a replica's load
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
        # The front sends tokens while the engine computes: only the front's backlog adds to the latency.
        backlog = self.front.visit(self.env.now, request.tokens * self.front_token) if self.front else 0.0
        self._after(backlog, lambda: self._complete(request))
        self._drain()

    def _complete(self, request: Request) -> None:
        request.finished = self.env.now
        self._count(-1)
        self.done.append(request)
        self.unfinished.pop(request).succeed(request)

    def _count(self, change: int) -> None:
        """Change the number of requests in the system."""
        self.area += self.ongoing * (self.env.now - self._last_change)
        self._last_change = self.env.now
        self.ongoing += change

    def area_until_now(self) -> float:
        """Return `area` up to the current time."""
        self._count(0)
        return self.area

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        """Schedule a call; without a delay, call immediately."""
        if seconds <= 0:
            action()
        else:
            self.env.timeout(seconds).callbacks.append(lambda event: action())

    # Replicas

    def _add_replica(self) -> None:
        self._number += 1
        replica = Replica(self._number, self.env, self.times, self._finish, self._first_token)
        self.live.append(replica)
        self.router.changed(self.live)
        if failures := self.failures:
            time_to_failure = self._random.expovariate(1 / failures.mean_time_to_failure)
            self._after(time_to_failure, lambda: self._fail(replica, failures))
        self._drain()

    def start(self, delay: float) -> None:
        """Start a replica, which accepts requests when `delay` and the start of its engine have passed."""
        self.starting += 1

        def ready() -> None:
            self.starting -= 1
            self._add_replica()

        self._after(delay + self.times.start, ready)

    def _fail(self, replica: Replica, failures: Failures) -> None:
        """Fail a replica; after the detection time, start a replacement and resubmit the requests of the failed one."""
        replica.alive = False

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
        replica = min(self.live, key=lambda replica: replica.ongoing)
        self.live.remove(replica)
        self.router.changed(self.live)

    def autoscale(self, rule: Autoscaling) -> Iterator[Any]:
        """Simulation process that applies the rule once per second."""
        means: deque[float] = deque(maxlen=round(rule.look_back))  # mean ongoing requests of each second
        # For how many seconds more replicas have been desired than are live or starting, and for how many fewer.
        seconds_above = seconds_below = 0.0
        area = self.area_until_now()
        while True:
            yield self.env.timeout(1.0)
            previous_area, area = area, self.area_until_now()
            means.append(area - previous_area)
            current = len(self.live) + self.starting
            mean = sum(means) / len(means)
            desired = min(rule.largest, max(rule.smallest, math.ceil(mean / rule.target)))
            seconds_above = seconds_above + 1 if desired > current else 0
            seconds_below = seconds_below + 1 if desired < current else 0
            if seconds_above > rule.upscale_delay:
                for _ in range(desired - current):
                    self.start(rule.provision)
            elif seconds_below > rule.downscale_delay:
                for _ in range(min(current - desired, len(self.live) - rule.smallest)):
                    self.retire()
            self.history.append((self.env.now, self.ongoing, len(self.live)))
