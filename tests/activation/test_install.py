"""Installation and removal of the activation by pip, from a wheel and as an editable install."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from activation_helpers import REPO, clean_environment

# The module, and the files through which an interpreter imports it at its start: .start from Python 3.15 on.
ACTIVATION_FILES = ("_qwenvl_activate.py", "qwenvl_activate.pth", "qwenvl_activate.start")


def pip(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this environment's pip for another environment, without network."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "--disable-pip-version-check",
        *arguments,
    ]
    return subprocess.run(command, env=clean_environment(PIP_NO_INDEX="1"), capture_output=True, text=True)


def build(folder: Path, kind: str) -> Path:
    """Build a wheel with the build backend of pyproject.toml, as pip does; `kind` is wheel or editable."""
    call = f"import hatchling.build as b; print(b.build_{kind}({str(folder)!r}))"
    process = subprocess.run(
        [sys.executable, "-c", call], cwd=REPO, env=clean_environment(), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return folder / process.stdout.split()[-1]


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_install_activates_and_uninstall_leaves_nothing(tmp_path: Path, kind: str) -> None:
    for module in ("hatchling", "editables"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; run: pip install hatchling editables")
    if pip(Path(sys.executable), "--version").returncode != 0:
        pytest.skip("pip is missing or older than 22.3; run: python -m ensurepip; pip install -U pip")
    venv.create(tmp_path / "env", symlinks=True, with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site_packages,) = (tmp_path / "env" / "lib").rglob("site-packages")
    commands_before, packages_before = contents(python.parent), contents(site_packages)
    wheel = build(tmp_path, kind)
    process = pip(python, "install", "--no-deps", str(wheel))
    assert process.returncode == 0, process.stderr

    # An editable install takes the activation's module, and the recipes, from the checkout.
    expected = ACTIVATION_FILES if kind == "wheel" else ACTIVATION_FILES[1:]
    assert {name for name in ACTIVATION_FILES if (site_packages / name).is_file()} == set(expected)
    shipped = site_packages / "paddlemix_qwenvl_plugin" / "recipes" / "shipped" / "tiny-cpu.yaml"
    assert shipped.exists() is (kind == "wheel")
    code = (
        "import sys; a = sys.modules['_qwenvl_activate']; print(a.__file__)\n"
        "import paddlemix_qwenvl_plugin as p; print(p.__file__, type(sys.meta_path[0]).__module__)"
    )
    process = subprocess.run(
        [python, "-c", code],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    package_parent = site_packages if kind == "wheel" else REPO
    activation = site_packages if kind == "wheel" else REPO / "activation"
    assert process.stderr == ""
    assert process.stdout.splitlines() == [
        str(activation / "_qwenvl_activate.py"),
        f"{package_parent / 'paddlemix_qwenvl_plugin' / '__init__.py'} _qwenvl_activate",
    ]

    process = pip(python, "uninstall", "-y", "paddlemix-qwenvl-plugin")
    assert process.returncode == 0, process.stderr
    assert contents(site_packages) == packages_before
    assert contents(python.parent) == commands_before
