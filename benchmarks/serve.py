"""Benchmark of `qwenvl serve` under load, compared with llama.cpp's llama-server and with the loop without a server.

Run: python benchmarks/serve.py --geometry slice --folder FOLDER
     [--llama_server LLAMA_SERVER --gguf_python PYTHON_WITH_GGUF]
Needs the plugin with [serve] and a C++ compiler; FOLDER, which keeps the models, needs up to 7 GB for `slice`, which is
four layers of the 7B geometry with its whole vocabulary.

Both servers have weights of 8 bits and two threads. They get the same prompts as token ids at /v1/completions, greedy
and streamed, and generate the same numbers of tokens; all prompts differ, so no prefix cache has hits. A round runs
every load on each target (server or loop; the loop has no loads of `--rates`); the order of the targets alternates
between rounds. `--json` writes a line for each load of each round and target; the tables combine all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np
from serve_models import SIZES, export_gguf, export_stages, words
from serve_targets import Load, Server, llama, on_loop, on_server, ours

# By geometry: requests per client, and minimum number of requests, of a load in a round.
_REQUESTS = {"slice": (2, 8), "demo": (8, 64)}
# A load of requests per second (an open loop) has as many requests as a load of this number of clients.
_OPEN_LOOP_CLIENTS = 16
# Minimum and maximum.
_PROMPT_TOKENS, _NEW_TOKENS = (16, 48), (16, 48)


def main() -> None:
    arguments = parse()
    sizes, folder = SIZES[arguments.geometry], arguments.folder / arguments.geometry
    make_models(folder, sizes, arguments)
    loads = [Load(clients=n) for n in arguments.clients] + [Load(rate=rate) for rate in arguments.rates]
    targets: list[Optional[Server]] = [ours(folder), None]  # None: the loop without a server
    if arguments.llama_server:
        targets.insert(1, llama(folder, arguments.llama_server, _PROMPT_TOKENS[1] + _NEW_TOKENS[1]))
    rows: list[dict[str, Any]] = []
    with (arguments.json or Path(os.devnull)).open("a") as file:
        for number in range(arguments.rounds):
            for target in targets[:: -1 if number % 2 else 1]:
                running = on_server(target, folder) if target else on_loop(folder)
                with running as measure:
                    for load in loads:
                        if target is None and load.rate:  # the target `loop` runs only loads of clients
                            continue
                        bodies = requests(f"{number} {load}", n_requests(arguments, load), sizes)
                        row = {"round": number, "load": str(load), **measure(load, bodies)}
                        rows.append(row)
                        print(json.dumps({**row, "geometry": arguments.geometry}), file=file, flush=True)
                        print(f"round {number}: {row['name']}, {load}: {rate_of([row]):.1f} tokens/s")
    print_servers(rows)
    print_front(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--geometry", choices=SIZES, default="slice", help="of the models (default slice)")
    parser.add_argument(
        "--folder", type=Path, required=True, help="for models and logs by geometry; is reused"
    )
    parser.add_argument("--llama_server", type=Path, help="llama.cpp's program")
    parser.add_argument(
        "--gguf_python", type=Path, default=Path(sys.executable), help="interpreter with the package gguf"
    )
    parser.add_argument(
        "--clients", type=int, nargs="*", default=[1, 4, 16, 64], help="numbers of clients, one load each"
    )
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[], help="requests per second, one load each (open loop)"
    )
    parser.add_argument("--requests", type=int, help="requests of each load (default: depends on the load)")
    parser.add_argument("--rounds", type=int, default=2, help="default 2")
    parser.add_argument("--json", type=Path, help="file to which the figures of each round are appended")
    return parser.parse_args()


def make_models(folder: Path, sizes: dict[str, Any], arguments: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The last file of the exports: without it, a run has been interrupted.
    if not (folder / "text" / "qwen.manifest.json").exists():
        export_stages(folder, sizes)
        shutil.rmtree(folder / "model")
    if arguments.llama_server and not (folder / "qwen.gguf").exists():
        export_gguf(folder / "partial.gguf", sizes, arguments.gguf_python)
        (folder / "partial.gguf").rename(folder / "qwen.gguf")


def n_requests(arguments: argparse.Namespace, load: Load) -> int:
    per_client, minimum = _REQUESTS[arguments.geometry]
    return arguments.requests or max(minimum, per_client * (load.clients or _OPEN_LOOP_CLIENTS))


def requests(seed: str, n: int, sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Draw n request bodies with random prompts and numbers of new tokens; deterministic in the seed."""
    rng, tokens = random.Random(seed), words(sizes)
    return [
        {
            "prompt": [rng.choice(tokens) for _ in range(rng.randint(*_PROMPT_TOKENS))],
            "max_tokens": rng.randint(*_NEW_TOKENS),
        }
        for _ in range(n)
    ]


