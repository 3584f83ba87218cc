"""Export Qwen-VL as static Paddle graphs, and answer questions about images with an exported model.

Importing this package loads neither Paddle nor PaddleNLP: the names below are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paddlemix_qwenvl_plugin.util import threads as _threads  # noqa: F401  (before Paddle sets OMP_NUM_THREADS)
from paddlemix_qwenvl_plugin.version import __version__

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.export.export import export_language, export_vision
    from paddlemix_qwenvl_plugin.processing.images import ImageLimits, load_image, preprocess
    from paddlemix_qwenvl_plugin.runtime.answer import Answer
    from paddlemix_qwenvl_plugin.runtime.chat import Chat
    from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL
    from paddlemix_qwenvl_plugin.runtime.request import Request
    from paddlemix_qwenvl_plugin.runtime.segments import Segment
    from paddlemix_qwenvl_plugin.runtime.stream import AnswerStream
    from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

_MODULES = {
    "Answer": "runtime.answer",
    "AnswerStream": "runtime.stream",
    "Chat": "runtime.chat",
    "GenerationOptions": "runtime.options",
    "ImageLimits": "processing.images",
    "Segment": "runtime.segments",
    "QwenVL": "runtime.predictor",
    "QwenVLError": "util.errors",
    "Request": "runtime.request",
    "UsageError": "util.errors",
    "export_language": "export.export",
    "export_vision": "export.export",
    "load_image": "processing.images",
    "preprocess": "processing.images",
}

__all__ = [
    "Answer",
    "AnswerStream",
    "Chat",
    "GenerationOptions",
    "ImageLimits",
    "QwenVL",
    "QwenVLError",
    "Request",
    "Segment",
    "UsageError",
    "__version__",
    "export_language",
    "export_vision",
    "load_image",
    "preprocess",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
