"""Quantization of a model folder with calibration rows to a GPTQ model folder, for `qwenvl quantize`."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Optional

from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.config import is_chat_model
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.quantization.embedding import embed
from paddlemix_qwenvl_plugin.quantization.folder import GptqFolder
from paddlemix_qwenvl_plugin.quantization.judge import count_changed
from paddlemix_qwenvl_plugin.quantization.layers import Batch, LayerQuantizer, Streams
from paddlemix_qwenvl_plugin.quantization.report import REPORT, Report
from paddlemix_qwenvl_plugin.quantization.rows import HELD_OUT_EVERY, CalibrationRow, CalibrationRows
from paddlemix_qwenvl_plugin.quantization.states import States
from paddlemix_qwenvl_plugin.quantization.work import Work
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.progress import track

# Bits -> default group size. The demo model's loss of reading accuracy: 0.8 points with 4 bits in groups of 64, 0.4 in
# groups of 32, none with 8 bits in groups of 64 (docs/demo-model.md).
_DEFAULT_GROUP_SIZES = {4: 32, 8: 64}
_GROUP_SIZES = (32, 64, 128)  # of the engine's types with zero points

MAX_TOKENS = 1 << 16
"""Limit on the tokens of all rows. A file of hidden states then has at most 1 GiB for the 7B model; up to six exist:
two, for the original and the quantized model, before a layer, in its middle and after it."""


def quantize_model(
    model: Path,
    target: Path,
    bits: int,
    group_size: Optional[int] = None,
    data: Optional[Path] = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Quantize the matrices of the decoder layers, not the embedding or lm_head, and write a GPTQ model folder.

    The folder is created atomically. After an interruption, a call with the same arguments resumes from
    `TARGET.partial`, at the layer that was interrupted.

    Args:
        model: a model folder in any supported format, not quantized.
        target: must not exist yet.
        bits: 4 or 8.
        group_size: columns that share a scale: 32, 64 or 128; None: 32 with 4 bits, 64 with 8.
        data: calibration rows (rows.py); None: random samples of the demo world.
        say: called with each line for the user, after the arguments are checked.

    Raises:
        UsageError: an invalid argument or row; or `target` exists, or its work folder cannot be used.
        QwenVLError: as for Checkpoint; an image cannot be loaded; the calibration rows give inputs that are not finite;
            or the outputs of a matrix do not fill the words of a GPTQ file.
    """
    if bits not in _DEFAULT_GROUP_SIZES:
        raise UsageError(f"--bits {bits}: must be 4 or 8")
    if group_size is None:
        group_size = _DEFAULT_GROUP_SIZES[bits]
    if group_size not in _GROUP_SIZES:
        raise UsageError(f"--group_size {group_size}: must be one of {', '.join(map(str, _GROUP_SIZES))}")
    checkpoint = Checkpoint(model)
    if checkpoint.quantized is not None:
        raise UsageError(
            f"{model}: is quantized already ({checkpoint.quantized.quant_type}); give the original model"
        )
    _check_sizes(checkpoint, bits, group_size)
    tokenizer = QwenTokenizer.of_model(model, checkpoint.config)
    rows = CalibrationRows(data, tokenizer, checkpoint.config, is_chat_model(model))
    n_rows = len(rows.rows)
    rows.rows = _within_limit(rows)
    settings = {
        "model": checkpoint.fingerprint(),
        "dtype": checkpoint.dtype,
        "rows": rows.sha256,
        "bits": bits,
        "group_size": group_size,
    }
    with Work.open(target, settings) as work:
        if data is None:
            say(
                "Without --data: calibrating on drawn images of shapes and words; your own rows fit your use better."
            )
        if work.embedded:
            say(f"Resuming after {work.layers} of {checkpoint.config.num_hidden_layers} layers.")
        return _run(checkpoint, rows, n_rows - len(rows.rows), work, target, bits, group_size)


def _run(
    checkpoint: Checkpoint,
    rows: CalibrationRows,
    skipped: int,
    work: Work,
    target: Path,
    bits: int,
    group_size: int,
) -> Report:
    lengths = [len(row.input_ids) for row in rows.rows]
    held_out = list(range(HELD_OUT_EVERY - 1, len(lengths), HELD_OUT_EVERY))
    calibration = [i for i in range(len(lengths)) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    batch = Batch([row.n_prompt for row in rows.rows], calibration, held_out)
    folder = GptqFolder(work.model, checkpoint)

    def states(name: str) -> States:
        return States(work.states(name), lengths, checkpoint.config.hidden_size)

    # Only the states of the quantized model calibrate a layer. Those of the original are for the report: the errors
    # of the states, and the number of changed tokens.
    def streams(layer: int) -> Streams:
        if layer == 0:  # both models have the same states before the first layer
            return Streams(states("original-0"), states("original-0"))
        return Streams(states(f"original-{layer}"), states(f"quantized-{layer}"))

    if not work.embedded:
        before = streams(0)
        before.original.write(embed(checkpoint, rows))
        work.save({before.original.path})
    n_layers = checkpoint.config.num_hidden_layers
    quantizer = LayerQuantizer(checkpoint, batch, bits, group_size)
    for index in track(range(work.layers, n_layers), "layers quantized", n_layers - work.layers):
        after = streams(index + 1)
        tensors, figures = quantizer.run(index, streams(index), after, folder.dtype)
        folder.write_layer(index, tensors)
        work.figures.append(figures)
        work.save({after.original.path, after.quantized.path})
    del quantizer  # frees its two layers before count_changed loads lm_head
    folder.finish(bits, group_size)
    report = Report(
        bits,
        group_size,
        len(calibration),
        sum(lengths[i] for i in calibration),
        skipped,
        count_changed(checkpoint, rows.rows, held_out, streams(n_layers)),
        work.figures,
        folder.n_bytes,
        folder.n_bytes_unquantized,
    )
    (work.model / REPORT).write_text(json.dumps(report.as_dict(), indent=1) + "\n", "utf-8")
    work.finish(target)
    return report


def _check_sizes(checkpoint: Checkpoint, bits: int, group_size: int) -> None:
    """Check that groups fill the inputs of every matrix, and zero points the words of GPTQ files."""
    for name, spec in checkpoint.language.items():
        if not spec.linear or not name.startswith("h."):
            continue
        n_in, n_out = spec.shape
        if n_in % group_size:
            raise UsageError(
                f"--group_size {group_size}: {name} has {n_in} inputs, which is not a multiple of {group_size}"
            )
        if n_out * bits % 32:
            raise QwenVLError(
                f"{checkpoint.folder}: {name} has {n_out} outputs; "
                f"GPTQ files need a multiple of {32 // bits} at {bits} bits"
            )


def _within_limit(rows: CalibrationRows) -> list[CalibrationRow]:
    """The first rows with at most MAX_TOKENS tokens together."""
    totals = accumulate(len(row.input_ids) for row in rows.rows)
    kept = [row for row, total in zip(rows.rows, totals) if total <= MAX_TOKENS]
    if len(kept) < HELD_OUT_EVERY:
        raise UsageError(
            f"--data: the first {HELD_OUT_EVERY} rows have more than {MAX_TOKENS} tokens together; use shorter ones"
        )
    return kept
