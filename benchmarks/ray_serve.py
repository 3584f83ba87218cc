"""What Ray adds to a server on this machine: `qwenvl serve --ray` with one engine against `qwenvl serve`.

Run: python benchmarks/ray_serve.py [--clients 1 8] [--rounds 3]
Needs the plugin with [serve,ray] and a C++ compiler; a round takes a minute. Times are those of the client: to the
first token of a completion, and between its tokens. Both servers have the same stages, of the demo model's geometry, in
which a token takes 0.2 ms, threads and requests, greedy and streamed; all prompts differ, so no cache hits. The next
round has the reverse order.

A front of `--ray` that cannot keep up sends several tokens at once, so compare the times between tokens together with
tokens an event.
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
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=24, help="requests of each client in a round")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_stages(folder, _GEOMETRY)
        alone = ours(folder)
        on_ray = replace(alone, name="qwenvl serve --ray", command=[*alone.command, "--ray", "local"])
        for number in range(arguments.rounds):
            for server in (on_ray, alone) if number % 2 else (alone, on_ray):
                print(f"round {number + 1}: {server.name}", flush=True)
                with on_server(server, folder) as measure:
                    for n in arguments.clients:
                        bodies = requests(f"{number} {n}", n * arguments.requests, _GEOMETRY)
                        rows.append({"clients": n, **measure(Load(clients=n), bodies)})
    print_table(rows, arguments.clients, (alone.name, on_ray.name))


def print_table(rows: list[dict[str, Any]], clients: list[int], names: tuple[str, str]) -> None:
    """Print the medians and p95 of each load and server, and what Ray adds to the medians."""
    print_row(
        *("clients", "server", "first token, ms: p50, p95", "between tokens, ms: p50, p95, mean"),
        *("tokens an event", "tokens/s", "errors"),
    )
    print_row(*["---"] * 7)
    for n in clients:
        medians = []
        for name in names:
            some = [row for row in rows if (row["clients"], row["name"]) == (n, name)]
            first, between = (
                1e3 * np.concatenate([row[key] for row in some]) for key in ("first", "between")
            )
            medians.append((np.median(first), np.mean(between)))
            n_tokens, n_events, n_errors = (
                sum(row["tokens"] for row in some),
                sum(row["events"] for row in some),
                sum(len(row["errors"]) for row in some),
            )
            print_row(
                *(n, name, ", ".join(f"{q:.2f}" for q in np.percentile(first, [50, 95]))),
                ", ".join(f"{q:.2f}" for q in (*np.percentile(between, [50, 95]), np.mean(between))),
                *(f"{n_tokens / n_events:.2f}", f"{rate_of(some):.0f}", n_errors),
            )
        (first_alone, between_alone), (first_ray, between_ray) = medians
        print_row(
            n, "Ray adds", f"{first_ray - first_alone:.2f}", f"{between_ray - between_alone:.2f} (mean)"
        )


if __name__ == "__main__":
    main()
