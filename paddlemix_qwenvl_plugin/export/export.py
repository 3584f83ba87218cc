"""Atomic export of a stage: programs, parameter file, manifest and companion files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import paddle

from paddlemix_qwenvl_plugin.artifact.contract import (
    CONTRACT_VERSION,
    step_inputs,
    stock_inputs,
    vision_inputs,
)
from paddlemix_qwenvl_plugin.artifact.manifest import (
    FileDigest,
    Manifest,
    MergedAdapter,
    digest_of_samples,
    manifest_path,
    params_path,
)
from paddlemix_qwenvl_plugin.artifact.params_file import write_params
from paddlemix_qwenvl_plugin.artifact.weights import stage_weights
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.dtypes import check_dtype
from paddlemix_qwenvl_plugin.checkpoint.lora import Lora, PathLike
from paddlemix_qwenvl_plugin.engine.quantize import check_quant_type, quantized
from paddlemix_qwenvl_plugin.engine.select import engine_available, engine_choice
from paddlemix_qwenvl_plugin.export.program import FORMATS, Program, save_program
from paddlemix_qwenvl_plugin.modeling.engine_stage import EngineGeneration, EngineVision
from paddlemix_qwenvl_plugin.modeling.generation import Step, StockGeneration
from paddlemix_qwenvl_plugin.modeling.language import LanguageModel
from paddlemix_qwenvl_plugin.modeling.vision import VisionModel
from paddlemix_qwenvl_plugin.modeling.weights import (
    Parameters,
    language_parameters,
    vision_parameters,
)
from paddlemix_qwenvl_plugin.util.errors import UsageError, make_folder, naming
from paddlemix_qwenvl_plugin.util.scratch import scratch_folder
from paddlemix_qwenvl_plugin.version import __version__

# Files that the exported model needs besides the graphs, copied from the model folder if it contains them.
COMPANIONS = ("config.json", "generation_config.json", "qwen.tiktoken", "tokenizer_config.json")


class _Stage(NamedTuple):
    """Definition of a stage's export: its programs, portable and for the engine; parameters; names of companion files.

    The portable programs are not exported if weights are quantized.
    """

    name: str
    portable: list[Program]
    engine: list[Program]
    parameters: Callable[[Checkpoint, str], Parameters]
    companions: tuple[str, ...]


def export_vision(
    model: PathLike,
    save_path: PathLike,
    dtype: str = "float32",
    engine: Optional[str] = None,
    lora: Union[PathLike, Sequence[Lora]] = (),
) -> Manifest:
    """Export the vision stage, images -> features, to SAVE_PATH.*: programs, parameter file, manifest.

    The files are SAVE_PATH.json, .pdmodel, .pdiparams and .manifest.json. If the engine is available and `engine`
    allows it, the export also has `.fused.json` and `.fused.pdmodel` with the same weights. A float16 or bfloat16
    export also has `.cpu.json` and `.cpu.pdmodel`: the same weights, computed in float32.

    Args:
        model: model folder.
        save_path: prefix of the files; folders are created.
        dtype: float32, float16 or bfloat16.
        engine: "auto", "fused" (require the engine) or "portable" (do not use it); None: QWENVL_ENGINE, else auto.
        lora: LoRA adapters to merge, each a folder or (folder, weight). Tensors of the other stage are ignored, so that
            both exports may get the same adapters.

    Raises:
        UsageError: an invalid argument; the model folder or an adapter does not exist.
        QwenVLError: the checkpoint or an adapter is malformed, a value does not fit into float16, or the engine is
            required and cannot be built.
    """
    save_path = Path(save_path)
    if not save_path.name:
        raise UsageError(f"--save_path {save_path}: must end in a file name, the prefix of the files")
    checkpoint = Checkpoint(Path(model), lora)
    engine_vision = partial(EngineVision, weights=stage_weights(checkpoint.config, "vision", dtype))
    stage = _Stage(
        "vision",
        [Program("", VisionModel, vision_inputs, _on_all)],
        [Program("", engine_vision, vision_inputs, _on_all)],
        vision_parameters,
        (),
    )
    return _export(checkpoint, save_path, dtype, None, engine_choice(engine), stage)


def export_language(
    model: PathLike,
    output_path: PathLike,
    model_prefix: str = "model",
    dtype: str = "float32",
    engine: Optional[str] = None,
    quant_type: Optional[str] = None,
    lora: Union[PathLike, Sequence[Lora]] = (),
) -> Manifest:
    """Export the language stage to OUTPUT_PATH/MODEL_PREFIX.*: programs, parameter file, manifest.

    The programs are stock programs, and step programs, which QwenVL runs where it does not use the engine. With
    quantized weights, only the engine program is exported. The tokenizer and the config are copied to OUTPUT_PATH.
    Other arguments and errors: see export_vision.

    Args:
        quant_type: weight_only_int8 or weight_only_int4, engine only; None: all weights in `dtype`, except
            that the integers of a quantized checkpoint are exported unchanged.
    """
    output_path = Path(output_path)
    if not model_prefix or Path(model_prefix).name != model_prefix:
        raise UsageError(f"--model_prefix {model_prefix!r}: must be a plain file name")
    choice = engine_choice(engine)
    if check_quant_type(quant_type) is not None:
        if choice == "portable":
            raise UsageError(f"--quant_type {quant_type}: only the engine computes on quantized weights")
        choice = "fused"
    checkpoint = Checkpoint(Path(model), lora)
    if checkpoint.quantized is not None:
        problem = f"{checkpoint.folder}: its weights are quantized ({checkpoint.quantized.quant_type})"
        if quant_type is not None:
            raise UsageError(f"{problem} and exported unchanged; omit --quant_type {quant_type}")
        if choice == "portable":
            raise UsageError(f"{problem}; only the engine computes on them, not --engine portable")
        choice, quant_type = "fused", checkpoint.quantized.quant_type
    kinds = quantized(checkpoint.language, quant_type)
    engine_language = partial(
        EngineGeneration, weights=stage_weights(checkpoint.config, "language", dtype, quant_type)
    )
    stage = _Stage(
        "language",
        [
            # The caches of the layers are the inputs after the 22nd (stock program) and after the 7th (step program).
            Program(
                "", LanguageModel, stock_inputs, lambda model, i: StockGeneration(model)(*i[:22], i[22:])
            ),
            Program(".step", LanguageModel, step_inputs, lambda model, i: Step(model)(*i[:7], i[7:])),
        ],
        [Program("", engine_language, stock_inputs, _on_all)],
        partial(language_parameters, quantized=kinds),
        COMPANIONS,
    )
    return _export(checkpoint, output_path / model_prefix, dtype, quant_type, choice, stage)


def _on_all(model: Any, inputs: list[Any]) -> Any:
    """Call a model with one argument per input."""
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
    # (suffix, compute type, programs); CPU programs compute in float32: Paddle has no half-precision kernels for CPUs.
    targets = [("", dtype, stage.portable)] if quant_type is None else []
    if quant_type is None and dtype != "float32":
        targets.append((".cpu", "float32", stage.portable))
    if engine_available(engine, operators=True):
        targets.append((".fused", dtype, stage.engine))
    weights = stage_weights(checkpoint.config, stage.name, dtype, quant_type)
    # (file name, form, compute type, program)
    program_files = [
        (prefix.name + program.suffix + target + extension, form, compute_dtype, program)
        for target, compute_dtype, programs in targets
        for program in programs
        for form, extension in FORMATS.items()
    ]
    program_names = [name for name, *_ in program_files]
    stage_names = [*program_names, params_path(prefix).name, manifest_path(prefix).name]
    _check_names(checkpoint.folder, prefix, stage_names, stage.companions)
    make_folder(prefix.parent)
    with naming(prefix), scratch_folder(prefix, "export") as scratch:
        records = None
        for name, form, compute_dtype, program in program_files:
            program_records = save_program(
                program, checkpoint.config, dtype, compute_dtype, form, scratch / name
            )
            # Programs share the parameter file, whose order they depend on.
            if records is not None and list(program_records.items()) != list(records.items()):
                raise AssertionError(
                    f"{name}: internal invariant violated: the order of parameters differs between programs"
                )
            records = program_records
        params = scratch / params_path(prefix).name
        write_params(params, records or {}, weights, stage.parameters(checkpoint, dtype))
        manifest = Manifest(
            contract=CONTRACT_VERSION,
            stage=stage.name,
            plugin=__version__,
            paddle=paddle.__version__,
            dtype=dtype,
            quant_type=quant_type,
            lora=[
                MergedAdapter(
                    name=adapter.folder.resolve().name,
                    weight=weight,
                    fingerprint=adapter.fingerprint(adapter.names),
                )
                for adapter, weight in checkpoint.merge.adapters
            ],
            model=checkpoint.fingerprint(),
            config=checkpoint.config,
            weights=FileDigest.of(params),
            weights_samples=digest_of_samples(params),
            programs={name: FileDigest.of(scratch / name) for name in sorted(program_names)},
        )
        manifest_path(scratch / prefix.name).write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")
        companions = [name for name in stage.companions if (checkpoint.folder / name).is_file()]
        if checkpoint.folder.resolve() == prefix.parent.resolve():
            companions = []
        for name in companions:
            shutil.copyfile(checkpoint.folder / name, scratch / name)
        # The manifest is removed first and written last: it never describes files of another export.
        manifest_path(prefix).unlink(missing_ok=True)
        for name in (*companions, *stage_names):
            (scratch / name).replace(prefix.with_name(name))
    return manifest


def _check_names(model: Path, prefix: Path, names: list[str], companions: tuple[str, ...]) -> None:
    """Refuse a prefix whose export would overwrite a model: this model's files, or another model's companion files.

    Raises:
        UsageError: the export would overwrite such a file; files of an earlier export with this prefix may be
            overwritten.
    """
    in_model_folder = model.resolve() == prefix.parent.resolve()
    exported_before = manifest_path(prefix).is_file()
    for name in names:
        if name in COMPANIONS or (in_model_folder and not exported_before and (model / name).exists()):
            raise UsageError(f"{prefix}: an export would overwrite the model's {name}; name another prefix")
    if any(prefix.parent.glob(manifest_path(Path("*")).name)):  # an earlier export wrote the companion files
        return
    for name in companions:
        existing, new = prefix.with_name(name), model / name
        if existing.is_file() and new.is_file() and existing.read_bytes() != new.read_bytes():
            raise UsageError(f"{existing}: exists, and no export wrote it; name another folder")
