"""Simulated routers: power of two choices, and prefix routing."""

from __future__ import annotations

import random
from typing import Protocol

import numpy as np
from scale_replica import Replica, Request


class Router(Protocol):
    """Interface of routers; `choose` returns None if all replicas are full."""

    def choose(self, replicas: list[Replica], request: Request, limit: int) -> Replica | None: ...

    def changed(self, replicas: list[Replica]) -> None:
        """Update the router for a new list of replicas."""


class TwoChoices:
    """Power of two choices, Ray Serve's default: the less loaded of two random replicas."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def changed(self, replicas: list[Replica]) -> None: ...

    def choose(self, replicas: list[Replica], request: Request, limit: int) -> Replica | None:
        if not replicas:
            return None
        for _ in range(4):
            one, other = self._random.choice(replicas), self._random.choice(replicas)
            best = one if one.ongoing <= other.ongoing else other
            if best.ongoing < limit:
                return best
        best = min(replicas, key=lambda replica: replica.ongoing)
        return best if best.ongoing < limit else None


class ByPrefix(TwoChoices):
    """Prefix routing: the replica with the highest rendezvous hash of (conversation, replica), unless overloaded.

    A joining or leaving replica moves only its own share of the conversations.
    """

    def __init__(self, seed: int = 0, overload: float = 1.5) -> None:
        super().__init__(seed)
        self._overload = overload
        self._ids = np.zeros(0, np.uint64)
        self._homes: dict[int, Replica] = {}
        self.ongoing = 0

    def changed(self, replicas: list[Replica]) -> None:
        self._ids = mix(np.array([replica.number for replica in replicas], np.uint64))
        self._homes = {}

    def choose(self, replicas: list[Replica], request: Request, limit: int) -> Replica | None:
        if not replicas:
            return None
        home = self._homes.get(request.conversation)
        if home is None:
            home = replicas[int(np.argmax(mix(self._ids ^ mix(np.uint64(request.conversation)))))]
            self._homes[request.conversation] = home
        fair = self.ongoing / len(replicas)
        if home.ongoing < min(limit, self._overload * fair + 4):
            return home
        return super().choose(replicas, request, limit)


def mix(values: np.ndarray | np.uint64) -> np.ndarray:
    """Hash of 64-bit integers (splitmix64's finalizer)."""
    with np.errstate(over="ignore"):
        z = np.asarray(values, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
