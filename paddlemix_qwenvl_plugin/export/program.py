"""Build and save inference programs, PIR (`.json`) and legacy (`.pdmodel`), without weights.

Programs are built in static mode, portable ones from the modules that also run in dynamic mode. Paddle saves a program
with one-dimensional placeholder parameters; parameter N has length N. The order in which Paddle writes the placeholders
is the order of the real parameter file, which params_file.py writes. All programs of a stage share one parameter file.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import paddle
from paddle import static

from paddlemix_qwenvl_plugin.artifact.contract import Input
from paddlemix_qwenvl_plugin.artifact.params_file import Record, read_first_dims
from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.modeling.weights import build

FORMATS = {"pir": ".json", "legacy": ".pdmodel"}

# Paddle builds a PIR program that computes in float16 or bfloat16 only on a device with kernels for the type; CPUs have
# none. Therefore float64, which no program here uses, replaces the half type while such a program is built.
_STAND_IN = "float64"
# Half type -> its name in the JSON of a PIR program.
_PIR_TYPES = {"float16": "0.t_f16", "bfloat16": "0.t_bf16"}


class Program(NamedTuple):
    """Definition of a program: file suffix, model class, inputs, and a function that calls the model on them.

    `inputs` takes (config, dtype of parameters, dtype of activations).
    """

    suffix: str
    model_class: Any
    inputs: Callable[[ModelConfig, str, str], list[Input]]
    run: Callable[[Any, list[Any]], Any]


def save_program(
    program: Program, config: ModelConfig, dtype: str, compute_dtype: str, form: str, path: Path
) -> dict[str, Record]:
    """Write one program, form "pir" or "legacy", to `path`.

    Returns:
        Name -> record of all parameters, in the order of the parameter file.
    """
    # A half compute type is that of the parameters as well: the stand-in replaces both.
    stand_in = form == "pir" and compute_dtype != "float32"
    dtypes = (_STAND_IN, _STAND_IN) if stand_in else (dtype, compute_dtype)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch, _static_mode(form):
        prefix = Path(scratch) / "program"
        parameters = _build_and_save(program, config, *dtypes, prefix)
        order = read_first_dims(prefix.with_suffix(".pdiparams"))
        built = prefix.with_suffix(FORMATS[form])
        if form == "pir":
            text = built.read_text("utf-8")
            if stand_in:
                text = text.replace('"0.t_f64"', f'"{_PIR_TYPES[compute_dtype]}"')
                text = text.replace('"float64"', f'"{compute_dtype}"')
            elif '"0.t_f64"' in text:
                raise AssertionError(
                    "internal invariant violated: the program uses float64, which is reserved for the half types"
                )
            built.write_text(text, "utf-8")
        built.replace(path)
    in_file_order = [parameters[number - 1] for number in order]
    # Engine programs have uint8 parameters: the bytes of quantized weights and of orders (modeling/engine_stage.py).
    return {name: Record(shape, "uint8" if is_uint8 else dtype) for name, shape, is_uint8 in in_file_order}


def _build_and_save(
    program: Program, config: ModelConfig, dtype: str, compute_dtype: str, prefix: Path
) -> list[tuple[str, tuple[int, ...], bool]]:
    """Build and save a program; return (name, shape, whether it is uint8) of each parameter.

    In the saved parameter file, parameter N, counted from 1, has a placeholder of length N.
    """
    main, startup = static.Program(), static.Program()
    with static.program_guard(main, startup), _quiet():
        model = build(program.model_class, config, dtype, compute_dtype)
        inputs = [
            static.data(declared.name, list(declared.shape), declared.dtype)
            for declared in program.inputs(config, dtype, compute_dtype)
        ]
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
                skip_prune_program=True,  # pruning rejects inputs on which no output depends
            )
    # Plain values, since the parameters exist only as long as the program. Their dtypes are compared as text: the class
    # of a dtype depends on the form.
    return [
        (parameter.name, tuple(parameter.shape), str(parameter.dtype).lower().endswith("uint8"))
        for parameter in parameters
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Paddle's warnings about its own deprecated calls, and the call stacks that Paddle records.

    For one of the warnings, Paddle reads the sources of all callers at each operator, which takes half of the export
    time. In legacy programs it saves each operator's call stack, with paths of this machine.
    """
    from paddle.base import framework
    from paddle.base.layers import math_op_patch

    # Paddle takes the file name and the line number from the second frame that `inspect.stack` returns.
    stand_ins = {
        (math_op_patch, "inspect"): SimpleNamespace(stack=lambda: [("", "", 0)] * 2),
        (framework, "traceback"): SimpleNamespace(extract_stack=list),
    }
    # Other versions of Paddle may lack one of these attributes.
    originals = {(module, name): getattr(module, name) for module, name in stand_ins if hasattr(module, name)}
    try:
        for module, name in originals:
            setattr(module, name, stand_ins[module, name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for (module, name), value in originals.items():
            setattr(module, name, value)


@contextlib.contextmanager
def _static_mode(form: str) -> Iterator[None]:
    """Enable static mode, with PIR or legacy programs; restore the previous mode on exit."""
    from paddle.pir_utils import DygraphOldIrGuard, DygraphPirGuard

    was_dynamic = paddle.in_dynamic_mode()
    with DygraphOldIrGuard() if form == "legacy" else DygraphPirGuard():
        paddle.enable_static()
        try:
            yield
        finally:
            if was_dynamic:
                paddle.disable_static()
