"""Timings on a GPU, and the output lines of a benchmark's parts."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

SECONDS = 0.4  # per row, after warm-up


def report(column: str, row: str, value: float) -> None:
    """Print a figure as a line of JSON; milliseconds, unless the row names another unit."""
    print(json.dumps({"column": column, "row": row, "value": value}), flush=True)


def note(text: str) -> None:
    print(json.dumps({"note": text}), flush=True)


def nothing() -> None:
    pass


def times(
    run: Callable[[], object], prepare: Callable[[], object] = nothing, group: int = 1, least: int = 5
) -> list[float]:
    """Milliseconds of `run` after two warm-up runs; `prepare` makes new inputs, outside of the times.

    Measured between events of the current stream around `group` runs.
    """
    for _ in range(2):
        prepare()
        run()
    torch.cuda.synchronize()
    taken: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(taken) < least or time.perf_counter() < end:
        prepare()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(group):
            run()
        events[1].record()
        events[1].synchronize()
        taken.append(events[0].elapsed_time(events[1]) / group)
    return taken


def measure(
    run: Callable[[], object], prepare: Callable[[], object] = nothing, group: int = 1, least: int = 5
) -> float:
    """Median of `times`."""
    return statistics.median(times(run, prepare, group, least))


def measure_waiting(run: Callable[[], object], runs: int = 3) -> float:
    """Median milliseconds on the host of `run`, which waits for its result, after one warm-up run."""
    run()
    taken = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)
