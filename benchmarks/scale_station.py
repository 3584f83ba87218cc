"""First-in-first-out service stations: the front, the admission actor, the driver of a batch job."""

from __future__ import annotations

import heapq


class Station:
    """Servers of one queue in order of arrival, computed without events: when each server is free next.

    Attributes:
        busy: service time given so far, in seconds.
        waited: waiting time so far, in seconds.
        visits: number of visits.
    """

    def __init__(self, servers: int = 1) -> None:
        self.busy = self.waited = 0.0
        self.visits = 0
        self._free = [0.0] * servers

    def visit(self, now: float, service: float) -> float:
        """Arrive at `now`, not before an earlier arrival; return the time to wait until the service begins."""
        begin = max(now, self._free[0])
        heapq.heapreplace(self._free, begin + service)
        self.busy += service
        self.waited += begin - now
        self.visits += 1
        return begin - now

    def backlog(self, now: float) -> float:
        """Time that an arrival would wait, in seconds."""
        return max(0.0, self._free[0] - now)
