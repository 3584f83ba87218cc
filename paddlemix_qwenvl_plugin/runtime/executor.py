"""Interface of executors, which compute steps: engine_executor.py and portable_executor.py implement it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional, Protocol

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.runtime.generation import Generation, TokenLogprobs
from paddlemix_qwenvl_plugin.runtime.scheduler import Chunk, Limits

NO_TOKEN = -1
"""Value in place of a token id for a row whose logits are not finite.

The engine accepts negative infinities if at least one logit is finite.
"""


class Picked(NamedTuple):
    """Result of a step: the picked tokens and their log probabilities.

    Attributes:
        tokens: one token id for each chunk with `picks`, in their order; NO_TOKEN if the logits are not finite.
        logprobs: an entry for each token: its log probabilities, or None if its request has no `n_logprobs`; without
            meaning for NO_TOKEN. None in place of the list if no request of the step has `n_logprobs`, and for the
            portable executor's NO_TOKEN.
    """

    tokens: list[int]
    logprobs: Optional[list[Optional[TokenLogprobs]]] = None


class Executor(Protocol):
    """Interface for running both stages of a model with a KV cache. Not thread-safe: one call at a time."""

    limits: Limits

    def load(self, vision: bool) -> None:
        """Load the vision stage if `vision`, rather than at its first use; the language stage is loaded already."""

    def encode_image(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode an image: float32 [3, image_size, image_size] -> float32 [n_queries, hidden_size].

        Raises:
            QwenVLError: the computation failed.
        """

    def start(self, chunks: Sequence[Chunk]) -> Callable[[], Picked]:
        """Start a step: compute the chunks, and pick a token for each chunk with `picks`.

        With `limits.ahead`, the loop may start a step before it has the previous step's result (`Chunk.ahead`).

        Returns:
            A function that waits for the step and returns its result. Steps end in the order of their start.

        Raises:
            QwenVLError: the step failed for all of its requests; the returned function may raise it as well.
        """

    def check_device(self) -> None:
        """Raise an exception, QwenVLError or Paddle's, if the device is unusable, such as a GPU after a fault.

        Only the engine process of `qwenvl serve` calls this, after a failed step.
        """

    def forget(self, generation: Generation) -> None:
        """Free the state of a request, except its blocks, after it has ended or after an interrupted step."""
