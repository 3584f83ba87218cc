"""Print the origin of every name in the imported modules of PaddleNLP and Paddle, as JSON, with or without the plugin.

Run by test_paddlenlp_wheels.py, which compares both outputs. QWENVL_PLUGIN, the switch of the plugin, is "1" or "0".
Without the plugin, the inference models of 3.0.0b4 cannot be imported: this script then provides the operators that
they import. Keys of the output:
    failed: error of the first import of the models, or "".
    operators: errors of the calls of two operators that may be missing, with the plugin only.
    origins: name -> origin.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import paddlenlp  # noqa: F401
from paddle.incubate.nn import functional

MODELS = "paddlenlp.experimental.transformers"


class Operators(types.ModuleType):
    """Module that has every public name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return print


def error_of(call: Any) -> str:
    """Call a function and return its error, or "" if it succeeds."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def origin(value: Any) -> str:
    """Describe the origin of a function or class, which a replacement would change, or the type of another value."""
    if isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    if inspect.isclass(value):
        return repr(value)
    if inspect.isfunction(value):
        code = value.__code__
        return f"{value.__module__}.{value.__qualname__} {code.co_filename}:{code.co_firstlineno}"
    return type(value).__name__


operators = []
failed = error_of(lambda: importlib.import_module(MODELS))
if os.environ["QWENVL_PLUGIN"] == "1":
    # Import an operator as the models do inside their functions.
    namespace: dict[str, Any] = {"__name__": f"{MODELS}.generation_utils"}
    exec("from paddlenlp_ops import rebuild_padding_v2", namespace)
    operators = [error_of(namespace["rebuild_padding_v2"]), error_of(lambda: functional.fused_moe())]
elif failed:
    for name in [name for name in sys.modules if name.startswith(MODELS)]:
        del sys.modules[name]
    module = Operators("paddlenlp_ops")
    module.__spec__ = ModuleSpec("paddlenlp_ops", None)
    sys.modules["paddlenlp_ops"] = module
    if not hasattr(functional, "fused_moe"):
        functional.fused_moe = print
    importlib.import_module(MODELS)

origins = {}
for module_name, module in sorted(sys.modules.items()):
    if module_name.split(".")[0] in ("paddle", "paddlenlp"):
        for name, value in sorted(vars(module).items()):
            origins[f"{module_name}.{name}"] = origin(value)
            if inspect.isclass(value) and getattr(value, "__module__", "") == module_name:
                for member_name, member in vars(value).items():
                    origins[f"{module_name}.{name}.{member_name}"] = origin(member)
print(json.dumps({"failed": failed, "operators": operators, "origins": origins}))
