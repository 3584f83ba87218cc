"""Quantization of the decoder layers one after the other, on the outputs of the preceding quantized layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.quantization.grid import Floats, round_to_nearest
from paddlemix_qwenvl_plugin.quantization.layer import STAGES, DecoderLayer
from paddlemix_qwenvl_plugin.quantization.packing import gptq_tensors
from paddlemix_qwenvl_plugin.quantization.rounding import Hessian, quantize, relative_error
from paddlemix_qwenvl_plugin.quantization.states import States

# X^T X is a sum of products of at least this many tokens each (the last may have fewer). Large products are faster, and
# the sum is updated less often.
_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Batch:
    """Split of the rows of a job into calibration rows and held-out rows.

    Attributes:
        prompt_lengths: length of every row's prompt.
        calibration, held_out: indices of the rows.
    """

    prompt_lengths: Sequence[int]
    calibration: Sequence[int]
    held_out: Sequence[int]


@dataclass(frozen=True)
class Streams:
    """Hidden states of all rows at one point of the forward pass, in the original and the partly quantized model."""

    original: States
    quantized: States


class LayerQuantizer:
    """Quantizer of one layer at a time; it holds the original and the quantized layer, both in float32."""

    def __init__(self, checkpoint: Checkpoint, batch: Batch, bits: int, group: int) -> None:
        self._checkpoint, self._batch = checkpoint, batch
        self._bits, self._group = bits, group
        self._original = DecoderLayer(checkpoint.config)
        self._quantized = DecoderLayer(checkpoint.config)

    def run(
        self, index: int, before: Streams, after: Streams, dtype: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Quantize layer `index`, from the states `before` it, and write the states `after` it.

        Returns:
            The layer's tensors for the checkpoint, with unquantized tensors in `dtype`; and the layer's entry of
            Report.layers: relative errors of the matrices and of the hidden states.

        Raises:
            QwenVLError: the inputs of a matrix are not finite.
        """
        prefix = f"h.{index}."
        specs = {name: spec for name, spec in self._checkpoint.language.items() if name.startswith(prefix)}
        weights = {
            name.removeprefix(prefix): np.asarray(values, np.float32)
            for name, values in self._checkpoint.tensors(specs, "float32", out_in=True)
        }
        for layer in (self._original, self._quantized):
            layer.load(weights)
        vectors = {name: spec for name, spec in specs.items() if not spec.linear}
        tensors: dict[str, Any] = dict(self._checkpoint.tensors(vectors, dtype))
        errors: dict[str, list[float]] = {}
        after_attention = Streams(
            before.original.beside("original-middle.bin"), before.quantized.beside("quantized-middle.bin")
        )
        for stage, matrices in enumerate(STAGES):
            if stage == 2:  # the first stage of the MLP; the quantized layer has quantized attention by now
                self._advance(before, after_attention, DecoderLayer.after_attention)
            source = before if stage < 2 else after_attention
            gram = self._gram(stage, source.quantized)
            hessian = Hessian(gram.copy(), f"{prefix}{matrices[0]}")  # a copy, which Hessian overwrites
            for matrix in matrices:
                weight = weights.pop(f"{matrix}.weight")
                quantized = quantize(weight, hessian, self._bits, self._group)
                values = quantized.values()
                nearest = round_to_nearest(weight, self._bits, self._group).values()
                errors[matrix] = [
                    relative_error(weight, rounded_weight, gram) for rounded_weight in (values, nearest)
                ]
                self._quantized.load({f"{matrix}.weight": values})
                for suffix, packed in gptq_tensors(quantized, self._bits).items():
                    tensors[f"{prefix}{matrix}.{suffix}"] = packed
        self._advance(after_attention, after, lambda layer, states, _: layer.after_mlp(states))
        for states in (after_attention.original, after_attention.quantized):
            states.path.unlink()
        return tensors, {"matrices": errors, "states": self._difference(after)}

    def _gram(self, stage: int, states: States) -> Floats:
        """Compute X^T X for the inputs X of a stage on the calibration rows."""
        gram: Optional[Floats] = None
        pending, n_pending = list[Floats](), 0
        for number, row in enumerate(self._batch.calibration, start=1):
            inputs = self._quantized.inputs(stage, states.read(row), self._batch.prompt_lengths[row])
            pending.append(inputs)
            n_pending += len(inputs)
            if n_pending >= _TOKENS_AT_ONCE or number == len(self._batch.calibration):
                chunk = np.concatenate(pending)
                gram = chunk.T @ chunk if gram is None else np.add(gram, chunk.T @ chunk, out=gram)
                pending, n_pending = [], 0
        assert gram is not None
        return gram

    def _advance(
        self, source: Streams, target: Streams, step: Callable[[DecoderLayer, Floats, int], Floats]
    ) -> None:
        """Apply a part of the layer, original and quantized, to the states of all rows from `source` to `target`."""

        def stepped(layer: DecoderLayer, states: States) -> Iterator[Floats]:
            for row, n_prompt in enumerate(self._batch.prompt_lengths):
                yield step(layer, states.read(row), n_prompt)

        target.original.write(stepped(self._original, source.original))
        target.quantized.write(stepped(self._quantized, source.quantized))

    def _difference(self, streams: Streams) -> float:
        """Relative error of the held-out rows' states: ||quantized - original|| / ||original||."""
        error = total = 0.0
        for row in self._batch.held_out:
            original = streams.original.read(row)
            error += float(np.square(streams.quantized.read(row) - original).sum(dtype=np.float64))
            total += float(np.square(original).sum(dtype=np.float64))
        return float(np.sqrt(error / total)) if total else 0.0
