"""Benchmark of `qwenvl serve` under load, compared with llama.cpp's llama-server and with our loop without a server.

Run: python benchmarks/serve.py --geometry slice --folder FOLDER
     [--llama_server LLAMA_SERVER --gguf_python PYTHON_WITH_GGUF]
Needs the plugin with [serve] and a C++ compiler; FOLDER keeps the models, 7 GB for slice. Both servers get the same
prompts as token ids at /v1/completions, greedy, streamed, 8 bits, two threads, the same numbers of new tokens; all
prompts differ, so no cache hits. A round runs every load on each target; the next round has the reverse order.
`--json` writes a line for each load of each round; the tables combine all rounds.
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

# Requests per client and least number of requests in a round; lengths of prompts and completions.
_REQUESTS = {"slice": (2, 8), "demo": (8, 64)}
_PROMPT_TOKENS, _NEW_TOKENS = (16, 48), (16, 48)
_TIMES = "first token, ms: p50, p95, p99", "between tokens, ms"


def main() -> None:
    arguments = parse()
    sizes, folder = SIZES[arguments.geometry], arguments.folder
    make_models(folder, sizes, arguments)
    loads = [Load(clients=n) for n in arguments.clients] + [Load(rate=rate) for rate in arguments.rates]
    targets: list[Optional[Server]] = [ours(folder), None]  # None: the loop
    if arguments.llama_server:
        targets.insert(1, llama(folder, arguments.llama_server, _PROMPT_TOKENS[1] + _NEW_TOKENS[1]))
    rows: list[dict[str, Any]] = []
    with (arguments.json or Path(os.devnull)).open("a") as file:
        for number in range(arguments.rounds):
            for target in targets[:: -1 if number % 2 else 1]:
                run = on_server(target, folder) if target else on_loop(folder)
                with run as measure:
                    for load in loads:
                        if target is None and load.rate:
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
    parser.add_argument("--geometry", choices=SIZES, default="slice")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--llama_server", type=Path)
    parser.add_argument("--gguf_python", type=Path, default=Path(sys.executable))
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="requests per second, open loop")
    parser.add_argument("--requests", type=int, help="requests of each load (default: by clients)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def make_models(folder: Path, sizes: dict[str, Any], arguments: argparse.Namespace) -> None:
    folder.mkdir(exist_ok=True)
    if not (folder / "text").exists():
        export_stages(folder, sizes)
        shutil.rmtree(folder / "model")
    if arguments.llama_server and not (folder / "qwen.gguf").exists():
        export_gguf(folder / "partial.gguf", sizes, arguments.gguf_python)
        (folder / "partial.gguf").rename(folder / "qwen.gguf")


def n_requests(arguments: argparse.Namespace, load: Load) -> int:
    each, least = _REQUESTS[arguments.geometry]
    return arguments.requests or max(least, each * (load.clients or 16))


def requests(seed: str, n: int, sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Draw prompts and numbers of new tokens; deterministic in the seed."""
    chance, known = random.Random(seed), words(sizes)
    return [
        {
            "prompt": [chance.choice(known) for _ in range(chance.randint(*_PROMPT_TOKENS))],
            "max_tokens": chance.randint(*_NEW_TOKENS),
        }
        for _ in range(n)
    ]


def rate_of(rows: list[dict[str, Any]]) -> float:
    """Tokens per second."""
    return sum(row["tokens"] for row in rows) / (sum(row["seconds"] for row in rows) or 1)


def groups(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """Yield each load with the rows of all rounds by target name."""
    for load in dict.fromkeys(row["load"] for row in rows):
        found: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["load"] == load:
                found.setdefault(row["name"], []).append(row)
        yield load, found


def print_servers(rows: list[dict[str, Any]]) -> None:
    print_row(
        "load", "server", "requests/s", "tokens/s", "of each round", *_TIMES, "tokens an event", "errors"
    )
    print_row(*["---"] * 9)
    for load, found in groups([row for row in rows if row["name"] != "loop"]):
        for name, some in found.items():
            seconds, n_tokens, n_requests, n_events = (
                sum(row[key] for row in some) for key in ("seconds", "tokens", "requests", "events")
            )
            errors = [error for row in some for error in row["errors"]]
            print_row(
                *(load, name, f"{n_requests / (seconds or 1):.2f}", f"{rate_of(some):.1f}"),
                ", ".join(f"{rate_of([row]):.1f}" for row in some),
                *(spread([value for row in some for value in row[key]]) for key in ("first", "between")),
                *(f"{n_tokens / (n_events or 1):.2f}", len(errors)),
            )
            for error in dict.fromkeys(errors):
                print(error, file=sys.stderr)


def print_front(rows: list[dict[str, Any]]) -> None:
    print()
    print_row(
        "load", "loop alone, tokens/s", "qwenvl serve", "it costs", "front, us of CPU a token", "client"
    )
    print_row(*["---"] * 6)
    for load, found in groups(rows):
        if "loop" not in found:
            continue
        served = found["qwenvl serve"]
        loop, http, n_tokens = rate_of(found["loop"]), rate_of(served), sum(row["tokens"] for row in served)
        costs = (1e6 * sum(row[key] for row in served) / n_tokens for key in ("server_cpu", "client_cpu"))
        print_row(
            load, f"{loop:.1f}", f"{http:.1f}", f"{1 - http / loop:.1%}", *(f"{cost:.0f}" for cost in costs)
        )


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def spread(seconds: list[float]) -> str:
    if not seconds:
        return ""
    return ", ".join(
        f"{1e3 * q:.3g}" if q < 1 else f"{1e3 * q:.0f}" for q in np.percentile(seconds, [50, 95, 99])
    )


if __name__ == "__main__":
    main()
