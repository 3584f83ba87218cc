"""Timing of GPU work, and the lines of JSON that the scripts print: run.py reads them from the scripts it starts."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

SECONDS = 0.4  # minimum duration of `times`, after its warm-up


def report(column: str, row: str, value: float) -> None:
    """Print a figure of the table as a line of JSON; in milliseconds, unless the row names another unit."""
    print(json.dumps({"column": column, "row": row, "value": value}), flush=True)


def note(text: str) -> None:
    """Print a remark for the reader as a line of JSON."""
    print(json.dumps({"note": text}), flush=True)


def no_preparation() -> None:
    pass


def times(
    run: Callable[[], object],
    prepare: Callable[[], object] = no_preparation,
    group: int = 1,
    minimum: int = 5,
) -> list[float]:
    """Measure work that `run` enqueues on the current stream, in milliseconds, after two warm-up runs.

    Args:
        prepare: makes new inputs before each group; its time is not included.
        group: number of consecutive runs between two CUDA events; the time of a group is divided by this number.
        minimum: minimum number of groups.
    """
    for _ in range(2):
        prepare()
        run()
    torch.cuda.synchronize()
    milliseconds: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(milliseconds) < minimum or time.perf_counter() < end:
        prepare()
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        for _ in range(group):
            run()
        end_event.record()
        end_event.synchronize()
        milliseconds.append(start_event.elapsed_time(end_event) / group)
    return milliseconds


def measure(
    run: Callable[[], object],
    prepare: Callable[[], object] = no_preparation,
    group: int = 1,
    minimum: int = 5,
) -> float:
    """Median of `times`."""
    return statistics.median(times(run, prepare, group, minimum))


def measure_waiting(run: Callable[[], object], runs: int = 3) -> float:
    """Median time on the host of a function that waits for its result, in milliseconds, after one warm-up run."""
    run()
    milliseconds = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return statistics.median(milliseconds)
