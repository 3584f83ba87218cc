"""Accuracy loss of the demo model on the engine by storage type: 16 and 8 bits at most a point, 4 bits three."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from engines import DEVICE, needs_compiler

from paddlemix_qwenvl_plugin.cli.main import app

N = 250


def rates(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert not app(["eval", "demo", "--n", str(N), "--json", *flags], standalone_mode=False)
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    return figures


@needs_compiler
def test_rounded_weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("QWENVL_ENGINE", "fused")
    exact = rates(capsys)
    for points, *flags in [
        *([] if DEVICE == "cpu" else [(1, "--dtype", "float16")]),  # computed in it, where a CPU has float32
        (1, "--dtype", "bfloat16"),
        (1, "--quant_type", "weight_only_int8"),
        (3, "--quant_type", "weight_only_int4"),
    ]:
        rounded = rates(capsys, "--device", DEVICE, *flags)
        for name in ("words", "boxes", "reading"):
            lost = exact[name]["hits"] - rounded[name]["hits"]
            assert lost <= math.ceil(points / 100 * exact[name]["n"]), (flags, name)
