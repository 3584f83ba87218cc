"""Fixtures: virtual environments with and without the activation, and fake upstream packages for them."""

from __future__ import annotations

import shutil
import subprocess
import venv
from pathlib import Path
from typing import Optional

import pytest
from activation_helpers import AUTO, FAKES, REPO, Run, clean_environment


def make_environment(folder: Path) -> Path:
    """Create a virtual environment with this package on its path; return its site-packages."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site_packages,) = (folder / "lib").rglob("site-packages")
    (site_packages / "checkout.pth").write_text(f"{REPO}\n")
    return site_packages


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter with this package on its path, without activation."""
    folder = tmp_path_factory.mktemp("bare")
    make_environment(folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def active_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter with the activation in its site-packages, where pip installs it from a wheel."""
    folder = tmp_path_factory.mktemp("active")
    site_packages = make_environment(folder)
    for path in (REPO / "activation").glob("*qwenvl_activate.*"):
        shutil.copy(path, site_packages)
    return folder / "bin" / "python"


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """Folder with the fake packages, for PYTHONPATH."""
    folder = tmp_path / "fakes"
    for name, text in FAKES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def run(active_python: Path, fakes: Path) -> Run:
    """Function that runs code in the active interpreter with the fake packages.

    Its argument `hook`, as "module:function", becomes the hook of the fake module AUTO; `flags` are the interpreter's.
    """

    def run(code: str, hook: Optional[str] = None, *flags: str, **environment: str) -> object:
        if hook is not None:
            set_hook = f"a._TABLE[{AUTO!r}] = {hook!r}; a.state[{AUTO!r}] = 'armed'"
            code = f"import _qwenvl_activate as a\n{set_hook}\n{code}"
        return subprocess.run(
            [active_python, *flags, "-c", code],
            env=clean_environment(PYTHONPATH=str(fakes), **environment),
            cwd=fakes.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run  # type: ignore[return-value]
