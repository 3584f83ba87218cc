"""The release wheel that tools/release_wheel.py builds, installed. Building the engine for all ISAs takes minutes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from paddlemix_qwenvl_plugin.engine.sources import all_isas, source_folder

REPO = Path(__file__).resolve().parents[2]

missing = [name for name in ("auditwheel", "wheel", "hatchling") if importlib.util.find_spec(name) is None]
missing += [name for name in ("patchelf", "c++") if shutil.which(name) is None]

CODE = """
import ctypes, paddlemix_qwenvl_plugin
from paddlemix_qwenvl_plugin.engine.build import library
path = library()
engine = ctypes.CDLL(str(path))
engine.qvl_version.restype = ctypes.c_char_p
engine.qvl_packed_bytes.restype = ctypes.c_uint64
engine.qvl_packed_bytes.argtypes = [ctypes.c_int32, ctypes.c_int64, ctypes.c_int64]
print(path, engine.qvl_version().decode(), engine.qvl_packed_bytes(2, 3, 128), sep="\\n")
"""


def run(*command: object, **variables: str) -> str:
    result = subprocess.run(
        list(map(str, command)),
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path[1:]]), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.skipif(
    bool(missing), reason=f"missing: {', '.join(missing)}; pip install -e '.[release]', apt-get install g++"
)
def test_the_wheel_needs_no_compiler(tmp_path: Path) -> None:
    wheel = Path(run(sys.executable, "-m", "tools.release_wheel", tmp_path / "dist").splitlines()[-1])
    assert re.fullmatch(r"paddlemix_qwenvl_plugin-[\d.]+-py3-none-manylinux_\d+_\d+_\w+\.whl", wheel.name)

    venv.create(tmp_path / "env", symlinks=True, with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
    (site_packages,) = (tmp_path / "env" / "lib").rglob("site-packages")
    # The new environment imports the package's requirements from the folders of the Python that runs this test. These
    # folders do not contain this checkout.
    folders = {
        str(Path(importlib.util.find_spec(name).origin).parents[1]) for name in ("pydantic", "filelock")
    }
    (site_packages / "requirements.pth").write_text("".join(f"{folder}\n" for folder in folders))
    result = subprocess.run(
        [python, "-c", CODE],
        cwd=tmp_path,
        env={"PATH": str(python.parent), "QWENVL_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    path, version, packed = result.stdout.splitlines()
    assert Path(path).parent == site_packages / "paddlemix_qwenvl_plugin" / "engine"
    header = (source_folder() / "include/qwenvl.h").read_text()
    major, minor = re.search(r"VERSION_MAJOR (\d+)\n#define QVL_VERSION_MINOR (\d+)", header).groups()
    assert version == f"{major}.{minor}"
    assert packed == str(3 * 128 + 3 * 4)  # int8: three rows of 128 values, and a float32 scale for each row
    assert not (tmp_path / "cache").exists()  # nothing was compiled
    content = Path(path).read_bytes()
    assert all(isa.name.encode() in content for isa in all_isas(source_folder()))
    # The libraries do not need the C++ runtime of the system.
    cuda_library = Path(path).with_name("libqwenvl_cuda.so")
    needed = run("patchelf", "--print-needed", path, cuda_library).split()
    assert not {name for name in needed if re.match(r"lib(stdc\+\+|gcc)", name)}
