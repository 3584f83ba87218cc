"""Deferred PaddleMIX model whose image encoder is exported from the model folder, without loading the model.

`eval` and `paddle.jit.to_static` are recorded, and `paddle.jit.save` exports the encoder; any other use creates
upstream's model (deferred.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import paddle

from paddlemix_qwenvl_plugin.export.export import export_vision
from paddlemix_qwenvl_plugin.upstream.deferred import Deferred, materialize, state
from paddlemix_qwenvl_plugin.upstream.model_folder import model_folder
from paddlemix_qwenvl_plugin.upstream.patching import replace
from paddlemix_qwenvl_plugin.util.machine import paddle_gpus
from paddlemix_qwenvl_plugin.util.notice import notice


class DeferredModel(Deferred):
    """Deferred upstream model; its image encoder `visual` can be exported without loading the model."""

    kept = ("eval", "visual")  # do not load the model

    def __init__(self, load: Callable[[], Any], name_or_path: str, dtype: str) -> None:
        super().__init__(load)
        encoder = DeferredEncoder(lambda: materialize(self).visual)
        state(encoder).update(model=name_or_path, dtype=dtype)
        state(self).update(visual=encoder)
        replace(paddle.jit, "to_static", _wrap_to_static)
        replace(paddle.jit, "save", _wrap_save)

    def eval(self) -> None:
        """Record the call for the real model."""
        state(self)["steps"].append(lambda model: model.eval())


class DeferredEncoder(Deferred):
    """Deferred image encoder, which `paddle.jit.save` exports from the model folder."""


def _wrap_to_static(to_static: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to_static)
    def to_static_or_keep(function: Any = None, *args: Any, **kwargs: Any) -> Any:
        if type(function) is not DeferredEncoder:  # isinstance() would load the model (deferred.py)
            return to_static(function, *args, **kwargs)
        state(function)["steps"].append(lambda encoder: to_static(encoder, *args, **kwargs))
        return function

    return to_static_or_keep


def _wrap_save(save: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(save)
    def save_or_export(layer: Any, path: str, *args: Any, **kwargs: Any) -> None:
        if type(layer) is DeferredEncoder:
            _export(state(layer)["model"], state(layer)["dtype"], path)
        else:
            save(layer, path, *args, **kwargs)

    return save_or_export


def _export(model: str, dtype: str, path: str) -> None:
    """Export to PATH.* like `qwenvl export-vision`; as float32 if there is no GPU to run half-precision programs."""
    if dtype != "float32" and not paddle_gpus():
        notice(
            f"no GPU found: the image encoder is exported as float32 in place of {dtype} "
            f"(for a GPU elsewhere: qwenvl export-vision --dtype {dtype})"
        )
        dtype = "float32"
    export_vision(model_folder(model), path, dtype)
