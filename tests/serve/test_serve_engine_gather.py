"""Short waits before a step, so that requests which arrive together are computed in the same step."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from paddlemix_qwenvl_plugin.runtime.statistics import LoopStatistics
from paddlemix_qwenvl_plugin.serve import engine_process
from paddlemix_qwenvl_plugin.serve.engine_process import EngineProcess


class Clock:
    """Test double of the module `time` and of the engine process's event for new messages.

    The time advances only in `wait` and in steps. The event is set at the times `arrivals`.
    """

    def __init__(self, arrivals: list[float]) -> None:
        self.now, self.arrivals = 0.0, arrivals
        self.waits: list[tuple[float, float]] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: Any) -> bool:
        start, timeout = self.now, float("inf") if seconds is None else self.now + seconds
        arrival = min((arrival for arrival in self.arrivals if arrival > self.now), default=float("inf"))
        self.now = min(arrival, timeout)
        if self.now == float("inf"):
            raise EOFError  # no arrival and no timeout: the end of the test
        self.waits.append((start, self.now))
        return arrival <= timeout

    def clear(self) -> None:
        pass


class TimedLoop:
    """Test double of the loop: each call of `step` takes the next of `seconds`; 0: it finds no requests."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        self._clock, self._seconds = clock, iter(seconds)
        self.starts: list[float] = []
        self.statistics = LoopStatistics()

    def step(self) -> bool:
        seconds = next(self._seconds, None)
        if seconds is None:
            raise EOFError  # the end of the test
        if seconds:
            self.starts.append(self._clock.now)
        self._clock.now += seconds
        return seconds > 0


def step_starts(
    monkeypatch: Any, arrivals: list[float], seconds: list[float], request_ends: list[bool]
) -> list[float]:
    """Start times of the steps.

    Args:
        arrivals: times at which messages arrive.
        seconds: duration of each step; 0 for a call of `step` without requests, which has no start time.
        request_ends: whether a request ends in each step; False for all steps after the last item.
    """
    process_end, front_end = socket.socketpair()
    with process_end, front_end:
        process, clock, ends = EngineProcess(process_end), Clock(arrivals), iter(request_ends)
        monkeypatch.setattr(engine_process, "time", clock)
        monkeypatch.setattr(process, "_wake", clock)
        monkeypatch.setattr(process, "_send_updates", lambda loop: next(ends, False))
        monkeypatch.setattr(process, "_report", lambda statistics: None)
        loop = TimedLoop(clock, seconds)
        with pytest.raises(EOFError):
            process._run_steps(loop)
        return loop.starts


def test_no_wait_after_a_step_in_which_no_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert step_starts(monkeypatch, [0.15], [0.1, 0.1, 0.1], []) == pytest.approx([0, 0.1, 0.2])


def test_wait_after_a_step_in_which_a_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 % of the step's duration, in which the client may send its next request; arrivals do not shorten the wait."""
    assert step_starts(monkeypatch, [0.101], [0.1, 0.1], [True]) == pytest.approx([0, 0.103])


def test_wait_after_the_first_request_of_an_idle_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 20 ms, even if the last step was long; without an earlier step there is no wait."""
    assert step_starts(monkeypatch, [9, 9.01], [2, 0, 1], []) == pytest.approx([0, 9.02])
    assert step_starts(monkeypatch, [9], [0, 1], []) == [9]
