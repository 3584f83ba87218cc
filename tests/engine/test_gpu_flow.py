"""`device="gpu"` end to end on machines without GPUs: a stub of the GPU back end computes on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import needs_compiler

from paddlemix_qwenvl_plugin.engine import build, sources
from paddlemix_qwenvl_plugin.export.export import export_language

pytestmark = needs_compiler

# The beginning of each program that a test runs. In place of a built library, the stub is loaded; it reports two GPUs.
PRELUDE = """
import os, sys
from pathlib import Path
import numpy as np
from paddlemix_qwenvl_plugin.engine import gpu
gpu.build_for = lambda index: (Path(os.environ["FAKE_LIBRARY"]), Path("/kernels"))
vision, language = sys.argv[1:3]
"""


@pytest.fixture(scope="module")
def library() -> Path:
    """Stub of the library for GPUs; cached like the engine, since its build takes as long."""
    csrc = sources.source_folder()
    stub = Path(__file__).with_name("cpu_as_gpu.cc")
    # Units of libqwenvl.so that the stub does not need.
    omitted = ("core_capi.o", "core_generate.o", "core_cuda_back_end.o")
    units = [
        unit for unit in sources.library_units(csrc, sources.isas_here(csrc)) if unit.name not in omitted
    ]
    target = build.cuda_target()
    target = target._replace(
        units=[*units, sources.Unit("stub.o", stub, units[-1].flags)],
        folders=("include", "core", "cpu"),
        identity=(*target.identity, stub.read_text()),
    )
    return build.built(target, allowed=True) / build.CUDA_LIBRARY


@pytest.fixture(scope="module")
def stages(tiny_exported: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Prefixes of exported stages; only a bfloat16 language stage has a KV cache of the same type on CPU and stub."""
    folder = tmp_path_factory.mktemp("text")
    export_language(tiny_exported / "model", folder, "qwen", "bfloat16")
    return tiny_exported / "vision" / "vision", folder / "qwen"


def run(
    code: str, library: Path, stages: tuple[Path, Path], **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, stages)],
        env={**os.environ, "FAKE_LIBRARY": str(library), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


PREDICT = """
sys.modules["paddle"] = None
from paddlemix_qwenvl_plugin import QwenVL
pixels = np.random.default_rng(1).standard_normal([1, 3, 448, 448]).astype(np.float32)
for device in ("cpu", "gpu:1"):
    vl = QwenVL.from_exported(vision, language, device=device)
    features = vl.encode_images(pixels)
    rows = [np.arange(n) % 300 for n in (3, 700, 2500)]
    answers = [vl.generate_ids(row[None], max_new_tokens=6, eos_token_ids=()) for row in rows]
    print(hash(features.tobytes()), answers)
"""


def test_predictor_without_paddle(library: Path, stages: tuple[Path, Path]) -> None:
    result = run(PREDICT, library, stages)
    assert result.returncode == 0, result.stderr[-2000:]
    # The stub prints a line for the engine of each stage.
    on_cpu, *created, on_gpu = result.stdout.splitlines()
    assert created == ["made on GPU 1 from /kernels"] * 2
    assert on_cpu == on_gpu


OPERATORS = """
from paddlemix_qwenvl_plugin.runtime.programs import Stage
pixels = np.random.default_rng(1).standard_normal([1, 3, 448, 448]).astype(np.float32)
for device in ("cpu", "gpu"):
    [features] = Stage(vision, "vision", device).open()([pixels])
    print(hash(features.numpy().tobytes()))
"""


def test_operators_with_paddle_for_cpus(library: Path, stages: tuple[Path, Path]) -> None:
    result = run(OPERATORS, library, stages)
    assert result.returncode == 0, result.stderr[-2000:]
    on_cpu, created, on_gpu = result.stdout.splitlines()[-3:]
    assert created == "made on GPU 0 from /kernels"
    assert on_cpu == on_gpu


OTHER_PROGRAM = """
import paddle
from paddlemix_qwenvl_plugin.engine import operators
from paddlemix_qwenvl_plugin.runtime import programs
operators.load()
prefix = Path(vision)
opened = programs._create_predictor(prefix.with_suffix(".fused.json"), prefix.with_suffix(".pdiparams"), None)
opened.run([paddle.zeros([1, 3, 448, 448])])
"""


def test_qwenvl_device_is_sufficient(library: Path, stages: tuple[Path, Path]) -> None:
    """If only QWENVL_DEVICE selects a GPU, `operators.load` loads the library for GPUs and finds its kernels."""
    result = run(OTHER_PROGRAM, library, stages, QWENVL_DEVICE="gpu:1")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "made on GPU 1 from /kernels"


MEMORY = """
from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.util.errors import QwenVLError
vl = QwenVL.from_exported(vision, language, device="gpu", gpu_memory=0.5)
try:
    vl.load()
    print(vl._loop._scheduler.limits.n_blocks)
except QwenVLError as error:
    print(error)
"""


@pytest.mark.parametrize("free_bytes", [10, 200_000_000])
def test_memory_of_the_kv_cache(library: Path, stages: tuple[Path, Path], free_bytes: int) -> None:
    """With gpu_memory=0.5 the KV cache gets half of the free memory; without enough memory, no engine is created."""
    result = run(MEMORY, library, stages, FAKE_FREE_BYTES=str(free_bytes))
    assert result.returncode == 0, result.stderr[-2000:]
    *created, last = result.stdout.splitlines()
    if free_bytes == 10:
        assert not created
        assert last.startswith(f"{stages[1]}.pdiparams: needs 0.")
        assert last.endswith("and 0.0 GiB are free; free some, or use a larger GPU or --device cpu")
        return
    # Bytes of a block of the tiny model: 2 layers, keys and values, 256 numbers of 2 bytes, 32 tokens.
    assert int(last) == free_bytes // 2 // (2 * 2 * 256 * 2 * 32)
