"""Service: the objects that request handlers share, and the interfaces of image loader and admission."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
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
    """Decoded image.

    Attributes:
        pixels: uint8 [image_size, image_size, 3].
        size: (width, height) in pixels before resizing, of the upright image (EXIF orientation applied).
    """

    pixels: NDArray[np.uint8]
    size: tuple[int, int]


class ImageLoader(Protocol):
    """Loader that fetches images, and has separate processes decode them."""

    async def load(self, url: str, param: str) -> LoadedImage:
        """Load a data: URL, or an http(s) URL of an allowed host.

        Raises:
            ApiError: the image cannot be loaded; `param` is the request parameter that contains the URL.
        """

    async def close(self) -> None:
        """End the worker processes."""


class Admission(Protocol):
    """Bounded first-in-first-out queue in front of the engine, or of all engines of a cluster.

    In a cluster's fronts (cluster/serve/cluster_admission.py), `close` and `refuse_waiting` do nothing: only a server
    without a cluster calls them.
    """

    def slots(self, n: int, key: Optional[str]) -> AbstractAsyncContextManager[None]:
        """Wait for n slots and hold them within the block.

        Args:
            key: short hash of the API key, for the limit per key.

        Raises:
            ApiError: 400 if n is more than the server or the key may ever hold; 429 with Retry-After if the queue is
                full or the key's limit reached; 503 after the waiting timeout, and while the server shuts down.
        """

    @property
    def running(self) -> int:
        """Number of slots in use."""

    @property
    def waiting(self) -> int:
        """Number of requests waiting for slots."""

    def close(self) -> None:
        """Refuse new requests with 503. Waiting requests stay in the queue."""

    def refuse_waiting(self) -> None:
        """Refuse new and waiting requests with 503."""


@dataclass
class Service:
    """Shared state of request handlers.

    Attributes:
        model_name: name of the model in the API.
        adapters: names of the model's adapters; the API lists each of them as a model.
        is_chat: whether the model is trained for chat, as Qwen-VL-Chat and the demo model; the base model supports
            /v1/completions only.
        draining: whether the server is shutting down, while running requests finish.
        cluster_metrics: function that renders the metrics of all processes of a cluster for an Accept header, as
            Metrics.render does; None: this server is not part of a cluster.
    """

    settings: ServeSettings
    engine: EngineClient
    tokenizer: QwenTokenizer
    config: ModelConfig
    is_chat: bool
    model_name: str
    images: ImageLoader
    admission: Admission
    adapters: tuple[str, ...] = ()
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False
    cluster_metrics: Optional[Callable[[str], Awaitable[tuple[bytes, str]]]] = None
