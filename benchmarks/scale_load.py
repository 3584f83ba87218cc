"""Simulated load: Poisson arrivals, and users with conversations about an image."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import simpy
from scale_cluster import Service
from scale_replica import Request


@dataclass
class Conversations:
    """Parameters of conversations; `turns` (geometric), `tokens` and `think` (exponential) are means.

    Attributes:
        first: tokens of the first prompt, image slots included.
        question: tokens of a follow-up question.
        tokens: tokens of a completion.
        turns: questions per conversation.
        think: think time, seconds from a completion to the next question.
    """

    first: int = 284
    question: int = 30
    tokens: int = 64
    turns: float = 3.0
    think: float = 5.0


def geometric(rng: random.Random, mean: float) -> int:
    """Draw from the geometric distribution with this mean: at least 1."""
    n = 1
    while rng.random() > 1 / mean:
        n += 1
    return n


def arrivals(
    env: simpy.Environment,
    rate: Callable[[float], float] | float,
    rng: random.Random,
    start: Callable[[], Any],
) -> Iterator[Any]:
    """Poisson process that calls `start`; `rate` per second is constant or a piecewise constant function of time."""
    while True:
        now_rate = rate(env.now) if callable(rate) else rate
        yield env.timeout(rng.expovariate(now_rate))
        start()


class Users:
    """Users of a service, who send `rate` requests per second in conversations."""

    def __init__(
        self,
        service: Service,
        rate: Callable[[float], float] | float,
        kind: Conversations | None = None,
        seed: int = 1,
    ) -> None:
        self._service = service
        self._kind = kind or Conversations()
        self._rng = random.Random(seed)
        self._number = 0
        turns = self._kind.turns
        starts = (lambda t: rate(t) / turns) if callable(rate) else rate / turns
        service.env.process(arrivals(service.env, starts, self._rng, self._start))

    def _start(self) -> None:
        self._number += 1
        self._service.env.process(self._talk(self._number))

    def _talk(self, number: int) -> Iterator[Any]:
        kind, rng = self._kind, self._rng
        prefix, prompt = 0, kind.first
        for turn in range(geometric(rng, kind.turns)):
            if turn:
                yield self._service.env.timeout(rng.expovariate(1 / kind.think))
            tokens = max(1, round(rng.expovariate(1 / kind.tokens)))
            yield self._service.submit(Request(number, prefix, prompt, tokens, images=1))
            prefix = prompt + tokens
            prompt = prefix + kind.question
