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
    """Parameters of conversations.

    Attributes:
        first: tokens of the first prompt, image slots included.
        question: tokens of a follow-up question.
        tokens: mean number of tokens of a completion; the distribution is exponential.
        turns: mean number of questions per conversation; the distribution is geometric.
        think: mean think time, from a completion to the next question, in seconds; the distribution is exponential.
    """

    first: int = 284
    question: int = 30
    tokens: int = 64
    turns: float = 3.0
    think: float = 5.0


def geometric(rng: random.Random, mean: float) -> int:
    """Draw a number of trials up to the first success, at least 1, from the geometric distribution with this mean."""
    trials = 1
    while rng.random() > 1 / mean:
        trials += 1
    return trials


def arrivals(
    env: simpy.Environment,
    rate: Callable[[float], float] | float,
    rng: random.Random,
    start: Callable[[], Any],
) -> Iterator[Any]:
    """Poisson process that calls `start` at each arrival; `rate` is per second, or a function of time.

    A change of the rate takes effect after the next arrival.
    """
    while True:
        current_rate = rate(env.now) if callable(rate) else rate
        yield env.timeout(rng.expovariate(current_rate))
        start()


class Users:
    """Users of a service: new ones arrive at random, and each has one conversation about an image.

    `rate` is the mean number of requests per second of all users, or a function of time that returns it.
    """

    def __init__(
        self,
        service: Service,
        rate: Callable[[float], float] | float,
        conversations: Conversations | None = None,
        seed: int = 1,
    ) -> None:
        self._service = service
        self._conversations = conversations or Conversations()
        self._rng = random.Random(seed)
        self._number = 0
        turns = self._conversations.turns
        user_rate = (lambda now: rate(now) / turns) if callable(rate) else rate / turns
        service.env.process(arrivals(service.env, user_rate, self._rng, self._start))

    def _start(self) -> None:
        self._number += 1
        self._service.env.process(self._converse(self._number))

    def _converse(self, number: int) -> Iterator[Any]:
        parameters, rng = self._conversations, self._rng
        prefix, prompt = 0, parameters.first
        for turn in range(geometric(rng, parameters.turns)):
            if turn:
                yield self._service.env.timeout(rng.expovariate(1 / parameters.think))
            tokens = max(1, round(rng.expovariate(1 / parameters.tokens)))
            # A replica that has cached the prefix has also cached the image, and does not encode it again.
            yield self._service.submit(Request(number, prefix, prompt, tokens, images=1))
            prefix = prompt + tokens
            prompt = prefix + parameters.question
