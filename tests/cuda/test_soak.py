"""2,000 mixed requests through the loop on a GPU: the same answers as without a batch, and constant memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if not os.environ.get("QWENVL_TEST_DEVICE", "").startswith("gpu"):
    pytest.skip("needs a GPU and Paddle: set QWENVL_TEST_DEVICE=gpu (README.md)", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1]))

from engines import DEVICE
from soak import soak

from paddlemix_qwenvl_plugin import QwenVL, export_language, export_vision
from paddlemix_qwenvl_plugin.demo.run import MODEL


@pytest.mark.parametrize("quant_type", [None, "weight_only_int8"])
def test_memory_stays_flat(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quant_type: str | None,
) -> None:
    export_vision(MODEL, tmp_path / "vision", "bfloat16")
    export_language(MODEL, tmp_path, "qwen", "bfloat16", quant_type=quant_type)
    vl = QwenVL.from_exported(tmp_path / "vision", tmp_path / "qwen", device=DEVICE)
    vl.load()
    report = soak(vl, monkeypatch, 2000)
    with capsys.disabled():
        print(report)
    assert report.preempted > 20
    assert report.cancelled > 20
    assert report.cached_tokens > 5000
    assert report.grown_bytes < 16 * 2**20
    # Room for the CUDA graphs of step sizes that first occur late in the run.
    assert report.gpu_grown_bytes < 8 * 2**20
