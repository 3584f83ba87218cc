"""Run the stock predictor script in a process where most dependencies of PaddleNLP and PaddleMIX are missing.

drive_stock_bare.py TREE IMAGE ARGUMENT…

TREE is a checkout of PaddleMIX at the pinned commit, IMAGE a file in place of the image that the script would download,
and the ARGUMENTs are for the script. The script, PaddleMIX's processor and tokenizer, and PaddleNLP are unmodified.
Stand-in modules that provide any name replace missing packages. PaddleMIX's packages are registered without running
their __init__, which would import every model. Run by hand (tests/cuda/README.md); no test runs it.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

# Packages that PaddleNLP 3.0.0b0 and the modules of PaddleMIX below import, but that the stock predictor does not use.
UNUSED = (
    *("aistudio_sdk", "colorlog", "cv2", "datasets", "dill", "emoji", "fastapi", "jieba", "multiprocess"),
    *("omegaconf", "onnx", "paddle2onnx", "ppdiffusers", "rouge", "seqeval", "uvicorn", "visualdl"),
)
# Suffixes of the packages of paddlemix that are registered without running their __init__.
REGISTERED = ("", ".processors", ".models", ".models.qwen_vl", ".utils")


class Anything:
    """Object that can be called with anything and has any attribute, which is all that the imports need."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Anything:
        return Anything()

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class StandIn(ModuleType):
    """Module in which every name is a class, except names that begin with `__`."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception if name.endswith("Error") else Anything,), {})


class StandIns(MetaPathFinder, Loader):
    """Finder that creates the modules of missing packages."""

    def __init__(self, packages: set[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        is_missing = name.partition(".")[0] in self._packages
        return ModuleSpec(name, self, is_package=True) if is_missing else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def register(name: str, folder: Path) -> None:
    """Register a package so that its modules can be imported, without running its __init__."""
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def main(tree: Path, image: Path, arguments: list[str]) -> None:
    sys.meta_path.append(StandIns({name for name in UNUSED if importlib.util.find_spec(name) is None}))
    for name, replacement in {"float_": np.float64, "bool8": np.bool_}.items():  # removed in NumPy 2
        if not hasattr(np, name):
            setattr(np, name, replacement)
    import paddlenlp  # noqa: F401
    import requests

    requests.get = lambda url, **_: SimpleNamespace(raw=BytesIO(image.read_bytes()))
    for suffix in REGISTERED:
        register(f"paddlemix{suffix}", tree / "paddlemix" / suffix.replace(".", "/").strip("/"))
    paddlemix: Any = sys.modules["paddlemix"]
    processing = importlib.import_module("paddlemix.processors.qwen_vl_processing")
    paddlemix.QwenVLProcessor = processing.QwenVLProcessor
    paddlemix.QWenVLTokenizer = importlib.import_module("paddlemix.models.qwen_vl.tokenizer").QWenVLTokenizer
    script = tree / "deploy" / "qwen_vl" / "run_static_predict.py"
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
