"""A stand-in for operators that are not there: paddlenlp_ops where it is not installed, and single functions.

PaddleNLP imports CUDA operators by name from modules that need none of them to run this model. The stand-in has
every operator, and each says so when it is called. A real paddlenlp_ops is always taken instead.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from paddlemix_qwenvl_plugin.util.errors import QwenVLError


class MissingOperatorError(QwenVLError, RuntimeError):
    """An operator was called that this environment does not have."""


def missing_operator(module: str, name: str, reason: str) -> Callable[..., NoReturn]:
    """A function `module`.`name` that raises MissingOperatorError when called; `reason` says what to do."""

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise MissingOperatorError(f"{module}.{name} is not there: {reason}")

    missing.__name__ = missing.__qualname__ = name
    missing.__module__ = module
    return missing


def fill(module: ModuleType) -> None:
    """Give an empty module every public name, as an operator that raises MissingOperatorError when called."""
    reason = (
        f"{module.__name__} is not installed; "
        "build it in PaddleNLP's csrc folder with: python setup_cuda.py install"
    )

    def __getattr__(name: str) -> Any:
        # Names such as __path__ and __wrapped__ are questions of Python's own, not operators.
        if name.startswith("_"):
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        missing = missing_operator(module.__name__, name, reason)
        setattr(module, name, missing)
        return missing

    module.__doc__ = "Stand-in of paddlemix_qwenvl_plugin: every operator is there, and raises when called."
    module.__getattr__ = __getattr__  # type: ignore[method-assign]
