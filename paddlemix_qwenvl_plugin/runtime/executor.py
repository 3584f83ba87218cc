"""What computes a step: the engine (engine_executor.py) or the portable graph (portable_executor.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional, Protocol

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.runtime.generation import Generation, TokenLogprobs
from paddlemix_qwenvl_plugin.runtime.scheduler import Chunk, Limits

NO_TOKEN = -1
"""In place of a token, where the logits were not finite numbers."""


class Picked(NamedTuple):
    """What a step gave.

    Attributes:
        tokens: one for each chunk with `picks`, in their order, NO_TOKEN where one cannot be picked.
        logprobs: those of each token, None for a request without n_logprobs; None if no request has it.
    """

    tokens: list[int]
    logprobs: Optional[list[Optional[TokenLogprobs]]] = None


class Executor(Protocol):
    """Both stages of a model, with a KV cache. Calls come from one thread at a time."""

    limits: Limits

    def load(self, vision: bool) -> None:
        """Open the programs now rather than at their first use, stage 1 only with `vision`."""

    def encode_image(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [3, image_size, image_size] -> features float32 [n_queries, hidden_size]."""

    def start(self, chunks: Sequence[Chunk]) -> Callable[[], Picked]:
        """Start a step: compute the chunks, and pick a token for each with `picks`.

        Returns:
            What waits for the step to end and gives its tokens. Steps end in the order of their start.

        Raises:
            QwenVLError: the step failed as a whole; also where it is waited for.
        """

    def check_device(self) -> None:
        """Raise an error if the device computes nothing any more, as a GPU after a fault."""

    def forget(self, generation: Generation) -> None:
        """Free what is kept for a request beside its blocks: it has ended, or is computed from its beginning again."""
