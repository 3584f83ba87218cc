"""First-in-first-out service stations, which model the fronts and the coordinator."""

from __future__ import annotations

import heapq


class Station:
    """First-in-first-out queue with one or several servers, computed without events from their next free times.

    Attributes:
        busy: total service time, in seconds.
        waited: total waiting time, in seconds.
        visits: number of visits.
    """

    def __init__(self, servers: int = 1) -> None:
        self.busy = self.waited = 0.0
        self.visits = 0
        self._free = [0.0] * servers

    def visit(self, now: float, service: float) -> float:
        """Record an arrival at `now`, in order of time; return the waiting time until its service begins."""
        begin = max(now, self._free[0])
        heapq.heapreplace(self._free, begin + service)
        self.busy += service
        self.waited += begin - now
        self.visits += 1
        return begin - now

    def backlog(self, now: float) -> float:
        """Return the waiting time of an arrival at `now`, in seconds."""
        return max(0.0, self._free[0] - now)
