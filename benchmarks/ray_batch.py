"""Throughput of `qwenvl batch --ray` on this machine against the same cores without Ray, and the overhead of a row.

    .venv/bin/python benchmarks/ray_batch.py --vision qwenvl-demo/vision/vision --language qwenvl-demo/text/qwen

Both run the same rows, text only and sampled to their full length, so that their work is the same. Without Ray, one
process uses all cores; on Ray, as many actors of one core each share them, and the number of concurrent rows. The start
of the cluster, of the actors and of their models is measured apart, with a job of few rows: a long job pays it once.
The overhead of a row is what Ray and the parts add to its computation: for each actor, the difference of the times per
row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "What is the name of the animal that stands beside the red car in the second row?"


def job(arguments: argparse.Namespace, folder: Path, n_rows: int, *flags: str, threads: int) -> float:
    """Run a job; return its seconds."""
    source = folder / f"{n_rows}.jsonl"
    rows = [
        {
            "id": n,
            "prompt": f"{n}. {WORDS}",
            "temperature": 1.0,
            "seed": n,
            "min_new_tokens": arguments.tokens,
        }
        for n in range(n_rows)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = folder / f"out-{time.monotonic_ns()}"
    stages = ["--first_model_path", arguments.vision, "--second_model_path", arguments.language]
    command = [
        *(sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "batch", str(source), str(target)),
        *stages,
        *("--max_new_tokens", str(arguments.tokens), *flags),
    ]
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=2)
    return time.perf_counter() - start


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vision", required=True)
    parser.add_argument("--language", required=True)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--few", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=8, help="concurrent rows of an actor")
    parser.add_argument("--actors", type=int, default=cores)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    alone = ("--batch_size", str(arguments.batch_size * arguments.actors))
    on_ray = ("--batch_size", str(arguments.batch_size), "--ray=local", "--ray_actors", str(arguments.actors))
    rows = arguments.rows - arguments.few
    seconds: dict[str, list[float]] = {"one process": [], "on Ray": []}
    starts: dict[str, list[float]] = {"one process": [], "on Ray": []}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(arguments.repeat):  # alternately: other programs may slow either
            for kind, flags, threads in (
                ("one process", alone, cores),
                ("on Ray", on_ray, cores // arguments.actors),
            ):
                few = job(arguments, Path(name), arguments.few, *flags, threads=threads)
                many = job(arguments, Path(name), arguments.rows, *flags, threads=threads)
                seconds[kind].append((many - few) / rows)
                starts[kind].append(few - seconds[kind][-1] * arguments.few)
    best = {kind: min(each) for kind, each in seconds.items()}
    for kind, each in best.items():
        print(f"{kind}: {1 / each:.1f} rows/s, {each * 1000:.2f} ms a row; start {min(starts[kind]):.1f} s")
    overhead = (best["on Ray"] - best["one process"]) * arguments.actors * 1000
    ratio = best["one process"] / best["on Ray"]
    print(f"on Ray / one process: {ratio:.2f}; overhead of an actor: {overhead:.2f} ms a row")


if __name__ == "__main__":
    main()
