"""Executors for tests: `Recording` forwards calls and records images and steps, `Scripted` generates given tokens.

They lack `check_device`, which only the engine process of `qwenvl serve` needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional, Union

import numpy as np
import pytest

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.runtime.executor import NO_TOKEN, Executor, Picked
from paddlemix_qwenvl_plugin.runtime.generation import Generation
from paddlemix_qwenvl_plugin.runtime.loop import Loop
from paddlemix_qwenvl_plugin.runtime.scheduler import Chunk, Limits


class Recording:
    """Executor that forwards calls to another, and calls `before_step` before each step.

    Attributes:
        done: what was computed, in order: "encode" for an image, the number of tokens for a step.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.limits = executor.limits
        self.done: list[Union[str, int]] = []
        self.before_step: Callable[[], Any] = lambda: None

    @property
    def steps(self) -> list[int]:
        return [entry for entry in self.done if isinstance(entry, int)]

    def load(self, vision: bool) -> None:
        self._executor.load(vision)

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        self.done.append("encode")
        return self._executor.encode_image(pixels)

    def start(self, chunks: Sequence[Chunk]) -> Callable[[], Picked]:
        self.done.append(sum(chunk.n for chunk in chunks))
        self.before_step()
        return self._executor.start(chunks)

    def forget(self, generation: Generation) -> None:
        self._executor.forget(generation)


class Scripted:
    """Executor that generates `script(prompt)` token by token, without a model. A request for more tokens fails.

    `prompts` records the prompts; `steps` records for each step a list with (tokens computed before, tokens to compute)
    of each chunk.
    """

    def __init__(
        self, vl: QwenVL, script: Callable[[list[int]], Iterable[int]], limits: Optional[Limits] = None
    ) -> None:
        context = vl.config.max_position_embeddings
        # By default, the KV cache has room for four requests of the full context.
        self.limits = limits or Limits(
            max_running=256, step_tokens=512, n_blocks=4 * context // 32, block_tokens=32
        )
        self._features_shape = [vl.config.visual.n_queries, vl.config.hidden_size]
        self._script = script
        self.prompts: list[list[int]] = []
        self.steps: list[list[tuple[int, int]]] = []

    def load(self, vision: bool) -> None:
        pass

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return np.zeros(self._features_shape, np.float32)

    def start(self, chunks: Sequence[Chunk]) -> Callable[[], Picked]:
        self.steps.append([(chunk.generation.n_computed, chunk.n) for chunk in chunks])
        picked = []
        for chunk in chunks:
            generation = chunk.generation
            if chunk.picks:
                if not generation.tokens:
                    self.prompts.append(generation.prompt)
                completion = list(self._script(generation.prompt))
                n = len(generation.tokens)
                picked.append(completion[n] if n < len(completion) else NO_TOKEN)
        return lambda: Picked(picked)

    def forget(self, generation: Generation) -> None:
        pass


def without_cache(vl: QwenVL) -> Loop:
    """Replace the loop of `vl` permanently by one without cached content.

    Two loops on one executor share its KV cache. The new loop overwrites cached prefixes of the old loop, so the old
    loop is never restored.
    """
    vl._loop = Loop(vl._loop._executor)
    return vl._loop


def record(vl: QwenVL, monkeypatch: pytest.MonkeyPatch) -> Recording:
    """Replace the loop of `vl` by one without cached content, on a recording executor."""
    recording = Recording(without_cache(vl)._executor)
    monkeypatch.setattr(vl, "_loop", Loop(recording))
    return recording


def script_completion(vl: QwenVL, monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int]) -> list[list[int]]:
    """Make the model generate `tokens` for every prompt. Return the list in which the prompts are recorded."""
    scripted = Scripted(vl, lambda prompt: tokens)
    monkeypatch.setattr(vl, "_loop", Loop(scripted))
    return scripted.prompts
