"""A batch job as the simulation sees it: workers that get parts from one driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import simpy


class BatchJob:
    """Workers that compute parts, one at a time each; between two parts a worker waits for the driver.

    The driver serves one worker at a time. Ray Data gives an actor its next part in advance: then the driver's time is
    hidden unless it cannot keep up.

    Attributes:
        parts: parts done.
        driver_busy: time of the driver, in seconds.
    """

    def __init__(
        self,
        env: simpy.Environment,
        workers: int,
        part: Callable[[], float],
        driver: Callable[[], float],
        in_advance: int = 0,
    ) -> None:
        """Start the job, which never ends.

        Args:
            part, driver: return the seconds of the next part, and of the driver for it.
            in_advance: parts that a worker is given before it needs them.
        """
        self.parts = 0
        self.driver_busy = 0.0
        self._env, self._part, self._driver_time = env, part, driver
        self._driver = simpy.Resource(env)
        for _ in range(workers):
            queue = simpy.Store(env)
            for _ in range(in_advance + 1):
                env.process(self._hand_out(queue))
            env.process(self._work(queue))

    def _hand_out(self, queue: simpy.Store) -> Iterator[Any]:
        with self._driver.request() as turn:
            yield turn
            seconds = self._driver_time()
            yield self._env.timeout(seconds)
            self.driver_busy += seconds
        queue.put(None)

    def _work(self, queue: simpy.Store) -> Iterator[Any]:
        while True:
            yield queue.get()
            yield self._env.timeout(self._part())
            self.parts += 1
            self._env.process(self._hand_out(queue))
