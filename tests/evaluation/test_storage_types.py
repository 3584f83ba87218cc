"""Accuracy of the demo model on the engine by storage type.

Compared with float32 on a CPU, 16-bit types and int8 lose at most one percentage point, int4 three, rounded up to whole
answers or boxes. With QWENVL_TEST_DEVICE=gpu they run on a GPU; float16 is tested only there.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from engines import DEVICE, needs_compiler

from paddlemix_qwenvl_plugin.cli.main import app

N_SAMPLES = 250


def eval_demo(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """Run `qwenvl eval demo` and return the rates."""
    capsys.readouterr()
    assert not app(["eval", "demo", "--n", str(N_SAMPLES), "--json", *flags], standalone_mode=False)
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    return figures


@needs_compiler
def test_rounded_weights_lose_little_accuracy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QWENVL_ENGINE", "fused")
    exact = eval_demo(capsys)
    # (allowed loss in percentage points, flag, value)
    cases = [
        (1, "--dtype", "bfloat16"),
        (1, "--quant_type", "weight_only_int8"),
        (3, "--quant_type", "weight_only_int4"),
    ]
    if DEVICE != "cpu":  # only a GPU computes in float16
        cases.append((1, "--dtype", "float16"))
    for points, *flags in cases:
        rounded = eval_demo(capsys, "--device", DEVICE, *flags)
        for name in ("words", "boxes", "reading"):
            loss = exact[name]["hits"] - rounded[name]["hits"]
            assert loss <= math.ceil(points / 100 * exact[name]["n"]), (flags, name)
