"""Configuration of Paddle Inference on a CPU, without oneDNN, which fails on the programs; with a stand-in class."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from paddlemix_qwenvl_plugin.runtime import programs


@pytest.mark.parametrize(
    "names", [["disable_mkldnn"], ["disable_onednn"], ["disable_onednn", "disable_mkldnn"]]
)
def test_onednn_is_disabled_in_each_version_of_paddle(
    monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    """`disable_onednn` is the newer name. Paddle 3.3 has both; a version with one of them works as well."""
    inference = pytest.importorskip("paddle.inference")
    called: list[str] = []
    known = ["disable_glog_info", "disable_gpu", *names]
    config = SimpleNamespace(
        set_cpu_math_library_num_threads=lambda n: None,
        **{name: lambda name=name: called.append(name) for name in known},
    )
    monkeypatch.setattr(inference, "Config", lambda program, params: config)
    monkeypatch.setattr(inference, "create_predictor", lambda config: "predictor")
    assert programs._create_predictor(Path("a.json"), Path("a.pdiparams"), None) == "predictor"
    assert called == known[:3]
