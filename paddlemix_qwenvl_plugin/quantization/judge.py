"""Count the tokens of the held-out rows that the quantized model predicts differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.quantization.grid import Floats
from paddlemix_qwenvl_plugin.quantization.layers import Streams
from paddlemix_qwenvl_plugin.quantization.rows import CalibrationRow

_TOKENS_AT_ONCE = 256  # bounds the size of the logits


@dataclass(frozen=True)
class Changed:
    """Counts of held-out positions whose most likely next token differs, and of rows with such a position.

    Attributes:
        tokens, of_tokens: number of positions that differ, and of all compared positions.
        rows, of_rows: number of rows with such a position, and of all held-out rows.
    """

    tokens: int
    of_tokens: int
    rows: int
    of_rows: int


def count_changed(
    checkpoint: Checkpoint, rows: Sequence[CalibrationRow], held_out: Sequence[int], after: Streams
) -> Changed:
    """Compare the most likely next tokens of the original and the quantized model.

    Args:
        held_out: indices of the held-out rows.
        after: states after the last layer; ln_f and lm_head are not quantized, so both models have the same.
    """
    weights = dict(
        checkpoint.tensors(
            {name: checkpoint.language[name] for name in ("ln_f.weight", "lm_head.weight")},
            "float32",
            out_in=True,
        )
    )
    norm, head = (np.asarray(weights.pop(f"{name}.weight"), np.float32) for name in ("ln_f", "lm_head"))
    epsilon = checkpoint.config.layer_norm_epsilon

    def most_likely(states: Floats) -> np.ndarray:
        """Most likely token after each position: RMSNorm ln_f, lm_head and argmax."""
        scale = 1 / np.sqrt(np.square(states).mean(-1, keepdims=True) + np.float32(epsilon))
        normed = states * scale * norm
        chunks = range(0, len(normed), _TOKENS_AT_ONCE)
        return np.concatenate([(normed[i : i + _TOKENS_AT_ONCE] @ head.T).argmax(-1) for i in chunks])

    tokens = of_tokens = changed_rows = 0
    for row in held_out:
        judged = rows[row].judged
        original, quantized = (states.read(row)[judged] for states in (after.original, after.quantized))
        differs = most_likely(original) != most_likely(quantized)
        tokens += int(differs.sum())
        of_tokens += len(judged)
        changed_rows += bool(differs.any())
    return Changed(tokens, of_tokens, changed_rows, len(held_out))
