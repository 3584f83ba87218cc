"""Print the contents of PaddleNLP's and Paddle's modules as JSON, with or without the plugin; run as a process.

Without the plugin the inference models of 3.0.0b4 cannot be imported; this script then provides the missing names.
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
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return print


def attempt(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def identity(value: Any) -> str:
    """Origin of a function or class, which a replacement would change; of other values the type."""
    if isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    if inspect.isclass(value):
        return repr(value)
    if inspect.isfunction(value):
        code = value.__code__
        return f"{value.__module__}.{value.__qualname__} {code.co_filename}:{code.co_firstlineno}"
    return type(value).__name__


operators = []
failed = attempt(lambda: importlib.import_module(MODELS))
if os.environ["QWENVL_PLUGIN"] == "1":
    model: dict[str, Any] = {"__name__": f"{MODELS}.generation_utils"}
    exec("from paddlenlp_ops import rebuild_padding_v2", model)  # like the models inside their functions
    operators = [attempt(model["rebuild_padding_v2"]), attempt(lambda: functional.fused_moe())]
elif failed:
    for name in [name for name in sys.modules if name.startswith(MODELS)]:
        del sys.modules[name]
    given = Operators("paddlenlp_ops")
    given.__spec__ = ModuleSpec("paddlenlp_ops", None)
    sys.modules["paddlenlp_ops"] = given
    if not hasattr(functional, "fused_moe"):
        functional.fused_moe = print
    importlib.import_module(MODELS)

held = {}
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] in ("paddle", "paddlenlp"):
        for key, value in sorted(vars(module).items()):
            held[f"{name}.{key}"] = identity(value)
            if inspect.isclass(value) and getattr(value, "__module__", "") == name:
                held.update({f"{name}.{key}.{own}": identity(its) for own, its in vars(value).items()})
print(json.dumps({"failed": failed, "operators": operators, "held": held}))
