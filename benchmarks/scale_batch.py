"""Simulated batch job: workers that receive parts from one driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import simpy


class BatchJob:
    """Workers that each compute one part at a time, and a driver that assigns parts to one worker at a time.

    Ray Data assigns parts in advance, which hides the driver's time unless the driver is overloaded.

    Attributes:
        parts: number of completed parts.
    """

    def __init__(
        self,
        env: simpy.Environment,
        workers: int,
        part: Callable[[], float],
        driver: Callable[[], float],
        in_advance: int = 0,
    ) -> None:
        """Start the job, which has an unlimited number of parts.

        Args:
            workers: number of workers.
            part, driver: functions that return the duration of the next part and of its assignment, in seconds.
            in_advance: number of parts assigned to a worker besides its current one; 0: the machine-repair model, with
                which a test compares.
        """
        self.parts = 0
        self._env, self._part_seconds, self._driver_seconds = env, part, driver
        self._driver = simpy.Resource(env)
        for _ in range(workers):
            queue = simpy.Store(env)
            for _ in range(in_advance + 1):
                env.process(self._assign(queue))
            env.process(self._work(queue))

    def _assign(self, queue: simpy.Store) -> Iterator[Any]:
        """Wait for the driver, occupy it for one assignment, and put a part into a worker's queue."""
        with self._driver.request() as turn:
            yield turn
            yield self._env.timeout(self._driver_seconds())
        queue.put(None)

    def _work(self, queue: simpy.Store) -> Iterator[Any]:
        while True:
            yield queue.get()
            yield self._env.timeout(self._part_seconds())
            self.parts += 1
            self._env.process(self._assign(queue))
