"""Interpreters with and without the activation in their site-packages, and fake upstreams for them."""

from __future__ import annotations

import shutil
import subprocess
import venv
from pathlib import Path
from typing import Optional

import pytest
from activation_helpers import AUTO, FAKES, REPO, Run, clean_environment


def make_python(folder: Path) -> Path:
    """Create a virtual environment with this package on its path; return its site-packages."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site_packages,) = (folder / "lib").rglob("site-packages")
    (site_packages / "checkout.pth").write_text(f"{REPO}\n")
    return site_packages


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python with this package on its path, without activation."""
    folder = tmp_path_factory.mktemp("bare")
    make_python(folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def active_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python with the activation, as pip would install it."""
    folder = tmp_path_factory.mktemp("active")
    site_packages = make_python(folder)
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
    """Run code in the active Python with the fakes; `hook` is put on the fake auto module."""

    def run(code: str, hook: Optional[str] = None, *flags: str, **environment: str) -> object:
        if hook is not None:
            code = f"import _qwenvl_activate as a\na._TABLE[{AUTO!r}] = {hook!r}; a.state[{AUTO!r}] = 'armed'\n{code}"
        return subprocess.run(
            [active_python, *flags, "-c", code],
            env=clean_environment(PYTHONPATH=str(fakes), **environment),
            cwd=fakes.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run  # type: ignore[return-value]
