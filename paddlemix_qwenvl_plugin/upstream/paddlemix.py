"""Hooks of PaddleMIX: the stock image-encoder exporter and the stock predictor of deploy/qwen_vl."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from paddlemix_qwenvl_plugin.upstream.patching import patching

_ENCODER_EXPORTER = "export_image_encoder.py"


def hook_auto_modeling(module: ModuleType) -> None:
    """paddlemix.auto.modeling: AutoModelMIX gives the stock exporter of the image encoder ours; others get theirs."""
    auto_model = module.AutoModelMIX
    upstream = vars(auto_model)["from_pretrained"].__func__

    @functools.wraps(upstream)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        if _script_name() == _ENCODER_EXPORTER:
            from paddlemix_qwenvl_plugin.upstream import image_encoder

            if image_encoder.is_qwen_vl(pretrained_model_name_or_path):
                dtype = str(kwargs.get("dtype") or "float32")
                return image_encoder.ModelToExport(pretrained_model_name_or_path, dtype)
        return upstream(cls, pretrained_model_name_or_path, *args, **kwargs)

    with patching(module) as patch:
        patch.set(auto_model, "from_pretrained", classmethod(from_pretrained))


def hook_qwen_vl_processing(module: ModuleType) -> None:
    """paddlemix.processors.qwen_vl_processing: whoever makes a processor may be the stock Predictor; adapt that one."""
    processor = module.QwenVLProcessor
    upstream = vars(processor)["__init__"]

    @functools.wraps(upstream)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        upstream(self, *args, **kwargs)
        # The Predictor is no class of a module that could be hooked: it is in the script, whatever that is called.
        caller = sys._getframe(1)
        maker = caller.f_locals.get("self")
        if hasattr(maker, "create_predictor") and "load_real_time_tokens" in caller.f_globals:
            from paddlemix_qwenvl_plugin.upstream import stock_predictor

            stock_predictor.adapt(maker, self, caller.f_globals)

    with patching(module) as patch:
        patch.set(processor, "__init__", __init__)


def _script_name() -> str:
    return Path(getattr(sys.modules["__main__"], "__file__", None) or "").name
