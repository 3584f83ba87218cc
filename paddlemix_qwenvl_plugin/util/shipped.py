"""Data folders of the package: inside an installed wheel, or in a source tree."""

from __future__ import annotations

from pathlib import Path

from paddlemix_qwenvl_plugin.util.errors import QwenVLError

PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder(tree_path: str, package_path: str, package: Path = PACKAGE) -> Path:
    """Find a data folder: at `package_path` in the installed package, else at `tree_path` in the source tree.

    pyproject.toml gives the place in a wheel ([tool.hatch.build.targets.wheel.sources]).

    Raises:
        QwenVLError: the installation has neither.
    """
    in_wheel, in_tree = package / package_path, package.parent / tree_path
    if in_wheel.is_dir():
        return in_wheel
    # In site-packages a folder of that name may belong to another package; pyproject.toml marks a source tree.
    if in_tree.is_dir() and (package.parent / "pyproject.toml").is_file():
        return in_tree
    raise QwenVLError(f"{in_wheel}: the shipped {tree_path} are missing; install the package again")
