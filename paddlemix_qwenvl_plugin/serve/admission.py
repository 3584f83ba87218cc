"""A bounded queue before the engine: first come, first served."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from typing import Optional

from paddlemix_qwenvl_plugin.serve.errors import ApiError

# What a slot is held for before any was given back: nothing is known yet.
_GUESSED_SECONDS = 1.0
_MOST_RETRY_SECONDS = 3600
# How much the newest of the holding times counts in their mean.
_NEWEST = 0.1


class SlotQueue:
    """The slots of the engine, and those who wait for them. Implements Admission; of one event loop.

    A request that needs several slots gets them at once; those behind it wait as well, or it would never get them.

    Attributes:
        running: slots that are held.
    """

    def __init__(
        self,
        max_running: int,
        max_waiting: int,
        waiting_timeout: float,
        max_per_key: Optional[int] = None,
        observe_wait: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Args:
        max_running: slots.
        max_waiting: requests that wait for one.
        waiting_timeout: seconds that a request waits at most.
        max_per_key: slots that a key holds or waits for at most.
        observe_wait: called with the seconds that each admitted request waited.
        """
        self.running = 0
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._waiting_timeout = waiting_timeout
        self._max_per_key = max_per_key
        self._observe_wait = observe_wait
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._of_key: Counter[str] = Counter()
        self._mean_seconds = _GUESSED_SECONDS
        self._closed = False

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @contextlib.asynccontextmanager
    async def slots(self, n: int, key: Optional[str]) -> AsyncIterator[None]:
        """Wait for n slots, and hold them within the block; see Admission.slots."""
        if self._closed:
            raise shutting_down()
        self._check(n, key)
        if key is not None:
            self._of_key[key] += n
        try:
            begin = time.monotonic()
            await self._take(n)
            granted = time.monotonic()
            self._observe_wait(granted - begin)
            try:
                yield
            finally:
                self._give_back(n)
                self._mean_seconds += _NEWEST * (time.monotonic() - granted - self._mean_seconds)
        finally:
            if key is not None:
                self._of_key[key] -= n
                if not self._of_key[key]:
                    del self._of_key[key]

    def close(self) -> None:
        """Let no new request in: they get 503. Those that wait go on waiting."""
        self._closed = True

    def refuse_waiting(self) -> None:
        """Let in neither a new request nor those that wait."""
        self._closed = True
        for _, future in self._queue:
            if not future.done():
                future.set_exception(shutting_down())

    def _check(self, n: int, key: Optional[str]) -> None:
        """Raise ApiError for n slots that there never are, or not now."""
        most = min(self._max_running, self._max_per_key if key and self._max_per_key else self._max_running)
        if n > most:
            raise ApiError(
                400,
                f"n: {n} choices at once are more than the {most} that this server has",
                param="n",
                code="invalid_value",
            )
        if key is not None and self._max_per_key is not None and self._of_key[key] + n > self._max_per_key:
            raise _too_many(
                f"This API key has {self._of_key[key]} requests at once, of at most {self._max_per_key}",
                self._mean_seconds,
            )
        if (self._queue or self.running + n > self._max_running) and self.waiting >= self._max_waiting:
            ahead = self.running + sum(asked for asked, _ in self._queue)
            raise _too_many(
                f"{self.waiting} requests wait already", self._mean_seconds * ahead / self._max_running
            )

    async def _take(self, n: int) -> None:
        if not self._queue and self.running + n <= self._max_running:
            self.running += n
            return
        future = asyncio.get_running_loop().create_future()
        entry = (n, future)
        self._queue.append(entry)
        try:
            # Unlike wait_for it leaves the future alone: one that was granted meanwhile stays granted.
            await asyncio.wait([future], timeout=self._waiting_timeout)
        except asyncio.CancelledError:
            if future.done() and future.exception() is None:
                self._give_back(n)
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
                headers={"Retry-After": _retry_after(self._mean_seconds)},
            )
        if future.exception() is not None:
            self._leave(entry)
        future.result()

    def _leave(self, entry: tuple[int, asyncio.Future[None]]) -> None:
        """Leave the queue: those behind may have waited for this one only."""
        with contextlib.suppress(ValueError):
            self._queue.remove(entry)
        self._grant()

    def _give_back(self, n: int) -> None:
        self.running -= n
        self._grant()

    def _grant(self) -> None:
        while self._queue and self.running + self._queue[0][0] <= self._max_running:
            n, future = self._queue[0]
            if future.done():  # refused, and leaves when its task runs
                self._queue.popleft()
                continue
            self._queue.popleft()
            self.running += n
            future.set_result(None)


def shutting_down() -> ApiError:
    """What requests get that come after SIGTERM."""
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
    return str(min(max(math.ceil(seconds), 1), _MOST_RETRY_SECONDS))
