"""Latency that Ray adds to a server: `qwenvl serve --ray` with one engine, compared with `qwenvl serve`.

Run: python benchmarks/ray_serve.py [--clients N ...] [--requests N] [--rounds N]
Needs the plugin with [serve,ray] and a C++ compiler; a round takes a minute.

Times are measured by the client: to the first token of a completion, and between its tokens. Both servers have the same
number of threads, and the same exported stages in the demo model's geometry, in which a token takes 0.2 ms. They get
the same requests, greedy and streamed; all prompts differ, so no prefix cache has hits. The order of the servers
alternates between rounds.

The times between tokens are those between events of the stream. An overloaded front, of either server, sends several
tokens in one event, so compare these times together with the tokens per event.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from serve import print_row, rate_of, requests
from serve_models import SIZES, export_stages
from serve_targets import Load, on_server, ours

_GEOMETRY = SIZES["demo"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 8], help="numbers of clients, each measured separately"
    )
    parser.add_argument("--requests", type=int, default=24, help="requests of each client in a round")
    parser.add_argument("--rounds", type=int, default=1, help="default 1")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_stages(folder, _GEOMETRY)
        plain = ours(folder)
        on_ray = replace(plain, name="qwenvl serve --ray", command=[*plain.command, "--ray", "local"])
        for number in range(arguments.rounds):
            for server in (on_ray, plain) if number % 2 else (plain, on_ray):
                print(f"round {number + 1}: {server.name}", flush=True)
                with on_server(server, folder) as measure:
                    for n in arguments.clients:
                        bodies = requests(f"{number} {n}", n * arguments.requests, _GEOMETRY)
                        rows.append({"clients": n, **measure(Load(clients=n), bodies)})
    print_table(rows, arguments.clients, (plain.name, on_ray.name))


def print_table(rows: list[dict[str, Any]], clients: list[int], names: tuple[str, str]) -> None:
    """Print the times of both servers for each number of clients, and their differences.

    Args:
        names: names of the server without Ray and of the server on Ray.
    """
    print_row(
        *("clients", "server", "first token, ms: p50, p95", "between tokens, ms: p50, p95, mean"),
        *("tokens per event", "tokens/s", "errors"),
    )
    print_row(*["---"] * 7)
    for n in clients:
        averages = []  # (median time to first token, mean time between tokens) of each server
        for name in names:
            rounds = [row for row in rows if (row["clients"], row["name"]) == (n, name)]
            first, between = (
                1e3 * np.concatenate([row[key] for row in rounds]) for key in ("first", "between")
            )
            averages.append((np.median(first), np.mean(between)))
            n_tokens, n_events = (sum(row[key] for row in rounds) for key in ("tokens", "events"))
            n_errors = sum(len(row["errors"]) for row in rounds)
            print_row(
                *(n, name, ", ".join(f"{q:.2f}" for q in np.percentile(first, [50, 95]))),
                ", ".join(f"{q:.2f}" for q in (*np.percentile(between, [50, 95]), np.mean(between))),
                *(f"{n_tokens / n_events:.2f}", f"{rate_of(rounds):.0f}", n_errors),
            )
        (first_plain, between_plain), (first_ray, between_ray) = averages
        print_row(
            n,
            "overhead of Ray",
            f"{first_ray - first_plain:.2f} (median)",
            f"{between_ray - between_plain:.2f} (mean)",
        )


if __name__ == "__main__":
    main()
