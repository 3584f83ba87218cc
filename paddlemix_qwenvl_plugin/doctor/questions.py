"""Questions answered by importing Paddle or an upstream, or by opening a model, each in its own process (probe.py)."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from paddlemix_qwenvl_plugin import upstream
from paddlemix_qwenvl_plugin.doctor.probe import cause_of, one_line
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.files import write_text


def paddle() -> dict[str, Any]:
    """Describe the build of Paddle.

    `architectures`: compute capabilities, times ten, for which it has machine code; empty if unknown.
    """
    module = import_module("paddle")
    gpu_build = bool(module.is_compiled_with_cuda())
    # A list of numbers, or of strings such as "90a"; Paddle 2 does not provide it.
    archs: Any = getattr(module.version, "cuda_archs", list)() if gpu_build else []
    numbers = [re.match(r"\d+", str(arch)) for arch in archs]
    return {
        "version": str(module.__version__),
        "gpu_build": gpu_build,
        "cuda": str(module.version.cuda()) if gpu_build else None,
        "architectures": sorted({int(number.group()) for number in numbers if number}),
    }


def gpu() -> dict[str, Any]:
    """List the GPUs visible to Paddle, and add two numbers on the first, which raises if Paddle cannot use it."""
    module: Any = import_module("paddle")
    cuda = module.device.cuda
    gpus = []
    for i in range(cuda.device_count()):
        major, minor = cuda.get_device_capability(i)
        gpus.append({"name": str(cuda.get_device_name(i)), "architecture": 10 * major + minor})
    if gpus:
        one = module.to_tensor([1.0], place=module.CUDAPlace(0))
        if float(one + one) != 2.0:
            raise RuntimeError("1 + 1 on the GPU is not 2")
    return {"gpus": gpus}


def import_upstream(package: str) -> dict[str, Any]:
    """Import paddlenlp or paddlemix and its hooked modules.

    `hooks`: state of each hook; `not_imported`: hooked module -> the error of its import.
    """
    module = import_module(package)
    failed = {}
    for name in upstream.hook_states():
        if name.startswith(f"{package}."):
            try:
                import_module(name)
            except Exception as error:
                # If this version lacks the module, its hook is not needed.
                absent = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
                if not absent:
                    failed[name] = cause_of(error)
    version = getattr(module, "__version__", None)
    return {
        "version": None if version is None else str(version),
        "hooks": upstream.hook_states(),
        "not_imported": failed,
    }


def ops() -> dict[str, Any]:
    """Import the installed paddlenlp_ops."""
    import_module("paddle")
    import_module("paddlenlp_ops")
    return {}


def entry_points(distribution: str) -> dict[str, Any]:
    """Load all entry points except commands: `group name` -> null or the cause of the failure."""
    causes: dict[str, Any] = {}
    for point in metadata.distribution(distribution).entry_points:
        if point.group != "console_scripts":
            try:
                point.load()
                causes[f"{point.group} {point.name}"] = None
            except Exception as error:
                causes[f"{point.group} {point.name}"] = cause_of(error)
    return causes


def model(folder: str) -> dict[str, Any]:
    """Open a model folder and its vocabulary. `tokenizer`: file name of the vocabulary, null without one."""
    from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
    from paddlemix_qwenvl_plugin.processing.tokenizer import VOCAB_FILE_NAME, QwenTokenizer

    checkpoint = Checkpoint(Path(folder))
    config = checkpoint.config
    has_vocabulary = (checkpoint.folder / VOCAB_FILE_NAME).is_file()
    if has_vocabulary:
        QwenTokenizer.of_model(checkpoint.folder, config)
    specs = {**checkpoint.language, **checkpoint.vision}
    return {
        "scheme": checkpoint.scheme,
        "dtype": checkpoint.dtype,
        "parameters": sum(math.prod(spec.shape) for spec in specs.values()),
        "language_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "vision_layers": config.visual.layers,
        "tokenizer": VOCAB_FILE_NAME if has_vocabulary else None,
    }


def main() -> None:
    """Answer the question of sys.argv, QUESTION FILE [ARGUMENT ...], and write the answer to FILE as JSON."""
    name, file, *arguments = sys.argv[1:]
    answer: dict[str, Any]
    try:
        answer = {"value": globals()[name](*arguments)}
    except QwenVLError as error:
        answer = {"value": {}, "cause": one_line(str(error)), "usage": isinstance(error, UsageError)}
    except BaseException as error:  # SystemExit as well
        answer = {"value": {}, "cause": cause_of(error)}
    write_text(Path(file), json.dumps(answer))
    os._exit(0)  # skip the exit handlers of a half-imported library
