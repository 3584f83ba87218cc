from __future__ import annotations

import contextlib
import sys
import venv
from pathlib import Path

import pytest
from doctor_helpers import REPO, Environment


@pytest.fixture(scope="session")
def lone_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with this package and its requirements, without Paddle, upstreams and package metadata."""
    folder = tmp_path_factory.mktemp("lone")
    modules = folder / "modules"
    modules.mkdir()
    for site in (Path(folder) for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))):
        for path in site.iterdir():
            hidden = path.name.startswith(("paddle", "ppdiffusers", "_qwenvl", "qwenvl", "sitecustomize"))
            if not hidden and path.suffix not in (".pth", ".start", ".dist-info", ".egg-info"):
                with contextlib.suppress(FileExistsError):  # the first on sys.path wins
                    (modules / path.name).symlink_to(path)
    venv.create(folder / "env", symlinks=True, with_pip=False)
    (site_packages,) = (folder / "env" / "lib").rglob("site-packages")
    (site_packages / "modules.pth").write_text(f"{REPO}\n{modules}\n")
    return folder / "env" / "bin" / "python"


@pytest.fixture
def environment(lone_python: Path, tmp_path: Path) -> Environment:
    return Environment(lone_python, tmp_path)
