"""Build a release wheel: the package with the engine, for each ISA of this processor family, and its GPU library.

    pip install -e '.[release]'
    python -m tools.release_wheel dist

The second command writes dist/paddlemix_qwenvl_plugin-VERSION-py3-none-manylinux_….whl. `auditwheel` derives the tag
from the versions of the C library's symbols that the engine uses. Build on an old system, such as a manylinux
container: the wheel runs on systems whose C library is at least as new. A wheel that `pip` builds from source has no
engine library; its package compiles the engine at first use.
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
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, make_folder

REPO = Path(__file__).resolve().parents[1]


def release_wheel(output: Path) -> Path:
    """Build the wheel in `output`, and return its path.

    Raises:
        QwenVLError: `output` cannot be created, or there is no C++ compiler.
        build.BuildFailed: a build failed.
        subprocess.CalledProcessError: pip, wheel or auditwheel failed.
    """
    build.require_compiler(build.library_target([]))
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
        # The wheel is no longer platform-independent.
        metadata = _only(tree, "*.dist-info") / "WHEEL"
        text = metadata.read_text("utf-8").replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
        tag = f"py3-none-linux_{platform.machine()}"
        metadata.write_text(re.sub(r"(?m)^Tag: .*$", f"Tag: {tag}", text), "utf-8")
        (folder / "linux").mkdir()
        _run("wheel", "pack", "--dest-dir", str(folder / "linux"), str(tree))
        wheel = _only(folder / "linux", "*.whl")
        _run("auditwheel", "show", str(wheel))  # prints the symbols that determine the tag
        _run("auditwheel", "repair", "--wheel-dir", str(folder / "repaired"), str(wheel))
        repaired = _only(folder / "repaired", "*.whl")
        return Path(shutil.copy(repaired, output / repaired.name))


def _libraries(folder: Path) -> list[Path]:
    """Build the engine and its GPU library, linked statically except for the C library; return their paths."""
    csrc = sources.source_folder()
    link_flags = ("-static-libstdc++", "-static-libgcc", "-s")
    units = sources.library_units(csrc, sources.all_isas(csrc))
    targets = (build.library_target(units, link_flags), build.cuda_target(link_flags))
    for target in targets:
        build_folder = folder / target.name
        build_folder.mkdir()
        with (folder / "build.log").open("a", encoding="utf-8") as log:
            build.build(target, build_folder, log)
    return [folder / target.name / target.name for target in targets]


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def _only(folder: Path, pattern: str) -> Path:
    """Return the only path in a folder that matches a pattern."""
    [path] = folder.glob(pattern)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the wheel of a release.")
    parser.add_argument("output", type=Path, help="output folder")
    try:
        print(release_wheel(parser.parse_args().output))
    except (QwenVLError, build.BuildFailed) as error:
        sys.exit(f"error: {error}")
