"""What a request handler works with: the model's tokenizer, the engine, the images, the queue."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Optional, Protocol

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.serve.engine_api import EngineClient
from paddlemix_qwenvl_plugin.serve.metrics import Metrics
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings


class LoadedImage(NamedTuple):
    """An image as the engine takes it, uint8 [image_size, image_size, 3], and its own (width, height) in pixels."""

    pixels: NDArray[np.uint8]
    size: tuple[int, int]


class ImageLoader(Protocol):
    """Fetches and decodes images in processes of their own."""

    async def load(self, url: str, param: str) -> LoadedImage:
        """Load a data: URL, or an http(s) URL of an allowed host.

        Raises:
            ApiError: what is wrong with it; `param` is the parameter that named it.
        """

    async def close(self) -> None:
        """End the processes."""


class Admission(Protocol):
    """A bounded queue before the engine: first come, first served."""

    def slots(self, n: int, key: Optional[str]) -> AbstractAsyncContextManager[None]:
        """Wait for n slots, and hold them within the block.

        Args:
            key: the API key, for its own limit.

        Raises:
            ApiError: 429 with Retry-After where the queue or the key's share is full; 503 where waiting took too long.
        """

    @property
    def running(self) -> int:
        """Slots that are held."""

    @property
    def waiting(self) -> int:
        """Requests that wait for slots."""

    def close(self) -> None:
        """Let no new request in: they get 503. Those that wait go on waiting."""

    def refuse_waiting(self) -> None:
        """Let in neither a new request nor those that wait."""


@dataclass
class Service:
    """Everything that handlers share.

    Attributes:
        model_name: what clients call the model.
        is_chat: whether the model is Qwen-VL-Chat; the base model has /v1/completions only.
        draining: whether the server is ending: it answers what it has begun.
    """

    settings: ServeSettings
    engine: EngineClient
    tokenizer: QwenTokenizer
    config: ModelConfig
    is_chat: bool
    model_name: str
    images: ImageLoader
    admission: Admission
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False
