"""First-in-first-out service stations of the simulation in scale.py.

They model the fronts, and the coordinator, which admits requests.
"""

from __future__ import annotations

import heapq


class Station:
    """First-in-first-out queue with one or several servers.

    Waiting times are computed directly from the times at which the servers become idle, without simulation events.

    Attributes:
        busy: total service time, in seconds.
        waited: total waiting time, in seconds.
        visits: number of visits.
    """

    def __init__(self, servers: int = 1) -> None:
        self.busy = self.waited = 0.0
        self.visits = 0
        self._idle_at = [0.0] * servers  # heap: time from which each server is idle

    def visit(self, now: float, service: float) -> float:
        """Record an arrival at `now` with this service time; return its waiting time. `now` must not decrease."""
        begin = max(now, self._idle_at[0])
        heapq.heapreplace(self._idle_at, begin + service)
        self.busy += service
        self.waited += begin - now
        self.visits += 1
        return begin - now

    def backlog(self, now: float) -> float:
        """Return the waiting time of an arrival at `now`, in seconds, without recording it."""
        return max(0.0, self._idle_at[0] - now)
