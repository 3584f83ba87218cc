"""Simulated engine: steps that compute prompt chunks and decode tokens, and a prefix cache."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import simpy
from scale_times import Times

# Maximum number of prompt tokens in a step, for all profiles of scale_times.py: the engine's limit on a CPU
# (_STEP_TOKENS in runtime/engine_executor.py; on a GPU it is 2048). In the engine the limit includes the tokens of
# decoding requests.
# While other requests decode, the prompt chunks of a step may take PROMPT_SECONDS, or the time of PROMPT_STEPS decode
# steps if that is longer, as in runtime/prompt_budget.py, whose minimum of 64 tokens is not simulated.
STEP_TOKENS = 512
PROMPT_SECONDS = 0.25
PROMPT_STEPS = 3


@dataclass(eq=False)
class Request:
    """Simulated request.

    Attributes:
        conversation: number of its conversation, the key of prefix routing.
        prefix: number of prompt tokens from earlier turns, which a replica may have cached.
        prompt: number of prompt tokens, the prefix included.
        tokens: number of completion tokens.
        images: number of images to encode on a replica that has not cached the prefix.
        arrived, first, finished: times of arrival, first token and completion, in seconds; first and finished are -1
            before the event.
        remaining: number of prompt tokens not yet computed.
        hit: whether the replica has cached the prefix; False without a prefix.
        restarts: number of times that the request was resubmitted after a failure of its replica.
    """

    conversation: int
    prefix: int
    prompt: int
    tokens: int
    images: int
    arrived: float = 0.0
    first: float = -1.0
    finished: float = -1.0
    remaining: int = 0
    hit: bool = False
    restarts: int = 0


@dataclass(eq=False)
class Replica:
    """Simulated engine replica.

    Attributes:
        number: number of the replica, hashed by prefix routing (scale_router.py).
        env: the simulation.
        times: service times.
        finish: called with the replica and the request at each completion.
        first_token: called with the request when its prompt is computed.
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
        # Cached tokens by conversation, in the order of their last completions.
        self._cache: OrderedDict[int, int] = OrderedDict()
        self._cached_tokens = 0
        # Requests whose images are to be encoded, and requests whose prompt is to be computed.
        self._images: deque[Request] = deque()
        self._prompts: deque[Request] = deque()
        # Heap of the requests that decode: (number of the last step, serial number against ties, request).
        self._decoding: list[tuple[int, int, Request]] = []
        self._serial = 0
        # Event that an arriving request triggers; None while the process does not wait for it.
        self._arrival: Any = None
        self.env.process(self._run())

    @property
    def ongoing(self) -> int:
        """Number of ongoing requests."""
        return len(self.requests)

    def submit(self, request: Request) -> None:
        """Submit a request. A failed replica holds it until `lost` removes it."""
        cached = self._cache.get(request.conversation, 0)
        request.hit = cached >= request.prefix > 0
        request.remaining = request.prompt - (request.prefix if request.hit else 0)
        self.requests.add(request)
        if request.images and not request.hit:
            self._images.append(request)
        else:
            self._prompts.append(request)
        if self._arrival is not None:
            self._arrival.succeed()
            self._arrival = None

    def lost(self) -> list[Request]:
        """Remove and return the requests of a failed replica, in order of arrival."""
        requests = sorted(self.requests, key=lambda request: request.arrived)
        self.requests.clear()
        return requests

    def _run(self) -> Iterator[Any]:
        while self.alive:
            if self._images or self._prompts:
                yield from self._step()
            elif self._decoding:
                yield from self._decode()
            else:
                self._arrival = self.env.event()
                yield self._arrival

    def _step(self) -> Iterator[Any]:
        """Run one step: encode a request's images, compute prompt chunks, and a token for each decoding request."""
        decode = self.times.decode_step(len(self._decoding))
        seconds = decode
        encoded = self._images.popleft() if self._images else None
        if encoded is not None:
            seconds += self.times.image * encoded.images
        budget = self._budget(decode)
        n_tokens = 0
        prefilled = []
        while self._prompts and n_tokens < budget:
            request = self._prompts[0]
            chunk = min(request.remaining, budget - n_tokens)
            request.remaining -= chunk
            n_tokens += chunk
            if request.remaining == 0:
                prefilled.append(self._prompts.popleft())
        seconds += self.times.prompt(n_tokens)
        yield self.env.timeout(seconds)
        if self.alive:
            self._advance(1, seconds)
            if encoded is not None:
                self._prompts.append(encoded)
            for request in prefilled:
                self.first_token(request)
                self._serial += 1
                last_step = self.steps + request.tokens - 1
                heapq.heappush(self._decoding, (last_step, self._serial, request))
            self._release()

    def _decode(self) -> Iterator[Any]:
        """Run decode steps as a single event, until a request completes or arrives."""
        begin, seconds = self.env.now, self.times.decode_step(len(self._decoding))
        last_step = self._decoding[0][0]
        steps = last_step - self.steps
        end = self.env.timeout(steps * seconds)
        if steps > 1:
            self._arrival = self.env.event()
            yield end | self._arrival
            self._arrival = None
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
        """Complete the requests whose last step has ended."""
        while self._decoding and self._decoding[0][0] <= self.steps:
            _, _, request = heapq.heappop(self._decoding)
            self.requests.discard(request)
            self._cache_tokens(request.conversation, request.prompt + request.tokens)
            self.finish(self, request)

    def _budget(self, decode: float) -> int:
        """Return the budget of prompt tokens for the next step, whose decoding takes `decode` seconds."""
        if not self._decoding or not self.times.token:
            return STEP_TOKENS
        seconds = max(PROMPT_SECONDS, PROMPT_STEPS * decode) - self.times.chunk
        return min(STEP_TOKENS, max(1, int(seconds / self.times.token)))

    def _cache_tokens(self, conversation: int, tokens: int) -> None:
        """Cache a conversation's tokens, and evict those of the least recent completions beyond the capacity."""
        self._cached_tokens += tokens - self._cache.pop(conversation, 0)
        self._cache[conversation] = tokens
        while self._cached_tokens > self.times.cached_tokens:
            self._cached_tokens -= self._cache.popitem(last=False)[1]
