"""Half-precision exports on a CPU: their `.cpu` and `.fused` programs, PIR and legacy, against the goldens."""

from __future__ import annotations

import numpy as np
import pytest

from paddlemix_qwenvl_plugin import QwenVL, export_language, export_vision


@pytest.mark.parametrize(("name", "dtype", "bound"), [("a", "float16", 1e-3), ("b", "bfloat16", 0.05)])
def test_golden(golden, engine, tmp_path, name, dtype, bound):
    """The golden weights are float16 numbers: a float16 export rounds only the two resized position tables.

    The engine rounds activations to bfloat16 as well, which these random weights magnify (tests/csrc).
    """
    if engine == "fused":
        bound = 0.12
    model = golden(name)
    export_vision(model.folder, tmp_path / "vision", dtype)
    export_language(model.folder, tmp_path, "qwen", dtype)
    expected = model.figures["features_every_16th_query"]
    answers = []
    for extension in (".json", ".pdmodel"):
        vl = QwenVL.from_exported(tmp_path / f"vision{extension}", tmp_path / f"qwen{extension}")
        features = vl.encode_images(model.images)
        assert np.abs(features[:, ::16] - expected).max() <= bound * np.abs(expected).max()
        answers += vl.generate_ids(model.input_ids, features, max_new_tokens=24, eos_token_ids=())
    assert answers[0] == answers[1]
    if dtype == "float16" and engine == "portable":
        assert answers[0] == model.figures["tokens"].tolist()
