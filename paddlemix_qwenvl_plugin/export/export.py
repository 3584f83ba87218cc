"""Exporting a stage: its programs, its parameter file, its manifest; all of them or none appear."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.dtypes import check_dtype
from paddlemix_qwenvl_plugin.errors import UsageError, make_folder, naming
from paddlemix_qwenvl_plugin.export.contract import (
    CONTRACT_VERSION,
    step_inputs,
    stock_inputs,
    vision_inputs,
)
from paddlemix_qwenvl_plugin.export.manifest import FileDigest, Manifest, manifest_path
from paddlemix_qwenvl_plugin.export.params_file import write_params
from paddlemix_qwenvl_plugin.export.program import FORMATS, Program, save_program
from paddlemix_qwenvl_plugin.modeling.generation import Step, StockGeneration
from paddlemix_qwenvl_plugin.modeling.language import LanguageModel
from paddlemix_qwenvl_plugin.modeling.vision import VisionModel
from paddlemix_qwenvl_plugin.modeling.weights import Parameters, language_parameters, vision_parameters
from paddlemix_qwenvl_plugin.version import __version__

PathLike = Union[str, Path]

# What a user of the exported model needs beside the graphs, copied from the model folder where it is there.
_COMPANIONS = ("config.json", "generation_config.json", "qwen.tiktoken", "tokenizer_config.json")

# (what comes after the prefix, inputs, how the model is called)
_Variants = list[tuple[str, Callable[..., Any], Callable[[Any, list[Any]], Any]]]


def export_vision(model: PathLike, save_path: PathLike, dtype: str = "float32") -> Manifest:
    """Export stage 1, images -> features, to SAVE_PATH.json, .pdmodel, .pdiparams and .manifest.json.

    A float16 or bfloat16 export also has `.cpu.json` and `.cpu.pdmodel`: the same weights, computed in float32.

    Args:
        model: a model folder.
        save_path: prefix of the files; folders are made.
        dtype: float32, float16 or bfloat16.

    Raises:
        UsageError, QwenVLError: see Checkpoint; float16 overflow names the tensor.
    """
    save_path = Path(save_path)
    if not save_path.name:
        raise UsageError(f"--save_path {save_path}: must end in a file name, the prefix of the files")
    checkpoint = Checkpoint(Path(model))
    variants: _Variants = [("", vision_inputs, lambda vision, inputs: vision(*inputs))]
    return _export(checkpoint, save_path, "vision", dtype, VisionModel, variants, vision_parameters)


def export_language(
    model: PathLike, output_path: PathLike, model_prefix: str = "model", dtype: str = "float32"
) -> Manifest:
    """Export stage 2 to OUTPUT_PATH/MODEL_PREFIX.* : the stock graph, and `.step` programs for our predictor.

    The tokenizer and the config are copied to OUTPUT_PATH. Arguments and errors as for export_vision.
    """
    output_path = Path(output_path)
    if not model_prefix or Path(model_prefix).name != model_prefix:
        raise UsageError(f"--model_prefix {model_prefix!r}: must be a plain file name")
    checkpoint = Checkpoint(Path(model))
    variants: _Variants = [
        ("", stock_inputs, lambda lm, inputs: StockGeneration(lm)(*inputs[:22], inputs[22:])),
        (".step", step_inputs, lambda lm, inputs: Step(lm)(*inputs[:7], inputs[7:])),
    ]
    make_folder(output_path)
    for name in _COMPANIONS:  # before the stage, so that whoever sees its manifest has them
        source = checkpoint.folder / name
        if source.is_file() and source.resolve() != (output_path / name).resolve():
            partial = output_path / f".partial-{name}"
            with naming(partial):
                shutil.copyfile(source, partial)
                partial.replace(output_path / name)
    prefix = output_path / model_prefix
    return _export(checkpoint, prefix, "language", dtype, LanguageModel, variants, language_parameters)


def _export(
    checkpoint: Checkpoint,
    prefix: Path,
    stage: str,
    dtype: str,
    model_class: Any,
    variants: _Variants,
    parameters: Callable[[Checkpoint, str], Parameters],
) -> Manifest:
    check_dtype(dtype)
    # (what comes after the prefix, what activations are computed in): a CPU has no half-precision products.
    targets = [("", dtype)] if dtype == "float32" else [("", dtype), (".cpu", "float32")]
    make_folder(prefix.parent)
    with naming(prefix), tempfile.TemporaryDirectory(dir=prefix.parent, prefix=".export-") as scratch:
        shapes = None
        for suffix, inputs, run in variants:
            for target, compute_dtype in targets:
                program = Program(model_class, checkpoint.config, inputs, run, dtype, compute_dtype)
                for form, extension in FORMATS.items():
                    path = Path(scratch) / f"{prefix.name}{suffix}{target}{extension}"
                    found = save_program(program, form, path)
                    if shapes is not None and list(found.items()) != list(shapes.items()):
                        raise AssertionError(f"{path.name} orders its parameters unlike the other programs")
                    shapes = found
        programs = {path.name: FileDigest.of(path) for path in sorted(Path(scratch).iterdir())}
        params = Path(scratch) / f"{prefix.name}.pdiparams"
        write_params(params, shapes or {}, dtype, parameters(checkpoint, dtype))
        manifest = _manifest(checkpoint, stage, dtype, FileDigest.of(params), programs)
        manifest_file = manifest_path(Path(scratch) / prefix.name)
        manifest_file.write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")
        # The manifest goes first and comes last: a reader never sees it beside files that are not its own.
        manifest_path(prefix).unlink(missing_ok=True)
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path == manifest_file):
            path.replace(prefix.parent / path.name)
    return manifest


def _manifest(
    checkpoint: Checkpoint, stage: str, dtype: str, weights: FileDigest, programs: dict[str, FileDigest]
) -> Manifest:
    import paddle

    return Manifest(
        contract=CONTRACT_VERSION,
        stage=stage,
        plugin=__version__,
        paddle=paddle.__version__,
        dtype=dtype,
        model=checkpoint.fingerprint(),
        config=checkpoint.config,
        weights=weights,
        programs=programs,
    )
