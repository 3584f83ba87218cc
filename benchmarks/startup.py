"""Startup cost that the plugin adds to every Python process in its environment.

Two bare virtual environments, one with the three activation files, alternately run `python -c pass`.
Takes about 10 s. Run: python benchmarks/startup.py [--runs 200]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import venv
from pathlib import Path

ACTIVATION = Path(__file__).resolve().parents[1] / "activation"
# Empty folders in site-packages, about as many entries as in an environment with Paddle: Python lists the folder.
OTHER_PACKAGES = 300


def make_environment(folder: Path, active: bool) -> Path:
    """Create a virtual environment without pip, with or without the activation; return its Python."""
    venv.create(folder, symlinks=os.name != "nt", with_pip=False)
    (site_packages,) = folder.rglob("site-packages")
    for number in range(OTHER_PACKAGES):
        (site_packages / f"package_{number}").mkdir()
    if active:
        for path in ACTIVATION.glob("*qwenvl_activate.*"):
            shutil.copy(path, site_packages)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def milliseconds(python: Path, environment: dict[str, str]) -> float:
    """Run `python -c pass`; return the time from the start of the process to its exit, in milliseconds."""
    begin = time.perf_counter()
    subprocess.run([python, "-c", "pass"], env=environment, check=True)
    return (time.perf_counter() - begin) * 1000


def row(name: str, values: list[float]) -> str:
    lower_quartile, median, upper_quartile = statistics.quantiles(values, n=4)
    return f"| {name} | {median:.2f} | {lower_quartile:.2f} to {upper_quartile:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200, help="pairs of starts (default 200)")
    runs = parser.parse_args().runs
    # Without the caller's PYTHON* variables: PYTHONPATH or PYTHONDONTWRITEBYTECODE would affect the times;
    # without QWENVL_PLUGIN, which could switch the activation off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment.pop("QWENVL_PLUGIN", None)
    with tempfile.TemporaryDirectory() as folder:
        without = make_environment(Path(folder) / "without", active=False)
        with_it = make_environment(Path(folder) / "with", active=True)
        pairs = []  # (milliseconds without the plugin, milliseconds with it)
        for number in range(-5, runs):  # five pairs as warm-up, which fill the file caches
            order = (without, with_it) if number % 2 else (with_it, without)
            times = {python: milliseconds(python, environment) for python in order}
            if number >= 0:
                pairs.append((times[without], times[with_it]))
    print(f"| `python -c pass`, {runs} pairs | median, ms | interquartile range, ms |\n| --- | --- | --- |")
    print(row("without the plugin", [before for before, _ in pairs]))
    print(row("with it", [after for _, after in pairs]))
    print(row("paired difference", [after - before for before, after in pairs]))


if __name__ == "__main__":
    main()
