"""Hooks of PaddleMIX: the stock image-encoder exporter and the stock predictor of deploy/qwen_vl.

activation/_qwenvl_activate.py names and calls them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from paddlemix_qwenvl_plugin.upstream.model_folder import is_qwen_vl
from paddlemix_qwenvl_plugin.upstream.patching import patching
from paddlemix_qwenvl_plugin.util.errors import QwenVLError
from paddlemix_qwenvl_plugin.util.notice import notice


def hook_auto_modeling(module: ModuleType) -> None:
    """Hook of paddlemix.auto.modeling: from_pretrained returns a DeferredModel for Qwen-VL, else upstream's model.

    The image encoder of a DeferredModel is exported without loading the model.
    """
    auto_model = module.AutoModelMIX
    upstream = vars(auto_model)["from_pretrained"].__func__

    @functools.wraps(upstream)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        def load() -> Any:
            return upstream(cls, pretrained_model_name_or_path, *args, **kwargs)

        try:
            is_ours = is_qwen_vl(str(pretrained_model_name_or_path))
        except QwenVLError as error:  # upstream may have cached the model elsewhere
            notice(str(error))
            return load()
        if not is_ours:
            return load()
        from paddlemix_qwenvl_plugin.upstream.image_encoder import DeferredModel

        dtype = str(kwargs.get("dtype") or "float32")
        return DeferredModel(load, str(pretrained_model_name_or_path), dtype)

    with patching(module) as patch:
        patch.set(auto_model, "from_pretrained", classmethod(from_pretrained))


def hook_qwen_vl_processing(module: ModuleType) -> None:
    """Hook of paddlemix.processors.qwen_vl_processing: adapt the stock Predictor when it creates its processor."""
    processor = module.QwenVLProcessor
    upstream = vars(processor)["__init__"]

    @functools.wraps(upstream)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        upstream(self, *args, **kwargs)
        for script, predictor in _stock_predictors():
            from paddlemix_qwenvl_plugin.upstream import stock_predictor

            stock_predictor.adapt(predictor, script)

    with patching(module) as patch:
        patch.set(processor, "__init__", __init__)


def _stock_predictors() -> Iterator[tuple[ModuleType, type]]:
    """Find each running predictor script and its Predictor class.

    A script can run under any module name, so no import hook finds it. It is recognized by its reader of token files,
    and the class by its method `create_predictor`.
    """
    for script in list(sys.modules.values()):
        names = getattr(script, "__dict__", {})
        if "load_real_time_tokens" in names:
            for value in list(names.values()):
                if isinstance(value, type) and "create_predictor" in vars(value):
                    yield script, value
