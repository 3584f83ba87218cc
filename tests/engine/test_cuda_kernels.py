"""Every GPU kernel compiles for every architecture, by NVRTC, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddlemix_qwenvl_plugin.engine import build, nvrtc, sources
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
SOURCES = sorted((sources.source_folder() / "cuda" / "kernels").glob("*.cu"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them in one type for each architecture, and in both for 9.0, which has all branches."""
    try:
        target = build.kernel_target(nvrtc.find(ARCHITECTURES, newest=99), ARCHITECTURES)
    except QwenVLError as error:
        pytest.skip(str(error))
    wanted = [
        unit
        for unit in target.units
        if ".bf16." in unit.name or any(f".sm_{code}." in unit.name for code in ("70", "75", "90a"))
    ]
    folder = tmp_path_factory.mktemp("kernels")
    with (folder / "build.log").open("w+", encoding="utf-8") as log:
        try:
            build.build(target._replace(units=wanted), folder, log)
        except build.BuildFailed:
            log.seek(0)
            pytest.fail(log.read()[-4000:])
    return folder


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles(source: Path, compiled: Path) -> None:
    """A cubin is an ELF file that names its architecture; a file may have kernels for some of them only."""
    cubins = {path.name: path.read_bytes() for path in compiled.glob(f"{source.stem}.sm_*.cubin")}
    codes = ["70.f16", "75.f16", "90a.f16", *(f"{each}.bf16" for each in (80, 86, 89, "90a", 100, 120))]
    assert set(cubins) == {f"{source.stem}.sm_{code}.cubin" for code in codes}
    for name, cubin in cubins.items():
        assert cubin[:4] == b"\x7fELF"
        assert name.split(".")[1].encode() in cubin
    assert any(b".text." in cubin for cubin in cubins.values())
