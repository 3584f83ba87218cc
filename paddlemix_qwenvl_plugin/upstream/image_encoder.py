"""What PaddleMIX's stock exporter of the image encoder gets for its model: a folder, exported when it is saved."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paddle
from paddle import nn

from paddlemix_qwenvl_plugin.export.export import export_vision
from paddlemix_qwenvl_plugin.upstream.model_folder import model_config, model_folder
from paddlemix_qwenvl_plugin.upstream.patching import replace
from paddlemix_qwenvl_plugin.util.notice import notice

_CLASS = "QWenLMHeadModel"  # both language-only Qwen and Qwen-VL; the latter has a section `visual`


def is_qwen_vl(model: str) -> bool:
    """Whether the config.json of a model folder, or of a community name, is that of a Qwen-VL model."""
    path = model_config(model)
    if path is None:
        return False
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError:  # upstream reads it next, and says what is wrong
        return False
    if not isinstance(config, dict) or "visual" not in config:
        return False
    return _CLASS in (config.get("architectures") or [_CLASS])


class ModelToExport:
    """Has what the stock exporter asks of the model: `eval()` and `visual`."""

    def __init__(self, model: str, dtype: str) -> None:
        self.visual = EncoderToExport(model_folder(model), dtype)

    def eval(self) -> ModelToExport:
        """Nothing here trains."""
        return self


class EncoderToExport(nn.Layer):
    """The image encoder as a layer without weights: `paddle.jit.save` exports it from the model folder."""

    def __init__(self, folder: Path, dtype: str) -> None:
        super().__init__()
        self._folder = folder
        self._export_dtype = dtype
        replace(paddle.jit, "save", _exporting)

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        raise NotImplementedError(
            "this encoder is only exported; to run it, load the model in another script"
        )

    def export(self, path: str) -> None:
        """Export to PATH.* as `qwenvl export-vision` does; float32 where there is no GPU for half types."""
        dtype = self._export_dtype
        if dtype != "float32" and not (paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
            notice(
                f"no GPU here: the image encoder is exported as float32 in place of {dtype} "
                f"(for a GPU elsewhere: qwenvl export-vision --dtype {dtype})"
            )
            dtype = "float32"
        export_vision(self._folder, path, dtype)


def _exporting(save: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(save)
    def save_or_export(layer: Any, path: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(layer, EncoderToExport):
            layer.export(path)
        else:
            save(layer, path, *args, **kwargs)

    return save_or_export
