"""Python environments with a PaddleNLP wheel and this checkout, in which the test interpreter's packages come last.

Downloads, about 45 s and 600 MB for the two pinned wheels, are cached in the folder QWENVL_TEST_ENVS or in the user's
cache folder. Paddle, the largest package, is not downloaded: the environments use the test interpreter's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from paddlemix_qwenvl_plugin.upstream import pins

REPO = Path(__file__).resolve().parents[2]

# Packages that both wheels import for this model, without most of those that Paddle and the plugin require. The list is
# a third of the packages that the wheels require.
IMPORTED = (
    *("aistudio-sdk", "colorlog", "datasets", "fastapi", "filelock", "huggingface_hub", "jieba", "jinja2"),
    *("ml_dtypes", "numpy", "omegaconf", "scipy", "sentencepiece", "seqeval", "setuptools"),
    *("tokenizers>=0.21,<0.22", "tqdm"),
)
CONSTRAINTS = (
    *(
        "numpy==1.26.4",
        "huggingface_hub==0.25.2",
        "aistudio-sdk==0.2.6",
        "datasets==2.21.0",
        "pyarrow==17.0.0",
    ),
    *("setuptools<75", "scipy<1.15", "onnx<1.18", "protobuf<6", "visualdl==2.5.3"),
)
# Messages of pip and its HTTP library if no package index is reachable.
NO_INDEX = (
    "Connection to",
    "NewConnectionError",
    "ConnectTimeout",
    "ProxyError",
    "Read timed out",
    "SSLError",
)


@dataclass(frozen=True)
class WheelEnvironment:
    """Python environment with a PaddleNLP wheel and with the plugin as installed from this checkout."""

    python: Path
    version: str

    @property
    def generation(self) -> int:
        wheels = {wheel.version: wheel.generation for wheel in pins.load().paddlenlp_wheels}
        return wheels[self.version]

    def run(
        self, script: Path | str, *arguments: object, cwd: Path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script as a process. PYTHON… and QWENVL_… variables are not inherited; `environment` adds variables."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "QWENVL_"))
        }
        return subprocess.run(
            [self.python, script, *map(str, arguments)],
            cwd=cwd,
            env={**inherited, **environment},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


def make(version: str, folder: Path) -> WheelEnvironment:
    """Create the environment of a wheel in `folder`; its path.pth lists the folders of all packages."""
    dependencies = _dependencies()
    wheel = cached(
        f"paddlenlp-{version}",
        lambda target: _pip(
            dependencies / "bin" / "python", "--no-deps", "--target", target, f"paddlenlp=={version}"
        ),
    )
    venv.create(folder, symlinks=True, with_pip=False)
    site_packages = _site_packages(folder)
    test_interpreter = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # A package is imported from the first folder that has it. The .pth files in these folders are not read: the plugin
    # that may be installed in the test interpreter is not activated.
    search_path = [REPO, wheel, _site_packages(dependencies), *test_interpreter]
    (site_packages / "path.pth").write_text("".join(f"{path}\n" for path in search_path))
    for file in (REPO / "activation").glob("*qwenvl_activate.*"):
        shutil.copy(file, site_packages)
    return WheelEnvironment(folder / "bin" / "python", version)


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Return a folder of the cache; if it is missing, `build` creates it under a temporary name."""
    configured = os.environ.get("QWENVL_TEST_ENVS")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(configured) if configured else user_cache / "paddlemix-qwenvl-plugin" / "test-envs"
    root.mkdir(parents=True, exist_ok=True)
    folder, partial = root / name, root / f"{name}.partial"
    with _locked(root / f"{name}.lock"):
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            build(partial)
            partial.rename(folder)
    return folder


def _dependencies() -> Path:
    """Virtual environment with the packages that the wheels import, in the versions of docs/upstream.md."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256("\n".join([python, *IMPORTED, *CONSTRAINTS]).encode()).hexdigest()[:12]

    def build(folder: Path) -> None:
        completed = subprocess.run(
            [sys.executable, "-m", "venv", folder], capture_output=True, text=True, check=False
        )
        if completed.returncode != 0:
            pytest.fail(f"python -m venv: {(completed.stdout + completed.stderr).strip()[-500:]}")
        constraints = folder / "constraints.txt"
        constraints.write_text("".join(f"{constraint}\n" for constraint in CONSTRAINTS))
        _pip(folder / "bin" / "python", "--constraint", constraints, *IMPORTED)

    return cached(f"dependencies-python-{python}-{digest}", build)


def _pip(python: Path, *arguments: object) -> None:
    """Run `pip install`; skip the test if no package index is reachable, fail it on another error."""
    # --no-compile: most of the modules are never imported.
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--retries", "2", *arguments]
    completed = subprocess.run(
        [*map(str, command), "--disable-pip-version-check", "--no-warn-conflicts"],
        capture_output=True,
        text=True,
        check=False,
    )
    if completed.returncode == 0:
        return
    if any(message in completed.stderr for message in NO_INDEX):
        pytest.skip(
            "pip cannot reach a package index for PaddleNLP's wheels: run once with a network, or point "
            "PIP_INDEX_URL at a mirror, or QWENVL_TEST_ENVS at the cache of a machine that has run these tests"
        )
    pytest.fail(f"pip install {' '.join(map(str, arguments))}:\n{completed.stderr[-3000:]}", pytrace=False)


def _site_packages(folder: Path) -> Path:
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    return site_packages


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
