"""Exporting a stage: its programs, its parameter file, its manifest; all of them or none appear."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import paddle

from paddlemix_qwenvl_plugin.artifact.contract import (
    CONTRACT_VERSION,
    Input,
    fused_step_inputs,
    step_inputs,
    stock_inputs,
    vision_inputs,
)
from paddlemix_qwenvl_plugin.artifact.manifest import FileDigest, Manifest, manifest_path
from paddlemix_qwenvl_plugin.artifact.params_file import write_params
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.checkpoint.dtypes import check_dtype
from paddlemix_qwenvl_plugin.engine.quantize import check_quant_type, quantised
from paddlemix_qwenvl_plugin.engine.select import engine_available, engine_choice
from paddlemix_qwenvl_plugin.export.program import FORMATS, Program, save_program
from paddlemix_qwenvl_plugin.modeling.fused import FusedForward, FusedGeneration, FusedVision
from paddlemix_qwenvl_plugin.modeling.generation import Step, StockGeneration
from paddlemix_qwenvl_plugin.modeling.language import LanguageModel
from paddlemix_qwenvl_plugin.modeling.vision import VisionModel
from paddlemix_qwenvl_plugin.modeling.weights import (
    Parameters,
    language_parameters,
    parameter_shapes,
    vision_parameters,
)
from paddlemix_qwenvl_plugin.util.errors import UsageError, make_folder, naming
from paddlemix_qwenvl_plugin.version import __version__

PathLike = Union[str, Path]

# What a user of the exported model needs beside the graphs, copied from the model folder where it is there.
_COMPANIONS = ("config.json", "generation_config.json", "qwen.tiktoken", "tokenizer_config.json")


class _Variant(NamedTuple):
    """A program to export: what comes after the prefix, the model, its inputs, how it is called on them."""

    suffix: str
    model_class: Any
    inputs: Callable[[ModelConfig, str, str], list[Input]]
    run: Callable[[Any, list[Any]], Any]


class _Stage(NamedTuple):
    """What is exported for a stage. Its portable programs are left out where weights are quantised."""

    name: str
    portable: list[_Variant]
    fused: list[_Variant]
    parameters: Callable[[Checkpoint, str], Parameters]


def export_vision(
    model: PathLike, save_path: PathLike, dtype: str = "float32", engine: Optional[str] = None
) -> Manifest:
    """Export stage 1, images -> features, to SAVE_PATH.json, .pdmodel, .pdiparams and .manifest.json.

    Where the engine can be built there are also `.fused.json` and `.fused.pdmodel`, over the same weights. A float16
    or bfloat16 export also has `.cpu.json` and `.cpu.pdmodel`: the same weights, computed in float32.

    Args:
        model: a model folder.
        save_path: prefix of the files; folders are made.
        dtype: float32, float16 or bfloat16.
        engine: "auto", "fused" (the engine or an error) or "portable" (without it); None: QWENVL_ENGINE, else auto.

    Raises:
        UsageError, QwenVLError: see Checkpoint; float16 overflow names the tensor.
    """
    save_path = Path(save_path)
    if not save_path.name:
        raise UsageError(f"--save_path {save_path}: must end in a file name, the prefix of the files")
    checkpoint = Checkpoint(Path(model))
    shapes = parameter_shapes(checkpoint.vision, checkpoint.config)
    fused = partial(FusedVision, shapes=shapes, dtype=dtype, quantised={})
    stage = _Stage(
        "vision",
        [_Variant("", VisionModel, vision_inputs, _on_all)],
        [_Variant("", fused, vision_inputs, _on_all)],
        vision_parameters,
    )
    return _export(checkpoint, save_path, dtype, None, engine_choice(engine), stage)


def export_language(
    model: PathLike,
    output_path: PathLike,
    model_prefix: str = "model",
    dtype: str = "float32",
    engine: Optional[str] = None,
    quant_type: Optional[str] = None,
) -> Manifest:
    """Export stage 2 to OUTPUT_PATH/MODEL_PREFIX.* : the stock graph, and `.step` programs for our predictor.

    The tokenizer and the config are copied to OUTPUT_PATH. Further arguments and errors as for export_vision.

    Args:
        quant_type: weight_only_int8 or weight_only_int4, for the engine only; None: all weights in `dtype`.
    """
    output_path = Path(output_path)
    if not model_prefix or Path(model_prefix).name != model_prefix:
        raise UsageError(f"--model_prefix {model_prefix!r}: must be a plain file name")
    choice = engine_choice(engine)
    if check_quant_type(quant_type) is not None:
        if choice == "portable":
            raise UsageError(f"--quant_type {quant_type}: only the engine computes on quantised weights")
        choice = "fused"
    checkpoint = Checkpoint(Path(model))
    kinds = quantised(checkpoint.language, quant_type)
    shapes = parameter_shapes(checkpoint.language, checkpoint.config)
    storage: dict[str, Any] = {"shapes": shapes, "dtype": dtype, "quantised": kinds}
    stage = _Stage(
        "language",
        [
            _Variant("", LanguageModel, stock_inputs, lambda lm, i: StockGeneration(lm)(*i[:22], i[22:])),
            _Variant(".step", LanguageModel, step_inputs, lambda lm, i: Step(lm)(*i[:7], i[7:])),
        ],
        [
            _Variant("", partial(FusedGeneration, **storage), stock_inputs, _on_all),
            _Variant(".step", partial(FusedForward, **storage), fused_step_inputs, _on_all),
        ],
        partial(language_parameters, quantised=kinds),
    )
    make_folder(output_path)
    for name in _COMPANIONS:  # before the stage, so that whoever sees its manifest has them
        source = checkpoint.folder / name
        if source.is_file() and source.resolve() != (output_path / name).resolve():
            partial_file = output_path / f".partial-{name}"
            with naming(partial_file):
                shutil.copyfile(source, partial_file)
                partial_file.replace(output_path / name)
    return _export(checkpoint, output_path / model_prefix, dtype, quant_type, choice, stage)


def _on_all(model: Any, inputs: list[Any]) -> Any:
    return model(*inputs)


def _export(
    checkpoint: Checkpoint,
    prefix: Path,
    dtype: str,
    quant_type: Optional[str],
    engine: str,
    stage: _Stage,
) -> Manifest:
    check_dtype(dtype)
    # (what comes last, what activations are computed in, programs): a CPU has no half-precision products.
    targets = [("", dtype, stage.portable)] if quant_type is None else []
    if quant_type is None and dtype != "float32":
        targets.append((".cpu", "float32", stage.portable))
    if engine_available(engine):
        targets.append((".fused", dtype, stage.fused))
    make_folder(prefix.parent)
    with naming(prefix), tempfile.TemporaryDirectory(dir=prefix.parent, prefix=".export-") as scratch:
        records = None
        for target, compute_dtype, variants in targets:
            for suffix, model_class, inputs, run in variants:
                program = Program(model_class, checkpoint.config, inputs, run, dtype, compute_dtype)
                for form, extension in FORMATS.items():
                    path = Path(scratch) / f"{prefix.name}{suffix}{target}{extension}"
                    found = save_program(program, form, path)
                    if records is not None and list(found.items()) != list(records.items()):
                        raise AssertionError(f"{path.name} orders its parameters unlike the other programs")
                    records = found
        programs = {path.name: FileDigest.of(path) for path in sorted(Path(scratch).iterdir())}
        params = Path(scratch) / f"{prefix.name}.pdiparams"
        write_params(params, records or {}, stage.parameters(checkpoint, dtype))
        manifest = Manifest(
            contract=CONTRACT_VERSION,
            stage=stage.name,
            plugin=__version__,
            paddle=paddle.__version__,
            dtype=dtype,
            quant_type=quant_type,
            model=checkpoint.fingerprint(),
            config=checkpoint.config,
            weights=FileDigest.of(params),
            programs=programs,
        )
        manifest_file = manifest_path(Path(scratch) / prefix.name)
        manifest_file.write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")
        # The manifest goes first and comes last: a reader never sees it beside files that are not its own.
        manifest_path(prefix).unlink(missing_ok=True)
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path == manifest_file):
            path.replace(prefix.parent / path.name)
    return manifest
