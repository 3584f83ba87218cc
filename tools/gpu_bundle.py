"""Build the binaries for the GPU tests and benchmarks on a machine without a GPU.

    pip install -e '.[gpu-engine]'
    python -m tools.gpu_bundle DIR

The second command writes to DIR: the engine, compiled for the ISA generic and the one or two best of this machine's
processor; its GPU library; the library of kernel launchers for tests/cuda; and all kernels in float16 and, for
--architecture 80 or newer, bfloat16. A kernel that is newer than its source and all headers is not compiled again. On
the machine with the GPU, `tests/cuda/check.sh DIR` runs the GPU tests and timings.
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
        QwenVLError: `folder` cannot be created, or there is no C++ compiler, or no NVRTC for the architecture.
        build.BuildFailed: a build failed.
    """
    make_folder(folder)
    csrc = sources.source_folder()
    engine = build.library_target(sources.library_units(csrc, sources.isas_here(csrc)))
    build.require_compiler(engine)
    # newest=99: on a machine without a GPU, no driver limits the version of NVRTC.
    kernels = build.kernel_target(nvrtc.find((architecture,), newest=99), (architecture,))
    outdated = [unit for unit in kernels.units if not _is_up_to_date(unit, folder, csrc)]
    gpu_library = build.cuda_target()
    # The test library is the GPU library with the functions that launch kernels for tests/cuda.
    flags = gpu_library.units[0].flags
    launchers = [
        Unit(f"testing_{source.stem}.o", source, flags) for source in sorted(csrc.glob("testing/cuda_*.cc"))
    ]
    test_library = gpu_library._replace(name=TEST_LIBRARY, units=[*gpu_library.units, *launchers])
    for target in (engine, gpu_library, test_library, kernels._replace(units=outdated)):
        _build(target, folder)


def _is_up_to_date(unit: Unit, folder: Path, csrc: Path) -> bool:
    output, headers = folder / unit.name, (*csrc.rglob("*.h"), *csrc.rglob("*.cuh"))
    last_change = max(path.stat().st_mtime for path in (unit.source, *headers))
    return output.is_file() and output.stat().st_mtime > last_change


def _build(target: build.Target, folder: Path) -> None:
    """Build a target in a temporary folder, then move its files to `folder`."""
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
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder")
    parser.add_argument(
        "--architecture", type=int, default=90, help="compute capability of the GPU, times ten (default 90)"
    )
    arguments = parser.parse_args()
    try:
        gpu_bundle(arguments.folder, arguments.architecture)
    except (QwenVLError, build.BuildFailed) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
