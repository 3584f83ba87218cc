"""Build the wheel of a release: the package with the engine, compiled for each instruction set of such processors.

    pip install -e '.[release]'
    python -m tools.release_wheel dist

writes dist/paddlemix_qwenvl_plugin-VERSION-py3-none-manylinux_….whl. `auditwheel` finds out which systems it runs
on: those with a C library no older than this system's, so run it on an old one, such as a manylinux image. A wheel
that `pip` builds from the sources has no library and compiles it on first use.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from paddlemix_qwenvl_plugin.engine import build, sources
from paddlemix_qwenvl_plugin.util.errors import make_folder

REPO = Path(__file__).resolve().parents[1]


def release_wheel(output: Path) -> Path:
    """Build it; returns the wheel in `output`."""
    make_folder(output)
    with tempfile.TemporaryDirectory(prefix="qwenvl-release-") as scratch:
        folder = Path(scratch)
        _run(
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(folder / "pure"),
            str(REPO),
        )
        _run("wheel", "unpack", "--dest", str(folder / "tree"), str(_only(folder / "pure", "*.whl")))
        tree = _only(folder / "tree", "*")
        shutil.copy(_engine(folder), tree / build.SHIPPED.relative_to(REPO))
        metadata = _only(tree, "*.dist-info") / "WHEEL"
        text = metadata.read_text("utf-8").replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
        metadata.write_text(re.sub(r"(?m)^Tag: .*$", f"Tag: py3-none-{_platform()}", text), "utf-8")
        (folder / "linux").mkdir()
        _run("wheel", "pack", "--dest-dir", str(folder / "linux"), str(tree))
        wheel = _only(folder / "linux", "*.whl")
        _run("auditwheel", "show", str(wheel))
        _run("auditwheel", "repair", "--wheel-dir", str(folder / "repaired"), str(wheel))
        repaired = _only(folder / "repaired", "*.whl")
        return Path(shutil.copy(repaired, output / repaired.name))


def _engine(folder: Path) -> Path:
    """libqwenvl.so that needs nothing but the C library, whatever C++ library the system has."""
    csrc = sources.source_folder()
    units = sources.library_units(csrc, sources.all_isas(csrc))
    link = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-s")
    made = folder / "engine"
    made.mkdir()
    with (folder / "build.log").open("w", encoding="utf-8") as log:
        return build.build(build.Target(build.LIBRARY, units, link), made, log)


def _platform() -> str:
    return f"linux_{platform.machine()}"


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def _only(folder: Path, pattern: str) -> Path:
    [found] = folder.glob(pattern)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the wheel of a release.")
    parser.add_argument("output", type=Path, help="the folder that gets it")
    print(release_wheel(parser.parse_args().output))
