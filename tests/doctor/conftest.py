"""Fake environments for `qwenvl doctor`."""

from __future__ import annotations

import contextlib
import sys
import venv
from pathlib import Path

import pytest
from doctor_helpers import REPO, Environment


@pytest.fixture(scope="session")
def isolated_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python interpreter with this package and the installed modules, but no Paddle, upstreams or package metadata."""
    folder = tmp_path_factory.mktemp("isolated")
    modules = folder / "modules"
    modules.mkdir()
    for entry in sys.path:
        if not entry.endswith(("site-packages", "dist-packages")):
            continue
        for path in Path(entry).iterdir():
            # Python executes .pth files when it starts, from version 3.15 on also .start files.
            hidden = path.name.startswith(("paddle", "ppdiffusers", "_qwenvl", "qwenvl", "sitecustomize"))
            if not hidden and path.suffix not in (".pth", ".start", ".dist-info", ".egg-info"):
                with contextlib.suppress(FileExistsError):  # as in imports, the first on sys.path is used
                    (modules / path.name).symlink_to(path)
    venv.create(folder / "env", symlinks=True, with_pip=False)
    (site_packages,) = (folder / "env" / "lib").rglob("site-packages")
    (site_packages / "modules.pth").write_text(f"{REPO}\n{modules}\n")
    return folder / "env" / "bin" / "python"


@pytest.fixture
def environment(isolated_python: Path, tmp_path: Path) -> Environment:
    return Environment(isolated_python, tmp_path)
