"""Simulated routers: power of two choices, and prefix routing."""

from __future__ import annotations

import random
from typing import Protocol

import numpy as np
from scale_replica import Replica, Request


class Router(Protocol):
    """Interface of routers."""

    def choose(self, replicas: list[Replica], request: Request, limit: int) -> Replica | None:
        """Return the replica for a request, None if all replicas have `limit` ongoing requests."""

    def changed(self, replicas: list[Replica]) -> None:
        """Update the router for a new list of replicas."""


class TwoChoices:
    """Power of two choices, Ray Serve's default: the less loaded of two random replicas, which may be the same.

    If both replicas are full, it draws again; after four draws of two full replicas it takes the least loaded of all.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def changed(self, replicas: list[Replica]) -> None: ...

    def choose(self, replicas: list[Replica], request: Request, limit: int) -> Replica | None:
        if not replicas:
            return None
        for _ in range(4):
            first, second = self._random.choice(replicas), self._random.choice(replicas)
            best = first if first.ongoing <= second.ongoing else second
            if best.ongoing < limit:
                return best
        best = min(replicas, key=lambda replica: replica.ongoing)
        return best if best.ongoing < limit else None


class ByPrefix(TwoChoices):
    """Prefix routing: the replica with the highest rendezvous hash of (conversation, replica), unless overloaded.

    When a replica is added, conversations move only to it; when one is removed, only its conversations move. A replica
    is overloaded if it is full, or if its ongoing requests are at least `overload` times the requests in the system per
    replica, plus four. Then two random replicas are compared, as by TwoChoices. In a real cluster
    (cluster/serve/routing.py) a replica is overloaded if its queue has over four requests more than the shortest queue,
    and the replica with the next hash takes the request.
    """

    def __init__(self, seed: int = 0, overload: float = 1.5) -> None:
        super().__init__(seed)
        self._overload = overload
        self._replica_hashes = np.zeros(0, np.uint64)
        # Replica with the highest hash by conversation, until the list of replicas changes.
        self._homes: dict[int, Replica] = {}
        # Number of requests in the system, waiting ones included; set by Service (scale_cluster.py).
        self.ongoing = 0

    def changed(self, replicas: list[Replica]) -> None:
        self._replica_hashes = mix(np.array([replica.number for replica in replicas], np.uint64))
        self._homes = {}

    def choose(self, replicas: list[Replica], request: Request, limit: int) -> Replica | None:
        if not replicas:
            return None
        home = self._homes.get(request.conversation)
        if home is None:
            weights = mix(self._replica_hashes ^ mix(np.uint64(request.conversation)))
            home = replicas[int(np.argmax(weights))]
            self._homes[request.conversation] = home
        mean = self.ongoing / len(replicas)
        if home.ongoing < min(limit, self._overload * mean + 4):
            return home
        return super().choose(replicas, request, limit)


def mix(values: np.ndarray | np.uint64) -> np.ndarray:
    """Hash of 64-bit integers: the output of splitmix64 for each as its state."""
    with np.errstate(over="ignore"):
        z = np.asarray(values, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