def rate_of(rows: list[dict[str, Any]]) -> float:
    """Tokens per second over several rounds."""
    return sum(row["tokens"] for row in rows) / (sum(row["seconds"] for row in rows) or 1)


def by_load(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """Yield (load, rows of all rounds by name of the target) for each load."""
    for load in dict.fromkeys(row["load"] for row in rows):
        by_target: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["load"] == load:
                by_target.setdefault(row["name"], []).append(row)
        yield load, by_target


def print_servers(rows: list[dict[str, Any]]) -> None:
    """Print the throughput and latency of the servers by load."""
    print_row(
        *("load", "server", "requests/s", "tokens/s", "tokens/s of each round"),
        *("first token, ms: p50, p95, p99", "between tokens, ms: p50, p95, p99"),
        *("tokens per event", "errors"),
    )
    print_row(*["---"] * 9)
    for load, by_server in by_load([row for row in rows if row["name"] != "loop"]):
        for name, rounds in by_server.items():
            seconds, n_tokens, n_requests, n_events = (
                sum(row[key] for row in rounds) for key in ("seconds", "tokens", "requests", "events")
            )
            errors = [error for row in rounds for error in row["errors"]]
            # `or 1`: all sums are 0 if every request failed.
            print_row(
                *(load, name, f"{n_requests / (seconds or 1):.2f}", f"{rate_of(rounds):.1f}"),
                ", ".join(f"{rate_of([row]):.1f}" for row in rounds),
                *(
                    percentiles([value for row in rounds for value in row[key]])
                    for key in ("first", "between")
                ),
                *(f"{n_tokens / (n_events or 1):.2f}", len(errors)),
            )
            for error in dict.fromkeys(errors):
                print(error, file=sys.stderr)


def print_front(rows: list[dict[str, Any]]) -> None:
    """Print the overhead of `qwenvl serve` over the loop, and the CPU time per token of its front and of the client."""
    print()
    print_row(
        *("load", "loop without a server, tokens/s", "qwenvl serve, tokens/s", "overhead"),
        *("front, us of CPU per token", "client, us of CPU per token"),
    )
    print_row(*["---"] * 6)
    for load, by_target in by_load(rows):
        if "loop" not in by_target:
            continue
        served = by_target["qwenvl serve"]
        loop_rate, served_rate = rate_of(by_target["loop"]), rate_of(served)
        n_tokens = sum(row["tokens"] for row in served)
        relative = ["", "", ""]  # without tokens, because every request failed
        if n_tokens:
            cpu_times = (sum(row[key] for row in served) for key in ("server_cpu", "client_cpu"))
            relative = [
                f"{1 - served_rate / loop_rate:.1%}",
                *(f"{1e6 * seconds / n_tokens:.0f}" for seconds in cpu_times),
            ]
        print_row(load, f"{loop_rate:.1f}", f"{served_rate:.1f}", *relative)


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def percentiles(seconds: list[float]) -> str:
    """Format the 50th, 95th and 99th percentile in milliseconds; an empty text without values."""
    if not seconds:
        return ""
    return ", ".join(
        f"{1e3 * q:.3g}" if q < 1 else f"{1e3 * q:.0f}" for q in np.percentile(seconds, [50, 95, 99])
    )


if __name__ == "__main__":
    main()
