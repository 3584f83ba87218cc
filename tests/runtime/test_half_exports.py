"""Half-precision exports on a CPU, compared with goldens: on the engine, and by their `.cpu` programs in float32."""

from __future__ import annotations

import numpy as np
import pytest

from paddlemix_qwenvl_plugin import QwenVL, export_language, export_vision


@pytest.mark.parametrize(("name", "dtype", "bound"), [("a", "float16", 1e-3), ("b", "bfloat16", 0.05)])
def test_golden(golden, engine, tmp_path, name, dtype, bound):
    """Features are within `bound` of the golden ones, relative to the largest golden feature.

    The golden weights are float16 numbers, so a float16 export rounds only the two resized position tables.
    """
    if engine == "fused":
        # The engine also rounds activations to bfloat16 if the processor has products of bfloat16; these random weights
        # magnify the rounding errors.
        bound = 0.12
    model = golden(name)
    export_vision(model.folder, tmp_path / "vision", dtype)
    export_language(model.folder, tmp_path, "qwen", dtype)
    expected = model.figures["features_every_16th_query"]
    completions = []
    for extension in (".json", ".pdmodel"):
        vl = QwenVL.from_exported(tmp_path / f"vision{extension}", tmp_path / f"qwen{extension}")
        features = vl.encode_images(model.images)
        assert np.abs(features[:, ::16] - expected).max() <= bound * np.abs(expected).max()
        completions += vl.generate_ids(model.input_ids, features, max_new_tokens=24, eos_token_ids=())
    assert completions[0] == completions[1]
    if dtype == "float16" and engine == "portable":
        assert completions[0] == model.figures["tokens"].tolist()
