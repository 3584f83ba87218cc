"""Hooks of PaddleNLP: `--model_type qwen-img2txt` selects the plugin's model, in both generations (pins.yaml).

The predictor script of generation 1 (commit 498f709, wheel 3.0.0b0) imports QWenForQWenVLInferenceModel by name. In
generation 2 (wheel 3.0.0b4), AutoInferenceModelForCausalLM looks the class up in the same module. One replacement
suffices for both.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

from paddlemix_qwenvl_plugin.upstream.patching import patching


def hook_qwen(module: ModuleType) -> None:
    """Hook of paddlenlp.experimental.transformers.qwen.modeling: replace QWenForQWenVLInferenceModel by ours."""
    from paddlemix_qwenvl_plugin.upstream.inference_model import QWenForQWenVLInferenceModel

    with patching(module) as patch:
        patch.set(module, "QWenForQWenVLInferenceModel", QWenForQWenVLInferenceModel)


def before_fused_layers(module: ModuleType) -> None:
    """Hook before paddlenlp.experimental.transformers.fused_transformer_layers: make its imports succeed.

    PaddleNLP 3.0.0b4 imports fused_moe, which only Paddle 3.0 has. Qwen-VL does not use it.
    """
    from paddle import __version__
    from paddle.incubate.nn import functional

    from paddlemix_qwenvl_plugin.upstream.ops_stand_in import missing_operator

    source = module.__loader__.get_source(module.__name__)  # type: ignore[union-attr]  # a file loader
    if hasattr(functional, "fused_moe") or "fused_moe" not in (source or ""):
        return
    reason = f"Paddle {__version__} has removed it; a model that calls it needs Paddle 3.0"
    with patching(module) as patch:
        patch.set(functional, "fused_moe", missing_operator(functional.__name__, "fused_moe", reason))


def hook_qwen_tokenizer(module: ModuleType) -> None:
    """Hook of paddlenlp.transformers.qwen.tokenizer: set the padding and stop token for a Qwen-VL folder.

    Upstream's predictor pads even a single prompt, and Qwen-VL's tokenizer_config.json names no such tokens.
    """
    tokenizer = module.QWenTokenizer
    upstream = vars(tokenizer)["__init__"]

    @functools.wraps(upstream)
    def __init__(self: Any, vocab_file: str, *args: Any, **kwargs: Any) -> None:
        upstream(self, vocab_file, *args, **kwargs)
        missing = [name for name in ("pad_token_id", "eos_token_id") if getattr(self, name) is None]
        if missing:
            from paddlemix_qwenvl_plugin.upstream.model_folder import is_qwen_vl

            if is_qwen_vl(str(Path(vocab_file).parent)):
                for name in missing:
                    setattr(self, name, self.eod_id)

    with patching(module) as patch:
        patch.set(tokenizer, "__init__", __init__)
