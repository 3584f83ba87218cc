"""Interface between the HTTP front and the engine process: requests, tokens, client protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Optional, Protocol

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.statistics import LoopStatistics
from paddlemix_qwenvl_plugin.util.errors import QwenVLError


class EngineUnavailable(QwenVLError):
    """The engine process is not ready, or it ended before the request did."""


# eq=False, comparison by identity: Ray compares requests that wait for a replica, and == of arrays has no truth value.
@dataclass(frozen=True, eq=False)
class EngineRequest:
    """Prompt as token ids, with images and sampling parameters. Compared by identity.

    serve/messages.py encodes each field for the engine process.

    Attributes:
        prompt: token ids, image slots included.
        images: a resized RGB image for each `<img>` of the prompt, in order; uint8 [image_size, image_size, 3].
        stop_token_ids: tokens that end the completion.
        options: sampling parameters and limits.
        generated: [start, end) token ranges of the prompt that are earlier completions (Prompt.generated).
        n_logprobs: number of most likely tokens, 0 to 20, reported with each token's log probability; None: no log
            probabilities.
        adapter: name of the LoRA adapter; None: the model without an adapter.
    """

    prompt: Sequence[int]
    images: Sequence[NDArray[np.uint8]]
    stop_token_ids: Sequence[int]
    options: GenerationOptions
    generated: Sequence[tuple[int, int]] = ()
    n_logprobs: Optional[int] = None
    adapter: Optional[str] = None


class Token(NamedTuple):
    """A generated token.

    Attributes:
        id: token id; a stop token is the last token of its request.
        logprob: natural logarithm of the probability under the unmodified logits, if requested.
        top: (token id, log probability) of the most likely tokens, in descending order.
    """

    id: int
    logprob: Optional[float] = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Ended:
    """Finish reason of a request and the number of its prompt tokens found in the prefix cache."""

    reason: Literal["stop", "length", "cancelled"]
    n_cached: int


EngineStats = LoopStatistics
"""Gauges and counters of the engine process since its start; sent at most once a second."""


class TokenStream(Protocol):
    """Async iterator over the tokens of a submitted request; each item is the list of tokens since the previous item.

    The iteration ends after the last token. It raises QwenVLError if the request failed and EngineUnavailable if the
    engine process ended. At most max_new_tokens tokens are buffered for a slow reader.
    """

    def __aiter__(self) -> AsyncIterator[list[Token]]: ...

    @property
    def ended(self) -> Optional[Ended]:
        """Finish reason and cached tokens of the request; None until all its tokens have been read."""

    def cancel(self) -> None:
        """Cancel the request at the engine's next step; no effect if the request has ended."""


class EngineClient(Protocol):
    """The front's client of the engine process. Call from the event loop's thread only.

    On a Ray cluster (cluster/serve/engine_handle.py), Ray Serve starts, restarts and ends the processes: `start` does
    nothing, `stop` ends only the requests, and `restarts` and `stats` stay at their initial values.

    Attributes:
        ready: whether the process accepts requests.
        restarts: number of restarts so far, including one in progress.
        stats: latest statistics of the process.
    """

    ready: bool
    restarts: int
    stats: EngineStats

    async def start(self) -> None:
        """Start the process and wait until it is ready. From then until `stop`, it is restarted whenever it ends.

        Raises:
            QwenVLError: the process ended before it was ready, as when the model cannot be opened; the message is its
                error message or its exit status.
            OSError: the process cannot be started.
        """

    async def stop(self) -> None:
        """End the process and its requests; the process has exited when this returns."""

    def submit(self, request: EngineRequest) -> TokenStream:
        """Submit a request.

        Raises:
            EngineUnavailable: no process is ready. On a Ray cluster, only the stream raises it.
        """


@dataclass(frozen=True)
class ModelSettings:
    """Arguments of QwenVL.from_exported in the engine process, and additional environment variables of that process.

    `first_model_path` is the vision stage, `second_model_path` the language stage, as in PaddleMIX's predictor.
    """

    first_model_path: Path
    second_model_path: Path
    model_name_or_path: Optional[Path] = None
    device: str = "cpu"
    gpu_memory: float = 0.9
    verify: bool = False
    adapters: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
