"""Build the binaries for the GPU tests and benchmarks on a machine without a GPU.

    pip install -e '.[gpu-engine]'
    python -m tools.gpu_bundle DIR

writes into DIR: the engine (for processors like this one), its GPU library, the library of launchers for tests/cuda,
and every kernel in float16 and bfloat16. Kernels newer than their source and all headers are kept. On the machine
with the GPU, `tests/cuda/check.sh DIR` runs all tests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from paddlemix_qwenvl_plugin.engine import build, nvrtc, sources
from paddlemix_qwenvl_plugin.engine.sources import Unit
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, make_folder

TEST_LIBRARY = "libqwenvl_cuda_test.so"


def gpu_bundle(folder: Path, architecture: int) -> None:
    """Build or update the bundle in `folder` for GPUs of compute capability architecture / 10.

    Raises:
        QwenVLError: no compiler, or no NVRTC for the architecture.
        build.BuildFailed: a build failed.
    """
    make_folder(folder)
    csrc = sources.source_folder()
    kernels = build.kernel_target(nvrtc.find((architecture,), newest=99), (architecture,))
    old = [unit for unit in kernels.units if not _up_to_date(unit, folder, csrc)]
    tests = build.cuda_target()
    launchers = [_launchers(source, tests.units[0]) for source in sorted(csrc.glob("testing/cuda_*.cc"))]
    tests = tests._replace(name=TEST_LIBRARY, units=[*tests.units, *launchers])
    engine = build.library_target(sources.library_units(csrc, sources.isas_here(csrc)))
    for target in (engine, build.cuda_target(), tests, kernels._replace(units=old)):
        _make(target, folder)


def _launchers(source: Path, like: Unit) -> Unit:
    return Unit(f"testing_{source.stem}.o", source, like.flags)


def _up_to_date(unit: Unit, folder: Path, csrc: Path) -> bool:
    made, headers = folder / unit.name, (*csrc.rglob("*.h"), *csrc.rglob("*.cuh"))
    newest = max(path.stat().st_mtime for path in (unit.source, *headers))
    return made.is_file() and made.stat().st_mtime > newest


def _make(target: build.Target, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="qwenvl-gpu-bundle-", dir=folder) as scratch:
        with (Path(scratch) / "build.log").open("w", encoding="utf-8") as log:
            build.build(target, Path(scratch), log)
        for name in target.files:
            (Path(scratch) / name).replace(folder / name)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--architecture", type=int, default=90, help="compute capability times ten")
    arguments = parser.parse_args()
    try:
        gpu_bundle(arguments.folder, arguments.architecture)
    except (QwenVLError, build.BuildFailed) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
