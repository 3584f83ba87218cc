"""Bounded first-in-first-out queue in front of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Optional

from paddlemix_qwenvl_plugin.serve.errors import ApiError

# Retry-After is estimated from the mean holding time of a slot. Assumed mean before the first measurement:
_INITIAL_HOLD_SECONDS = 1.0
# Maximum of Retry-After.
_MAX_RETRY_SECONDS = 3600
# Weight of the newest holding time in the exponential moving average.
_NEWEST_WEIGHT = 0.1


class SlotQueue:
    """Engine slots and the queue of requests waiting for them.

    The Admission (service.py) of a server without a cluster; on a cluster, the coordinator has one for all fronts. An
    object is bound to one event loop.

    A request for several slots gets them all at once. Later requests wait behind it, so that it does not starve.

    Attributes:
        running: slots in use.
    """

    def __init__(
        self,
        max_running: int,
        max_waiting: int,
        waiting_timeout: float,
        max_per_key: Optional[int] = None,
        observe_wait: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Create an empty queue.

        Args:
            max_running: number of slots.
            max_waiting: maximum number of waiting requests.
            waiting_timeout: maximum wait of a request, in seconds.
            max_per_key: maximum number of slots that an API key holds or waits for; None: no limit.
            observe_wait: called with the waiting time in seconds of each admitted request.
        """
        self.running = 0
        self.set_limits(max_running, max_waiting, waiting_timeout, max_per_key)
        self._observe_wait = observe_wait
        # Number of slots of each waiting request, and a future that is done when they are granted or the request is
        # refused.
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._slots_by_key: Counter[str] = Counter()
        self._mean_hold_seconds = _INITIAL_HOLD_SECONDS
        self._closed = False

    def set_limits(
        self, max_running: int, max_waiting: int, waiting_timeout: float, max_per_key: Optional[int]
    ) -> None:
        """Change the limits on slots, waiting requests and waiting time; running and waiting requests stay.

        Arguments as for `__init__`.
        """
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._waiting_timeout = waiting_timeout
        self._max_per_key = max_per_key

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._queue)

    @contextlib.asynccontextmanager
    async def slots(self, n: int, key: Optional[str]) -> AsyncIterator[None]:
        """Wait for n slots and hold them within the block; see Admission.slots."""
        if self._closed:
            raise shutting_down()
        self._check(n, key)
        if key is not None:
            self._slots_by_key[key] += n
        try:
            begin = time.monotonic()
            await self._take(n)
            granted = time.monotonic()
            self._observe_wait(granted - begin)
            try:
                yield
            finally:
                self._release(n)
                held = time.monotonic() - granted
                self._mean_hold_seconds += _NEWEST_WEIGHT * (held - self._mean_hold_seconds)
        finally:
            self._forget(n, key)

    @contextlib.contextmanager
    def adopted(self, n: int, key: Optional[str]) -> Iterator[None]:
        """Hold n slots within the block regardless of the limits, for a request that an earlier queue has admitted.

        On a cluster, the queue is in one process, and a new queue replaces it after a restart of that process.
        """
        self.running += n
        if key is not None:
            self._slots_by_key[key] += n
        try:
            yield
        finally:
            self._release(n)
            self._forget(n, key)

    def open(self) -> None:
        """Accept requests again after `close` or `refuse_waiting`; on a cluster, when a front starts."""
        self._closed = False

    def close(self) -> None:
        """Refuse new requests with 503. Waiting requests stay in the queue."""
        self._closed = True

    def refuse_waiting(self) -> None:
        """Refuse new and waiting requests with 503."""
        self._closed = True
        for _, future in self._queue:
            if not future.done():
                future.set_exception(shutting_down())

    def _check(self, n: int, key: Optional[str]) -> None:
        """Raise ApiError: n slots can never be granted (400), or the queue is full or the key's limit reached (429)."""
        limit = self._max_running
        if key is not None and self._max_per_key is not None:
            limit = min(limit, self._max_per_key)
        if n > limit:
            raise ApiError(
                400,
                f"n: {n} concurrent choices exceed the server's limit of {limit}",
                param="n",
                code="invalid_value",
            )
        if (
            key is not None
            and self._max_per_key is not None
            and self._slots_by_key[key] + n > self._max_per_key
        ):
            raise _too_many(
                f"This API key has {self._slots_by_key[key]} of at most {self._max_per_key} concurrent completions",
                self._mean_hold_seconds,
            )
        if (self._queue or self.running + n > self._max_running) and self.waiting >= self._max_waiting:
            if self._max_waiting:
                message = f"{self.waiting} requests are waiting, the server's maximum"
            else:
                message = "All slots are in use, and this server queues no requests"
            # The slots ahead of this request are released at a rate of max_running slots per mean holding time.
            slots_ahead = self.running + sum(n_slots for n_slots, _ in self._queue)
            raise _too_many(message, self._mean_hold_seconds * slots_ahead / self._max_running)

    async def _take(self, n: int) -> None:
        """Take n free slots, or wait for them in the queue."""
        if not self._queue and self.running + n <= self._max_running:
            self.running += n
            return
        future = asyncio.get_running_loop().create_future()
        entry = (n, future)
        self._queue.append(entry)
        try:
            # Unlike wait_for, wait does not cancel the future at the timeout: slots granted just then are kept.
            await asyncio.wait([future], timeout=self._waiting_timeout)
        except asyncio.CancelledError:
            if future.done() and future.exception() is None:  # the slots were granted before the cancellation
                self._release(n)
            else:
                self._leave(entry)
            raise
        if not future.done():
            self._leave(entry)
            raise ApiError(
                503,
                f"No slot was free within {self._waiting_timeout:g} s; try again later",
                "server_error",
                code="waiting_timeout",
                headers={"Retry-After": _retry_after(self._mean_hold_seconds)},
            )
        if future.exception() is not None:
            self._leave(entry)
        future.result()

    def _leave(self, entry: tuple[int, asyncio.Future[None]]) -> None:
        """Remove an entry from the queue and grant slots to the requests behind it."""
        with contextlib.suppress(ValueError):
            self._queue.remove(entry)
        self._grant()

    def _forget(self, n: int, key: Optional[str]) -> None:
        """Subtract n slots from those of a key."""
        if key is not None:
            self._slots_by_key[key] -= n
            if not self._slots_by_key[key]:
                del self._slots_by_key[key]

    def _release(self, n: int) -> None:
        self.running -= n
        self._grant()

    def _grant(self) -> None:
        """Grant slots to the first requests of the queue while enough are free."""
        while self._queue and self.running + self._queue[0][0] <= self._max_running:
            n, future = self._queue[0]
            if future.done():  # refused by refuse_waiting; the request's task has not run since
                self._queue.popleft()
                continue
            self._queue.popleft()
            self.running += n
            future.set_result(None)


def shutting_down() -> ApiError:
    """503 error for requests that the server refuses while it shuts down."""
    return ApiError(
        503,
        "The server is shutting down; try again",
        "server_error",
        code="shutting_down",
        headers={"Retry-After": "1"},
    )


def _too_many(message: str, seconds: float) -> ApiError:
    return ApiError(
        429,
        f"{message}; try again later",
        "rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": _retry_after(seconds)},
    )


def _retry_after(seconds: float) -> str:
    return str(min(max(math.ceil(seconds), 1), _MAX_RETRY_SECONDS))
