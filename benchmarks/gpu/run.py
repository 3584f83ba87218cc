"""Compare the engine on a GPU with PyTorch in the 7B geometry: one table, from one run on one machine.

Run: QWENVL_LIBRARY=.../libqwenvl.so QWENVL_CUDA_KERNELS=FOLDER python benchmarks/gpu/run.py
Needs PyTorch for CUDA, NumPy and 100 GB of GPU memory; takes 5 minutes. The engine needs libqwenvl_cuda.so beside
libqwenvl.so, and its compiled kernels (*.cubin) in FOLDER. Neither the plugin nor Paddle is needed.

The parts run in separate processes, one after another: machine.py measures the limits of the GPU, peers.py PyTorch, and
ours.py, run once per storage type, the engine. Figures are medians after warm-up (the opening: one run), with random
weights and new random inputs each time; the rows of captions and requests are times to complete answers. The floor
(model.py) is the larger of bytes / measured read bandwidth and operations / measured product rate, summed over the
steps of a row.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from model import COPY, OPEN_ROW, RATE, READ, STORAGES, Machine, Sizes, floors

FOLDER = Path(__file__).resolve().parent
HEADERS = ("milliseconds", "weights", "ours", "eager", "compiled", "floor", "ours / floor", "compiled / ours")
Figures = dict[tuple[str, str], float]  # by column and row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", action="store_true", help="measure only PyTorch")
    parser.add_argument("--ours", action="store_true", help="measure only the engine")
    parser.add_argument(
        "--types", nargs="+", choices=STORAGES, default=STORAGES, help="storage types of the engine's weights"
    )
    parser.add_argument(
        "--open",
        type=Path,
        metavar="FOLDER",
        help="also time the opening of a model; FOLDER needs room for 19 GB, preferably in memory",
    )
    arguments = parser.parse_args()
    # Neither or both options: measure everything.
    time_peers = arguments.peers or not arguments.ours
    time_ours = arguments.ours or not arguments.peers
    if (time_ours or arguments.open) and not Path(os.environ.get("QWENVL_LIBRARY", "")).is_file():
        raise SystemExit("QWENVL_LIBRARY must name libqwenvl.so")
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        check = ["--check", str(Path(folder) / "check.pt")]
        parts = [["machine.py"]]
        if time_peers:
            parts.append(["peers.py"])
        if time_ours:
            parts.append(["peers.py", *check])  # writes the reference with which ours.py compares
            parts += [["ours.py", "--type", storage, *check] for storage in arguments.types]
        if arguments.open:
            parts.append(["ours.py", "--open", str(arguments.open)])
        failed = [" ".join(part[:3]) for part in parts if run(part, figures) != 0]
    show(figures, arguments.types)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(part: list[str], figures: Figures) -> int:
    """Run a part, print its notes and figures, and add the figures to `figures`; return the exit status.

    Args:
        part: script in this folder and its arguments.
    """
    program = [sys.executable, "-u", str(FOLDER / part[0]), *part[1:]]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            report = json.loads(line)
            if "note" in report:
                print(report["note"], file=sys.stderr, flush=True)
                continue
            column, row, value = report["column"], report["row"], report["value"]
            print(f"{column}: {row}: {value:.2f}", file=sys.stderr, flush=True)
            figures[column, row] = value
    return process.returncode


def show(figures: Figures, types: list[str]) -> None:
    """Print the table in Markdown."""
    limits = {row: value for (column, row), value in figures.items() if column == "machine"}
    if len(limits) < 3:
        raise SystemExit("the limits of the machine were not measured")
    print(f"{datetime.date.today()}:", "; ".join(f"{row} {limits[row]:.0f}" for row in (COPY, READ, RATE)))
    print("\n| " + " | ".join(HEADERS) + " |\n" + "| --- " * len(HEADERS) + "|")
    machine = Machine(1e9 * limits[READ], 1e12 * limits[RATE])
    for storage in types:
        for row, floor in floors(Sizes(), storage, machine).items():
            ours = figures.get((storage, row))
            if ours is None and storage != "bf16":
                continue  # not measured, such as the vision rows: the weights of the vision stage are not quantized
            eager, compiled = (figures.get((column, row)) for column in ("eager", "compiled"))
            values = (ours, eager, compiled, floor, ratio(ours, floor), ratio(compiled, ours))
            print("| " + " | ".join((row, storage, *map(format_value, values))) + " |")
    if ("bf16", OPEN_ROW) in figures:
        print(f"| {OPEN_ROW} | bf16 | {format_value(figures['bf16', OPEN_ROW])} |" + " |" * 5)


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator


def format_value(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


if __name__ == "__main__":
    main()
