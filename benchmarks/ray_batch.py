"""Throughput of `qwenvl batch` with and without Ray on the same cores, and the overhead of Ray per row.

    .venv/bin/python benchmarks/ray_batch.py --vision qwenvl-demo/vision/vision --language qwenvl-demo/text/qwen

A job uses n cores in three ways: one process of n threads; n processes of one thread, which answer an equal share of
the rows each; on Ray, n actors of one thread. The total number of concurrent rows is the same in all three. The rows
have no images, and each completion has the same number of tokens, so that the work is the same.

The throughput is that of a long job: a shorter run and one of twice as many rows have parts of the same size, and their
difference in rows is divided by their difference in time. The start of the cluster, of the actors and of their models
thus cancels out. The time of a run is the best of `--repeat`, as other programs only make it longer. The printed ratio
compares Ray with the faster way without Ray; the overhead is the difference of their times per row, times n.
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

# As in cluster/batch/job.py: a part has at most 32 * batch_size rows; shorter jobs have about 4 parts per actor, each
# of at least batch_size rows.
MAX_PART_ROWS, PARTS_PER_ACTOR = 32, 4
QUESTION = "What is the name of the animal that stands beside the red car in the second row?"


Run = Callable[[argparse.Namespace, Path, int], float]
"""Function that runs a job with a number of rows in a folder, and returns its time in seconds."""


def seconds_of_job(
    arguments: argparse.Namespace, folder: Path, n_rows: int, *flags: str, threads: int, n_processes: int = 1
) -> float:
    """Run a job, or concurrent jobs with an equal share of the rows each; return the time in seconds.

    Args:
        flags: further arguments of `qwenvl batch`.
        threads: number of threads of each process.
        n_processes: number of concurrent jobs.
    """
    commands = []
    for process in range(n_processes):
        rows = [
            {
                "id": n,
                "prompt": f"{n}. {QUESTION}",
                "temperature": 1.0,
                "seed": n,
                "min_new_tokens": arguments.tokens,
            }
            for n in range(process, n_rows, n_processes)
        ]
        source = folder / f"{n_rows}-{process}-{n_processes}.jsonl"
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
    # Standard output of the jobs goes to standard error (file descriptor 2): that of this script has only the figures.
    jobs = [subprocess.Popen(command, env=environment, stdout=2) for command in commands]
    exit_statuses = [job.wait() for job in jobs]
    if any(exit_statuses):
        raise SystemExit("a job failed; its messages are above")
    return time.perf_counter() - start


def one_process(arguments: argparse.Namespace, folder: Path, n_rows: int) -> float:
    n = arguments.actors
    flags = ("--batch_size", str(arguments.batch_size * n))
    return seconds_of_job(arguments, folder, n_rows, *flags, threads=n)


def process_per_core(arguments: argparse.Namespace, folder: Path, n_rows: int) -> float:
    flags = ("--batch_size", str(arguments.batch_size))
    return seconds_of_job(arguments, folder, n_rows, *flags, threads=1, n_processes=arguments.actors)


def on_ray(arguments: argparse.Namespace, folder: Path, n_rows: int) -> float:
    flags = ("--batch_size", str(arguments.batch_size), "--ray=local", "--ray_actors", str(arguments.actors))
    return seconds_of_job(arguments, folder, n_rows, *flags, threads=1)


RUNS: dict[str, Run] = {"one process": one_process, "process per core": process_per_core, "on Ray": on_ray}


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vision", required=True, help="prefix of the vision stage")
    parser.add_argument("--language", required=True, help="prefix of the language stage")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each completion (default 16)")
    parser.add_argument("--batch_size", type=int, default=8, help="concurrent rows of an actor (default 8)")
    parser.add_argument("--actors", type=int, default=cores, help="number n of actors (default: the cores)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each length (default 3)")
    arguments = parser.parse_args()
    # All parts have the maximum size: each actor computes four in the shorter run, eight in the longer one.
    short_rows = arguments.actors * PARTS_PER_ACTOR * MAX_PART_ROWS * arguments.batch_size
    long_rows = 2 * short_rows
    short_seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    long_seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeat):  # alternately, so that a phase of other load slows all kinds of run
            for name, run in RUNS.items():
                short_seconds[name].append(run(arguments, Path(folder), short_rows))
                long_seconds[name].append(run(arguments, Path(folder), long_rows))
    row_seconds = {}
    for name in RUNS:
        # The difference of the best times; the best of the differences would favour a short run that was slowed down.
        best_short, best_long = min(short_seconds[name]), min(long_seconds[name])
        per_row = row_seconds[name] = (best_long - best_short) / (long_rows - short_rows)
        spread = max(max(short_seconds[name]) - best_short, max(long_seconds[name]) - best_long)
        print(
            f"{name}: {1 / per_row:.1f} rows/s, {per_row * 1000:.2f} ms per row; "
            f"start {best_short - per_row * short_rows:.1f} s; runs differ by up to {spread:.1f} s"
        )
    without_ray = min(row_seconds["one process"], row_seconds["process per core"])
    overhead = (row_seconds["on Ray"] - without_ray) * arguments.actors * 1000
    print(
        f"throughput on Ray / without Ray: {without_ray / row_seconds['on Ray']:.2f}; "
        f"overhead per actor: {overhead:.2f} ms per row"
    )


if __name__ == "__main__":
    main()
