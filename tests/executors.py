"""Executors for tests: one that records the calls of another, and one that generates scripted tokens."""

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
    """Forward all calls. `done` records "encode" for each image and the number of tokens of each step."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.limits = executor.limits
        self.done: list[Union[str, int]] = []
        self.before_step: Callable[[], Any] = lambda: None

    @property
    def steps(self) -> list[int]:
        return [each for each in self.done if isinstance(each, int)]

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
    """Generate `script(prompt)` token by token without computing anything. `prompts` records the prompts."""

    def __init__(
        self, vl: QwenVL, script: Callable[[list[int]], Iterable[int]], limits: Optional[Limits] = None
    ) -> None:
        context = vl.config.max_position_embeddings
        self.limits = limits or Limits(256, 512, 4 * context // 32, 32)
        self._shape = [vl.config.visual.n_queries, vl.config.hidden_size]
        self._script = script
        self.prompts: list[list[int]] = []
        self.steps: list[list[tuple[int, int]]] = []

    def load(self, vision: bool) -> None:
        pass

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return np.zeros(self._shape, np.float32)

    def start(self, chunks: Sequence[Chunk]) -> Callable[[], Picked]:
        self.steps.append([(chunk.generation.n_computed, chunk.n) for chunk in chunks])
        picked = []
        for chunk in chunks:
            generation = chunk.generation
            if chunk.picks:
                if not generation.tokens:
                    self.prompts.append(generation.prompt)
                said = list(self._script(generation.prompt))
                n = len(generation.tokens)
                picked.append(said[n] if n < len(said) else NO_TOKEN)
        return lambda: Picked(picked)

    def forget(self, generation: Generation) -> None:
        pass


def without_cache(vl: QwenVL) -> Loop:
    """Replace the loop of `vl` permanently by one without cached content.

    Two loops on one executor share its blocks of keys and values: the older one would find its cached prefixes
    overwritten, so it is never put back.
    """
    vl._loop = Loop(vl._loop._executor)
    return vl._loop


def record(vl: QwenVL, monkeypatch: pytest.MonkeyPatch) -> Recording:
    """Replace the loop of `vl` by one without cached content, on a recording executor."""
    recording = Recording(without_cache(vl)._executor)
    monkeypatch.setattr(vl, "_loop", Loop(recording))
    return recording


def say(vl: QwenVL, monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int]) -> list[list[int]]:
    """Make the model generate these tokens for any prompt; returns the list of recorded prompts."""
    scripted = Scripted(vl, lambda prompt: tokens)
    monkeypatch.setattr(vl, "_loop", Loop(scripted))
    return scripted.prompts
