"""Steps wait briefly for requests that arrive together, and only then."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from paddlemix_qwenvl_plugin.runtime.statistics import LoopStatistics
from paddlemix_qwenvl_plugin.serve import engine_process
from paddlemix_qwenvl_plugin.serve.engine_process import EngineProcess


class Clock:
    """Clock that `wait` and steps advance; the event is set at the given times."""

    def __init__(self, arrivals: list[float]) -> None:
        self.now, self.arrivals = 0.0, arrivals
        self.waits: list[tuple[float, float]] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: Any) -> bool:
        start, timeout = self.now, float("inf") if seconds is None else self.now + seconds
        arrival = min((at for at in self.arrivals if at > self.now), default=float("inf"))
        self.now = min(arrival, timeout)
        if self.now == float("inf"):
            raise EOFError  # idle for good
        self.waits.append((start, self.now))
        return arrival <= timeout

    def clear(self) -> None:
        pass


class Steps:
    """Loop whose steps take the given seconds, 0 for a call without requests."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        self._clock, self._seconds = clock, iter(seconds)
        self.starts: list[float] = []
        self.statistics = LoopStatistics()

    def step(self) -> bool:
        seconds = next(self._seconds, None)
        if seconds is None:
            raise EOFError
        if seconds:
            self.starts.append(self._clock.now)
        self._clock.now += seconds
        return seconds > 0


def starts(monkeypatch: Any, arrivals: list[float], seconds: list[float], ended: list[bool]) -> list[float]:
    """Start times of the steps, by arrivals of messages, step times, and whether a request ends in each step."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process, clock, ends = EngineProcess(ours), Clock(arrivals), iter(ended)
        monkeypatch.setattr(engine_process, "time", clock)
        monkeypatch.setattr(process, "_wake", clock)
        monkeypatch.setattr(process, "_send_updates", lambda loop: next(ends, False))
        monkeypatch.setattr(process, "_report", lambda statistics: None)
        steps = Steps(clock, seconds)
        with pytest.raises(EOFError):
            process._run_steps(steps)
        return steps.starts


def test_steps_without_an_end_follow_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert starts(monkeypatch, [0.15], [0.1, 0.1, 0.1], []) == pytest.approx([0, 0.1, 0.2])


def test_after_an_end_the_next_request_still_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait of 3 % of the step, which arrivals do not shorten: more may follow."""
    assert starts(monkeypatch, [0.101], [0.1, 0.1], [True]) == pytest.approx([0, 0.103])


def test_the_first_request_of_an_idle_engine_waits_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 20 ms, even after a long step."""
    assert starts(monkeypatch, [9, 9.01], [2, 0, 1], []) == pytest.approx([0, 9.02])
    assert starts(monkeypatch, [9], [0, 1], []) == [9], "no step to measure the wait by"
