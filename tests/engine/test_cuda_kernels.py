"""NVRTC compiles every GPU kernel for each of ARCHITECTURES; no GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Optional

import pytest

from paddlemix_qwenvl_plugin.engine import build, nvrtc, sources
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
# Compiled to machine code: one compute type per architecture, and both for 9.0, which has separate kernels.
ASSEMBLED = ("sm_70.f16", "sm_75.f16", "sm_80.bf16", "sm_90a.f16", "sm_90a.bf16", "sm_120.bf16")
# Compiled only to PTX, since assembly takes most of the time. Apart from constants of linear_decode_wide.cu for 10.0,
# the architectures of ASSEMBLED have all preprocessor branches of these.
TO_PTX = ("sm_86.bf16", "sm_89.bf16", "sm_100.bf16")
SOURCES = sorted((sources.source_folder() / "cuda" / "kernels").glob("*.cu"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        # newest=99: no driver limits NVRTC's version.
        target = build.kernel_target(nvrtc.find(ARCHITECTURES, newest=99), ARCHITECTURES)
    except QwenVLError as error:
        pytest.skip(str(error))
    units = [tested for unit in target.units if (tested := _tested_unit(unit)) is not None]
    folder = tmp_path_factory.mktemp("kernels")
    with (folder / "build.log").open("w+", encoding="utf-8") as log:
        try:
            build.build(target._replace(units=units), folder, log)
        except build.BuildFailed:
            log.seek(0)
            pytest.fail(log.read()[-4000:])
    return folder


def _tested_unit(unit: sources.Unit) -> Optional[sources.Unit]:
    """The unit with the flags of this test; None if this test does not compile it."""
    code = unit.name.split(".", 1)[1].removesuffix(".cubin")
    if code in TO_PTX:
        return replace(unit, flags=tuple(flag.replace("=sm_", "=compute_") for flag in unit.flags))
    return unit if code in ASSEMBLED else None


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles(source: Path, compiled: Path) -> None:
    """Cubins of ASSEMBLED are ELF files with the architecture in their flags; one or more of a source have kernels."""
    cubins = {code: (compiled / f"{source.stem}.{code}.cubin").read_bytes() for code in ASSEMBLED}
    for code, cubin in cubins.items():
        assert cubin[:4] == b"\x7fELF"
        architecture = int("".join(filter(str.isdigit, code.split(".")[0])))
        flags = int.from_bytes(cubin[48:52], "little")  # e_flags of ELF64
        # In the lowest byte, or in the second one in the format of newer CUDA versions.
        assert architecture in (flags & 0xFF, flags >> 8 & 0xFF)
    assert any(b".text." in cubin for cubin in cubins.values())
    assert all((compiled / f"{source.stem}.{code}.cubin").is_file() for code in TO_PTX)
