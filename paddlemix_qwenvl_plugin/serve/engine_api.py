"""What the HTTP front asks of the engine process, and what it gets back."""

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
    """The engine process is not ready, or died while it worked on this request."""


@dataclass(frozen=True)
class EngineRequest:
    """A prompt as token ids, and how to answer it.

    Attributes:
        prompt: token ids, those of image slots included.
        images: uint8 [image_size, image_size, 3] each, RGB, resized; one for each `<img>` of the prompt, in order.
        stop_token_ids: tokens that end the completion.
        options: sampling parameters and limits.
        generated: [start, end) ranges of the prompt that earlier completions made (Prompt.generated).
        n_logprobs: None: no log probabilities; else how many of the likeliest tokens come with each token, 0 to 20.
    """

    prompt: Sequence[int]
    images: Sequence[NDArray[np.uint8]]
    stop_token_ids: Sequence[int]
    options: GenerationOptions
    generated: Sequence[tuple[int, int]] = ()
    n_logprobs: Optional[int] = None


class Token(NamedTuple):
    """A generated token.

    Attributes:
        id: its token id; a stop token is the last one of its request.
        logprob: natural logarithm of its probability under the unchanged logits, if asked for.
        top: (token id, log probability) of the likeliest tokens, the likeliest first.
    """

    id: int
    logprob: Optional[float] = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Ended:
    """The end of a request: why, and how many tokens of its prompt were found in the prefix cache."""

    reason: Literal["stop", "length", "cancelled"]
    n_cached: int


EngineStats = LoopStatistics
"""Gauges and counters of the engine process, since its start; sent once a second while it works."""


class TokenStream(Protocol):
    """The tokens of a submitted request, in lists: each list is what was there since the last one.

    The iteration ends after the last token and raises QwenVLError if the request failed, EngineUnavailable if the
    engine died. At most max_new_tokens tokens are held for a reader that is slow.
    """

    def __aiter__(self) -> AsyncIterator[list[Token]]: ...

    @property
    def ended(self) -> Optional[Ended]:
        """How it ended, once the iteration has."""

    def cancel(self) -> None:
        """End the request at the next step; no error if it has ended."""


class EngineClient(Protocol):
    """The front's side of the engine process. All calls come from the event loop's thread."""

    ready: bool
    restarts: int
    stats: EngineStats

    async def start(self) -> None:
        """Start the process, and keep one running until `stop`. Returns once the first one is ready.

        Raises:
            QwenVLError: the model cannot be opened; the process's own line says why.
        """

    async def stop(self) -> None:
        """End the process and what it works on; no process is left behind when this returns."""

    def submit(self, request: EngineRequest) -> TokenStream:
        """Queue a request.

        Raises:
            EngineUnavailable: no process is ready.
        """


@dataclass(frozen=True)
class ModelSettings:
    """What the engine process opens; see QwenVL.from_exported."""

    first_model_path: Path
    second_model_path: Path
    model_name_or_path: Optional[Path] = None
    device: str = "cpu"
    gpu_memory: float = 0.9
    verify: bool = False
    environment: dict[str, str] = field(default_factory=dict)
