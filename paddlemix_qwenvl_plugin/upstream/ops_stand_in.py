"""Stand-ins for missing operators: for the module paddlenlp_ops, and for the function fused_moe (paddlenlp.py).

Modules of paddlenlp.experimental import CUDA operators by name that they do not need to run Qwen-VL. If paddlenlp_ops
is not installed, they get a stand-in, in which every operator exists and raises an error when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from paddlemix_qwenvl_plugin.util.errors import QwenVLError


class MissingOperatorError(QwenVLError, RuntimeError):
    """Call of an operator that is not installed."""


def missing_operator(module: str, name: str, reason: str) -> Callable[..., NoReturn]:
    """Create a function `module`.`name` that raises MissingOperatorError; `reason`: cause and fix."""

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise MissingOperatorError(f"{module}.{name} is missing: {reason}")

    missing.__name__ = missing.__qualname__ = name
    missing.__module__ = module
    return missing


def fill(module: ModuleType) -> None:
    """Fill an empty module: every public name is an operator that raises MissingOperatorError when called."""
    reason = (
        f"{module.__name__} is not installed; "
        "build it in PaddleNLP's csrc folder with: python setup_cuda.py install"
    )

    def __getattr__(name: str) -> Any:
        # Python looks up names such as __path__ and __wrapped__; they are not operators.
        if name.startswith("_"):
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        missing = missing_operator(module.__name__, name, reason)
        setattr(module, name, missing)
        return missing

    module.__doc__ = "Stand-in of paddlemix_qwenvl_plugin: every operator exists and raises when called."
    module.__getattr__ = __getattr__  # type: ignore[method-assign]
