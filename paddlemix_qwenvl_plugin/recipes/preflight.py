"""Checks before the first step: the recipe's requirements and assets."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from paddlemix_qwenvl_plugin.artifact.manifest import FileDigest
from paddlemix_qwenvl_plugin.recipes import environment
from paddlemix_qwenvl_plugin.recipes.schema import Asset, Recipe, Requires
from paddlemix_qwenvl_plugin.util.machine import GIB, gpus, memory_gib


def problems(recipe: Recipe, output: Path) -> list[str]:
    """List the unmet requirements and asset problems, one line each; `output`: parent of the run folder."""
    unmet = _unmet_requirements(recipe.requires, output)
    for asset in recipe.assets:
        unmet += _asset_problems(asset)
    return unmet


def _unmet_requirements(requires: Requires, output: Path) -> list[str]:
    unmet = []
    python = platform.python_version()
    if requires.python and not _in_range(python, requires.python):
        unmet.append(f"requires python {requires.python}; this is {python}")
    if requires.paddle:
        installed = environment.version("paddlepaddle-gpu") or environment.version("paddlepaddle")
        if installed is None:
            unmet.append(
                f"requires paddle {requires.paddle}; it is not installed"
                " (pip install 'paddlemix-qwenvl-plugin[cpu]', or [gpu])"
            )
        elif not _in_range(installed, requires.paddle):
            unmet.append(f"requires paddle {requires.paddle}; installed is {installed}")
    for line in requires.packages:
        package = Requirement(line)
        installed = environment.version(package.name)
        if installed is None:
            unmet.append(f"requires {line}; it is not installed (pip install '{line}')")
        elif not package.specifier.contains(installed, prereleases=True):
            unmet.append(f"requires {line}; installed is {installed}")
    memory = memory_gib()
    if requires.memory_gib and memory is not None and memory < requires.memory_gib:
        unmet.append(f"requires memory_gib {requires.memory_gib:g}; this process may use {memory:.1f}")
    if requires.disk_gib:
        existing = next(
            folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists()
        )
        free = shutil.disk_usage(existing).free / GIB
        if free < requires.disk_gib:
            unmet.append(f"requires disk_gib {requires.disk_gib:g}; {existing} has {free:.1f} free")
    if requires.gpu and not gpus():
        unmet.append("requires gpu; the CUDA driver shows no device")
    return unmet


def _in_range(version: str, specifier: str) -> bool:
    return SpecifierSet(specifier).contains(version, prereleases=True)


def _asset_problems(asset: Asset) -> list[str]:
    path = Path(asset.path)
    purpose = f" ({asset.why})" if asset.why else ""
    if not path.exists():
        return [
            f"asset {asset.name}: {path} is missing{purpose}; put it there or set assets.{asset.name}.path"
        ]
    if asset.sha256 is None:
        return []
    if path.is_dir():
        return [f"asset {asset.name}: {path} is a folder and sha256 is for files; list its files as assets"]
    if not path.is_file():  # reading a device may never end
        return [f"asset {asset.name}: {path} is neither a file nor a folder"]
    digest = FileDigest.of(path).sha256
    if digest != asset.sha256:
        return [f"asset {asset.name}: {path} has sha256 {digest}, not {asset.sha256}; fetch it again"]
    return []
