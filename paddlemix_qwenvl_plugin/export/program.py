"""Building and saving inference programs, PIR (`.json`) and legacy (`.pdmodel`), without their weights.

A program is built in static mode from the same modules as the dynamic reference. Paddle saves it with placeholder
parameters of one axis each, numbered by their length: the order in which Paddle wrote them is the order of the
real file, which params_file.py then streams. All forms of a program share one parameter file.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
from paddle import static

from paddlemix_qwenvl_plugin.artifact.contract import Input
from paddlemix_qwenvl_plugin.artifact.params_file import Record, read_first_dims
from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.modeling.weights import build

FORMATS = {"pir": ".json", "legacy": ".pdmodel"}

# Paddle refuses to build a float16 or bfloat16 PIR program where it has no kernels for them, as on a CPU.
# No program here has float64, so it stands in for the half type while the program is built.
_STAND_IN = "float64"
_PIR_TYPES = {"float16": "0.t_f16", "bfloat16": "0.t_bf16"}


@dataclass(frozen=True)
class Program:
    """A program to build.

    `inputs` declares its inputs, given the two dtypes; `run` calls the model on them. Parameters are stored in `dtype`,
    activations computed in `compute_dtype`.
    """

    model_class: Any
    config: ModelConfig
    inputs: Callable[[ModelConfig, str, str], list[Input]]
    run: Callable[[Any, list[Any]], Any]
    dtype: str
    compute_dtype: str


def save_program(program: Program, form: str, path: Path) -> dict[str, Record]:
    """Write one program, form "pir" or "legacy", to `path`.

    Returns:
        Every parameter, in the order of the parameter file.
    """
    half = program.compute_dtype
    stand_in = form == "pir" and half != "float32"
    dtypes = (_STAND_IN, _STAND_IN) if stand_in else (program.dtype, program.compute_dtype)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch, _static_mode(form):
        prefix = Path(scratch) / "program"
        records = _build_and_save(program, *dtypes, prefix)
        order = read_first_dims(prefix.with_suffix(".pdiparams"))
        built = prefix.with_suffix(FORMATS[form])
        if form == "pir":
            text = built.read_text("utf-8")
            if stand_in:
                text = text.replace('"0.t_f64"', f'"{_PIR_TYPES[half]}"').replace('"float64"', f'"{half}"')
            elif '"0.t_f64"' in text:
                raise AssertionError("the program has float64, which must stay free for the half types")
            built.write_text(text, "utf-8")
        built.replace(path)
    names = list(records)
    return {names[number - 1]: records[names[number - 1]] for number in order}


def _build_and_save(program: Program, dtype: str, compute_dtype: str, prefix: Path) -> dict[str, Record]:
    main, startup = static.Program(), static.Program()
    with static.program_guard(main, startup), _quiet():
        model = build(program.model_class, program.config, dtype, compute_dtype)
        declared = program.inputs(program.config, dtype, compute_dtype)
        inputs = [static.data(i.name, list(i.shape), i.dtype) for i in declared]
        outputs = program.run(model, inputs)
        parameters = list(model.parameters())
        scope = static.Scope()
        with static.scope_guard(scope):
            for number, parameter in enumerate(parameters, start=1):
                placeholder = scope.var(parameter.name).get_tensor()
                placeholder.set(np.zeros([number], "float32"), paddle.CPUPlace())
            static.save_inference_model(
                str(prefix),
                inputs,
                list(outputs) if isinstance(outputs, (tuple, list)) else [outputs],
                static.Executor(paddle.CPUPlace()),
                program=main,
                skip_prune_program=True,
            )
    return {
        parameter.name: Record(tuple(parameter.shape), _stored(parameter, program))
        for parameter in parameters
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about Paddle's own deprecated calls, nothing a user can act on, and no traces of the building.

    For one of these warnings Paddle reads the sources of all callers, at each operator: half of an export's time. In
    legacy programs it keeps each operator's callers, with paths of this machine.
    """
    from paddle.base import framework
    from paddle.base.layers import math_op_patch

    stand_ins = {
        (math_op_patch, "inspect"): SimpleNamespace(stack=lambda: [("", "", 0)] * 2),
        (framework, "traceback"): SimpleNamespace(extract_stack=list),
    }
    # Other versions of Paddle may do without one of them.
    real = {(module, name): getattr(module, name) for module, name in stand_ins if hasattr(module, name)}
    try:
        for module, name in real:
            setattr(module, name, stand_ins[module, name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for (module, name), value in real.items():
            setattr(module, name, value)


def _stored(parameter: Any, program: Program) -> str:
    """The dtype in the parameter file; Paddle has a type of dtypes for each form of program."""
    return "uint8" if str(parameter.dtype).lower().endswith("uint8") else program.dtype


@contextlib.contextmanager
def _static_mode(form: str) -> Iterator[None]:
    """Static mode with PIR or legacy programs; leaves Paddle as it found it."""
    from paddle.pir_utils import DygraphOldIrGuard, DygraphPirGuard

    was_dynamic = paddle.in_dynamic_mode()
    with DygraphOldIrGuard() if form == "legacy" else DygraphPirGuard():
        paddle.enable_static()
        try:
            yield
        finally:
            if was_dynamic:
                paddle.disable_static()
