"""Generation as a loop over the step program: prefill of a batch, then one token a row."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.programs import Stage
from paddlemix_qwenvl_plugin.runtime.sampling import RowSampler


@dataclass
class Generated:
    """What came of a batch. Times are seconds; `finish_reasons` are "stop" (an end token) or "length"."""

    tokens: list[list[int]]
    finish_reasons: list[str]
    prefill_seconds: float
    decode_seconds: float
    steps: int = field(default=0)


class Generator:
    """The language stage with its step program opened."""

    def __init__(self, stage: Stage) -> None:
        self.config: ModelConfig = stage.manifest.config
        self._dtype = stage.compute_dtype
        self._program = stage.open(".step")

    def generate(
        self,
        input_ids: NDArray[np.int64],
        lengths: Sequence[int],
        features: NDArray[np.float32],
        img_pos: NDArray[np.int64],
        options: GenerationOptions,
        eos_token_ids: Sequence[int],
    ) -> Generated:
        """Generate for checked arguments.

        Args:
            input_ids: int64 [B, T], rows padded on the right.
            lengths: prompt length of each row, 1 to T.
            features: float32 [N, n_queries, hidden]; N may be 0.
            img_pos: int64 [N, 3]: row, index of `<img>`, index of `</img>`.
        """
        start = time.perf_counter()
        rows, width = input_ids.shape
        prompt = np.asarray(lengths, np.int64).reshape(rows, 1)
        samplers = [RowSampler(options, eos_token_ids, self.config.vocab_size) for _ in range(rows)]
        if not len(features):
            features, img_pos = self._no_picture()
        valid = np.zeros([rows, 1], bool)
        past = np.zeros([rows, 1], np.int64)
        outputs = self._step(
            input_ids, features, img_pos, prompt, past, prompt, valid, self._empty_caches(rows)
        )
        valid = np.concatenate([valid, np.arange(width) < prompt], axis=1)
        tokens = self._pick(outputs[0], samplers, np.zeros([rows, 1], np.int64))
        prefilled = time.perf_counter()

        features, img_pos = self._no_picture()
        one, past, steps = np.ones([rows, 1], np.int64), prompt.copy(), 1
        while not all(sampler.finished for sampler in samplers):
            outputs = self._step(tokens, features, img_pos, one, past, prompt, valid, outputs[1:])
            valid = np.concatenate([valid, np.ones([rows, 1], bool)], axis=1)
            past = past + 1
            tokens = self._pick(outputs[0], samplers, tokens)
            steps += 1
        return Generated(
            [sampler.tokens for sampler in samplers],
            ["stop" if sampler.ended else "length" for sampler in samplers],
            prefilled - start,
            time.perf_counter() - prefilled,
            steps,
        )

    def _step(self, *inputs: Any) -> list[Any]:
        *arrays, caches = inputs
        return self._program([*arrays, *caches])

    def _pick(
        self, logits: Any, samplers: list[RowSampler], previous: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Next token of each row; a finished row repeats its last one, which nothing reads."""
        values = logits.numpy()
        picked = [
            int(previous[row, 0]) if sampler.finished else sampler.pick(values[row])
            for row, sampler in enumerate(samplers)
        ]
        return np.asarray(picked, np.int64).reshape(-1, 1)

    def _no_picture(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        shape = (1, self.config.visual.n_queries, self.config.hidden_size)
        return np.zeros(shape, np.float32), np.array([[-1, 0, 0]], np.int64)

    def _empty_caches(self, rows: int) -> list[Any]:
        shape = [rows, self.config.num_attention_heads, 1, self.config.head_dim]
        return [self._program.zeros(shape, self._dtype) for _ in range(2 * self.config.num_hidden_layers)]
