"""Simulated engine: steps with prompt chunks and decode rows, and a prefix cache."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import simpy
from scale_times import Times

# As in runtime/loop.py: token budget of a step; time limit of its prompt chunks, in seconds and in decode steps.
STEP_TOKENS = 512
PROMPT_SECONDS = 0.25
PROMPT_STEPS = 3


@dataclass(eq=False)
class Request:
    """Simulated request.

    Attributes:
        conversation: number of its conversation, the key of prefix routing.
        prefix: number of prompt tokens that earlier turns have computed.
        prompt: number of prompt tokens, the prefix included.
        tokens: number of completion tokens.
        images: number of images to encode on a replica without the prefix.
        arrived, first, finished: times of arrival, first token and completion, in seconds.
        left: number of prompt tokens not yet computed.
        hit: whether the replica had the prefix.
        restarts: number of replica failures that it survived.
    """

    conversation: int
    prefix: int
    prompt: int
    tokens: int
    images: int
    arrived: float = 0.0
    first: float = -1.0
    finished: float = -1.0
    left: int = 0
    hit: bool = False
    restarts: int = 0


@dataclass(eq=False)
class Replica:
    """Simulated engine replica.

    Attributes:
        times: service times.
        finish: called with the replica and each completed request.
        requests: ongoing requests.
        steps: number of completed steps.
        busy: total time of the steps, in seconds.
        alive: False after a failure.
    """

    number: int
    env: simpy.Environment
    times: Times
    finish: Callable[[Replica, Request], None]
    first_token: Callable[[Request], None] = lambda request: None
    requests: set[Request] = field(default_factory=set)
    steps: int = 0
    busy: float = 0.0
    alive: bool = True

    def __post_init__(self) -> None:
        self._cache: OrderedDict[int, int] = OrderedDict()
        self._cached_tokens = 0
        self._images: deque[Request] = deque()
        self._prompts: deque[Request] = deque()
        # (step after which it ends, order, request)
        self._rows: list[tuple[int, int, Request]] = []
        self._order = 0
        self._wake: Any = None
        self.env.process(self._run())

    @property
    def ongoing(self) -> int:
        """Number of ongoing requests."""
        return len(self.requests)

    def submit(self, request: Request) -> None:
        """Submit a request. A failed replica keeps it until `lost`."""
        cached = self._cache.get(request.conversation, 0)
        request.hit = cached >= request.prefix > 0
        request.left = request.prompt - (request.prefix if request.hit else 0)
        self.requests.add(request)
        images = 0 if request.hit else request.images
        (self._images if images else self._prompts).append(request)
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None

    def lost(self) -> list[Request]:
        """Remove and return the requests of a failed replica, in order of arrival."""
        found = sorted(self.requests, key=lambda request: request.arrived)
        self.requests.clear()
        return found

    def _run(self) -> Iterator[Any]:
        while self.alive:
            if self._images or self._prompts:
                yield from self._step()
            elif self._rows:
                yield from self._decode()
            else:
                self._wake = self.env.event()
                yield self._wake

    def _step(self) -> Iterator[Any]:
        """Run one step: encode an image, compute a chunk of prompts, decode one token per row."""
        decode = self.times.decode_step(len(self._rows))
        seconds, ready = decode, []
        encoded = self._images.popleft() if self._images else None
        if encoded is not None:
            seconds += self.times.image * encoded.images
        budget = self._budget(decode)
        chunk = 0
        while self._prompts and chunk < budget:
            taken = min(self._prompts[0].left, budget - chunk)
            self._prompts[0].left -= taken
            chunk += taken
            if self._prompts[0].left == 0:
                ready.append(self._prompts.popleft())
        seconds += self.times.prompt(chunk)
        yield self.env.timeout(seconds)
        if self.alive:
            self._advance(1, seconds)
            if encoded is not None:
                self._prompts.append(encoded)
            for request in ready:
                self.first_token(request)
                self._order += 1
                heapq.heappush(self._rows, (self.steps + request.tokens - 1, self._order, request))
            self._release()

    def _decode(self) -> Iterator[Any]:
        """Run decode steps as a single event, until a row ends or a request arrives."""
        begin, seconds = self.env.now, self.times.decode_step(len(self._rows))
        steps = self._rows[0][0] - self.steps
        end = self.env.timeout(steps * seconds)
        if steps > 1:
            self._wake = self.env.event()
            yield end | self._wake
            self._wake = None
            if not end.processed:  # complete the step during which the request arrived
                steps = min(steps, int((self.env.now - begin) / seconds) + 1)
                yield self.env.timeout(max(0.0, begin + steps * seconds - self.env.now))
        else:
            yield end
        if self.alive:
            self._advance(steps, steps * seconds)
            self._release()

    def _advance(self, steps: int, seconds: float) -> None:
        self.steps += steps
        self.busy += seconds

    def _release(self) -> None:
        while self._rows and self._rows[0][0] <= self.steps:
            request = heapq.heappop(self._rows)[2]
            self.requests.discard(request)
            self._remember(request.conversation, request.prompt + request.tokens)
            self.finish(self, request)

    def _budget(self, decode: float) -> int:
        """Return the budget of prompt tokens for the next step."""
        if not self._rows:
            return STEP_TOKENS
        seconds = max(PROMPT_SECONDS, PROMPT_STEPS * decode) - self.times.chunk
        return min(STEP_TOKENS, max(1, int(seconds / self.times.token))) if self.times.token else STEP_TOKENS

    def _remember(self, conversation: int, tokens: int) -> None:
        self._cached_tokens += tokens - self._cache.pop(conversation, 0)
        self._cache[conversation] = tokens
        while self._cached_tokens > self.times.cached_tokens:
            self._cached_tokens -= self._cache.popitem(last=False)[1]
