"""Compare the engine on a GPU with PyTorch at the 7B geometry, in one table of one run on one machine.

Run: QWENVL_LIBRARY=.../libqwenvl.so QWENVL_CUDA_KERNELS=FOLDER python benchmarks/gpu/run.py
Needs PyTorch for CUDA, 100 GB of GPU memory and 5 minutes; for the engine, libqwenvl_cuda.so beside libqwenvl.so. The
plugin need not be installed, nor Paddle.

The parts run in separate processes, one after another: machine.py the limits, peers.py PyTorch, ours.py the engine with
each storage type. Figures are medians after warm-up, with random weights and new random inputs each time;
caption and requests are times to complete answers. The floor (model.py) is the larger of bytes / measured read
bandwidth and operations / measured product rate, summed over the steps of a row.
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
HEADS = ("milliseconds", "weights", "ours", "eager", "compiled", "floor", "ours / floor", "compiled / ours")
Figures = dict[tuple[str, str], float]  # by column and row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", action="store_true", help="PyTorch alone")
    parser.add_argument("--ours", action="store_true", help="the engine alone")
    parser.add_argument(
        "--types", nargs="+", choices=STORAGES, default=STORAGES, help="weights of the engine"
    )
    parser.add_argument(
        "--open",
        type=Path,
        metavar="FOLDER",
        help="also time opening: FOLDER has room for 19 GB, preferably in memory",
    )
    arguments = parser.parse_args()
    both = arguments.peers == arguments.ours
    engine = both or arguments.ours or arguments.open
    if engine and not Path(os.environ.get("QWENVL_LIBRARY", "")).is_file():
        raise SystemExit("QWENVL_LIBRARY must name libqwenvl.so")
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        check = ["--check", str(Path(folder) / "check.pt")]
        parts = [["machine.py"]]
        if both or arguments.peers:
            parts.append(["peers.py"])
        if both or arguments.ours:
            parts.append(["peers.py", *check])
            parts += [["ours.py", "--type", each, *check] for each in arguments.types]
        if arguments.open:
            parts.append(["ours.py", "--open", str(arguments.open)])
        failed = [" ".join(part[:3]) for part in parts if run(part, figures) != 0]
    show(figures, arguments.types)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(part: list[str], figures: Figures) -> int:
    """Run a part, print its notes, and collect its figures."""
    program = [sys.executable, "-u", str(FOLDER / part[0]), *part[1:]]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if "note" in said:
                print(said["note"], file=sys.stderr, flush=True)
                continue
            key = said["column"], said["row"]
            print(f"{key[0]}: {key[1]}: {said['value']:.2f}", file=sys.stderr, flush=True)
            figures[key] = said["value"]
    return process.returncode


def show(figures: Figures, types: list[str]) -> None:
    """Print the table in Markdown, in milliseconds."""
    limits = {row: value for (column, row), value in figures.items() if column == "machine"}
    if len(limits) < 3:
        raise SystemExit("the limits of the machine were not measured")
    print(f"{datetime.date.today()}:", "; ".join(f"{row} {limits[row]:.0f}" for row in (COPY, READ, RATE)))
    print("\n| " + " | ".join(HEADS) + " |\n" + "| --- " * len(HEADS) + "|")
    machine = Machine(1e9 * limits[READ], 1e12 * limits[RATE])
    for storage in types:
        for row, floor in floors(Sizes(), storage, machine).items():
            ours = figures.get((storage, row))
            if ours is None and storage != "bf16":
                continue  # the weights of images are not quantised
            eager, compiled = (figures.get((column, row)) for column in ("eager", "compiled"))
            values = (ours, eager, compiled, floor, over(ours, floor), over(compiled, ours))
            print("| " + " | ".join((row, storage, *map(shown, values))) + " |")
    if ("bf16", OPEN_ROW) in figures:
        print(f"| {OPEN_ROW} | bf16 | {shown(figures['bf16', OPEN_ROW])} |" + " |" * 5)


def over(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


if __name__ == "__main__":
    main()
