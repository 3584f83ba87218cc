"""Build a release wheel: the package with the engine, compiled for each ISA of this processor family.

    pip install -e '.[release]'
    python -m tools.release_wheel dist

writes dist/paddlemix_qwenvl_plugin-VERSION-py3-none-manylinux_….whl. `auditwheel` determines the compatible
systems: those with a C library at least as new as on this system, so run it on an old system, such as a manylinux
image. A wheel that `pip` builds from source has no library and compiles it at first use.
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
    """Build the wheel, and return its path in `output`."""
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
        for library in _libraries(folder):
            shutil.copy(library, tree / build.SHIPPED.with_name(library.name).relative_to(REPO))
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


def _libraries(folder: Path) -> list[Path]:
    """Build the engine and its GPU library, linked statically except for the C library."""
    csrc = sources.source_folder()
    link = ("-static-libstdc++", "-static-libgcc", "-s")
    units = sources.library_units(csrc, sources.all_isas(csrc))
    targets = (build.library_target(units, link), build.cuda_target(link))
    for target in targets:
        made = folder / target.name
        made.mkdir()
        with (folder / "build.log").open("a", encoding="utf-8") as log:
            build.build(target, made, log)
    return [folder / target.name / target.name for target in targets]


def _platform() -> str:
    return f"linux_{platform.machine()}"


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def _only(folder: Path, pattern: str) -> Path:
    [found] = folder.glob(pattern)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the wheel of a release.")
    parser.add_argument("output", type=Path, help="output folder")
    print(release_wheel(parser.parse_args().output))
