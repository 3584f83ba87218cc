"""Compare the throughput of `qwenvl batch` with and without Ray on the same cores, and the overhead per row.

    .venv/bin/python benchmarks/ray_batch.py --vision qwenvl-demo/vision/vision --language qwenvl-demo/text/qwen

All run the same rows, text only and sampled to their full length, so that their work is the same. Without Ray the cores
are used in two ways: by one process with a thread for each, and by as many processes of one thread, each with its share
of the rows. On Ray, as many actors of one core each. Concurrent rows are equal in number. The ratio is that to the
faster of the two ways without Ray.

The throughput is that of a long job: of the rows that a longer run answers more than a shorter one, in parts of the
same size, so that the start of the cluster, of the actors and of their models cancels out. Each run's time is the best
of `--repeat`, as other programs only make it longer. The overhead of a row is what Ray and the parts add to its
computation: for each actor, the difference of the times per row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Of batch/job.py: rows of the largest part, for each concurrent row of an actor, and parts for each actor.
LARGEST_PART, PARTS_EACH = 32, 4
WORDS = "What is the name of the animal that stands beside the red car in the second row?"


Run = Callable[[argparse.Namespace, Path, int], float]
"""Runs a job of a number of rows in a folder, and returns its seconds."""


def seconds_of(
    arguments: argparse.Namespace, folder: Path, n_rows: int, *flags: str, threads: int, shares: int = 1
) -> float:
    """Run a job, as `shares` jobs at once with as many rows each; return its seconds."""
    commands = []
    for share in range(shares):
        rows = [
            {
                "id": n,
                "prompt": f"{n}. {WORDS}",
                "temperature": 1.0,
                "seed": n,
                "min_new_tokens": arguments.tokens,
            }
            for n in range(share, n_rows, shares)
        ]
        source = folder / f"{n_rows}-{share}-{shares}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        target = folder / f"out-{time.monotonic_ns()}"
        commands.append(
            [
                *(sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "batch", str(source), str(target)),
                *("--first_model_path", arguments.vision, "--second_model_path", arguments.language),
                *("--max_new_tokens", str(arguments.tokens), *flags),
            ]
        )
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    processes = [subprocess.Popen(command, env=environment, stdout=2) for command in commands]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a job failed; its messages are above")
    return time.perf_counter() - start


def one_process(arguments: argparse.Namespace, folder: Path, n_rows: int) -> float:
    n = arguments.actors
    window = str(arguments.batch_size * n)
    return seconds_of(arguments, folder, n_rows, "--batch_size", window, threads=n)


def processes(arguments: argparse.Namespace, folder: Path, n_rows: int) -> float:
    window, n = str(arguments.batch_size), arguments.actors
    return seconds_of(arguments, folder, n_rows, "--batch_size", window, threads=1, shares=n)


def on_ray(arguments: argparse.Namespace, folder: Path, n_rows: int) -> float:
    window, n = str(arguments.batch_size), str(arguments.actors)
    flags = ("--batch_size", window, "--ray=local", "--ray_actors", n)
    return seconds_of(arguments, folder, n_rows, *flags, threads=1)


RUNS: dict[str, Run] = {"one process": one_process, "processes": processes, "on Ray": on_ray}


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vision", required=True)
    parser.add_argument("--language", required=True)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=8, help="concurrent rows of an actor")
    parser.add_argument("--actors", type=int, default=cores)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    # Parts of the largest size, four for an actor in the shorter run, eight in the longer.
    few = arguments.actors * PARTS_EACH * LARGEST_PART * arguments.batch_size
    many = 2 * few
    few_seconds: dict[str, list[float]] = {kind: [] for kind in RUNS}
    many_seconds: dict[str, list[float]] = {kind: [] for kind in RUNS}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(arguments.repeat):  # alternately: other programs may slow any
            for kind, run in RUNS.items():
                few_seconds[kind].append(run(arguments, Path(name), few))
                many_seconds[kind].append(run(arguments, Path(name), many))
    row_seconds = {}
    for kind in RUNS:
        # The best of each before the difference: the best difference would be that of a slowed short run.
        best_few, best_many = min(few_seconds[kind]), min(many_seconds[kind])
        each = row_seconds[kind] = (best_many - best_few) / (many - few)
        spread = max(max(few_seconds[kind]) - best_few, max(many_seconds[kind]) - best_many)
        print(
            f"{kind}: {1 / each:.1f} rows/s, {each * 1000:.2f} ms a row; "
            f"start {best_few - each * few:.1f} s; runs differ by up to {spread:.1f} s"
        )
    without = min(row_seconds["one process"], row_seconds["processes"])
    overhead = (row_seconds["on Ray"] - without) * arguments.actors * 1000
    print(
        f"on Ray / without: {without / row_seconds['on Ray']:.2f}; overhead of an actor: {overhead:.2f} ms a row"
    )


if __name__ == "__main__":
    main()
