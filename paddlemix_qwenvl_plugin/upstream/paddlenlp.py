"""Hooks of PaddleNLP: its `--model_type qwen-img2txt` gives the plugin's model, in both generations.

Generation 1 (commit 498f709, wheel 3.0.0b0) imports QWenForQWenVLInferenceModel by name; generation 2 (wheel
3.0.0b4) reads it from the same module in AutoInferenceModelForCausalLM. One replacement serves both.
"""

from __future__ import annotations

from types import ModuleType

from paddlemix_qwenvl_plugin.upstream.patching import patching


def hook_qwen(module: ModuleType) -> None:
    """paddlenlp.experimental.transformers.qwen.modeling: replace the class, under its upstream name."""
    from paddlemix_qwenvl_plugin.upstream.inference_model import QWenForQWenVLInferenceModel

    with patching(module) as patch:
        patch.set(module, "QWenForQWenVLInferenceModel", QWenForQWenVLInferenceModel)
