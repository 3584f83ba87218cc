"""Image loader of the server: data: URLs and http(s) URLs of allowed hosts, decoded in worker processes."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from typing import Optional

from paddlemix_qwenvl_plugin.serve import image_worker
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.image_hosts import ImageHosts
from paddlemix_qwenvl_plugin.serve.image_process import ImageProcess, NoWorkerError
from paddlemix_qwenvl_plugin.serve.service import LoadedImage
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, TooLargeError, line_of

# About a hundred images of 448 x 448 pixels. A client resends the images of a conversation with each turn.
_CACHE_BYTES = 64 * 2**20


class WorkerImageLoader:
    """ImageLoader over a pool of worker processes, with a cache of decoded images.

    If a request is cancelled, the decoding of its image continues: killing the process and starting another one would
    take longer. `load` waits for an idle process without a timeout, until it is cancelled.
    """

    def __init__(self, settings: ServeSettings, image_size: int) -> None:
        """Create the pool; processes start on demand.

        Args:
            image_size: input size of the model, in pixels.
        """
        self._hosts = ImageHosts(settings.image_hosts, settings.max_image_bytes, settings.image_timeout)
        self._processes = [
            ImageProcess(
                image_size, settings.max_image_bytes, settings.max_image_pixels, settings.image_timeout
            )
            for _ in range(settings.image_workers)
        ]
        # Last in, first out, so that processes that already run are preferred. Created at the first use: before Python
        # 3.10 a queue is bound to the event loop of its creation.
        self._idle_processes: Optional[asyncio.LifoQueue[ImageProcess]] = None
        self._decoding: set[asyncio.Task[LoadedImage]] = set()
        self._cache: OrderedDict[bytes, LoadedImage] = OrderedDict()
        self._cached_bytes = 0
        self.n_cache_hits = 0

    async def start(self) -> None:
        """Start all processes now, as tests do; in a server, `load` starts them on demand.

        Raises:
            NoWorkerError: a process does not start.
        """
        await asyncio.gather(*(process.start() for process in self._processes))

    async def load(self, url: str, param: str) -> LoadedImage:
        """Load a data: URL, or an http(s) URL of an allowed host; a worker process decodes it unless it is cached.

        Arguments and errors as for `ImageLoader.load`.
        """
        # Only the first characters are searched for the colon after the scheme: the text may have megabytes.
        scheme = url.partition(":")[0].lower() if ":" in url[:16] else ""
        if scheme == "data":
            if not url.isascii():
                raise _error(param, "a data: URL must be ASCII", "invalid_image_url")
            return await self._decoded(image_worker.DATA_URL, url.encode("ascii"), param)
        if scheme in ("http", "https"):
            return await self._decoded(image_worker.BYTES, await self._hosts.fetch(url, param), param)
        raise _error(
            param, "must be a data: URL (data:image/png;base64,…) or an http(s) URL", "invalid_image_url"
        )

    async def close(self) -> None:
        """Cancel the decoding of images and end the worker processes."""
        for task in list(self._decoding):
            task.cancel()
        await asyncio.gather(*self._decoding, return_exceptions=True)
        await asyncio.gather(*(process.stop() for process in self._processes))

    async def _decoded(self, kind: bytes, encoded: bytes, param: str) -> LoadedImage:
        """Return the decoded image from the cache, or decode it; errors become ApiError."""
        key = await asyncio.to_thread(_digest, kind, encoded)
        cached = self._cache.get(key)
        if cached is not None:
            self._cache.move_to_end(key)
            self.n_cache_hits += 1
            return cached
        try:
            image = await self._decode(kind, encoded)
        except TooLargeError as error:
            raise _error(param, f"{line_of(error)}; send a smaller one", "image_too_large") from error
        except NoWorkerError as error:
            raise ApiError(
                503,
                f"{param}: {line_of(error)}; try again later",
                "server_error",
                param,
                "image_process_unavailable",
                {"Retry-After": "1"},
            ) from error
        except QwenVLError as error:
            hint = "check that it is a whole PNG, JPEG or WebP image"
            raise _error(param, f"{line_of(error)}; {hint}", "invalid_image") from error
        self._add_to_cache(key, image)
        return image

    async def _decode(self, kind: bytes, encoded: bytes) -> LoadedImage:
        if self._idle_processes is None:
            self._idle_processes = asyncio.LifoQueue()
            for process in self._processes:
                self._idle_processes.put_nowait(process)
        idle_processes = self._idle_processes
        process = await idle_processes.get()
        task = asyncio.ensure_future(process.decode(kind, encoded))
        self._decoding.add(task)

        def on_done(task: asyncio.Task[LoadedImage]) -> None:
            self._decoding.discard(task)
            idle_processes.put_nowait(process)
            if not task.cancelled():
                task.exception()  # read, so that asyncio does not log it if the request was cancelled

        task.add_done_callback(on_done)
        return await asyncio.shield(task)

    def _add_to_cache(self, key: bytes, image: LoadedImage) -> None:
        """Add an image; drop the least recently used ones beyond the limit."""
        if key not in self._cache:
            self._cache[key] = image
            self._cached_bytes += image.pixels.nbytes
        while self._cached_bytes > _CACHE_BYTES:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.pixels.nbytes


def _digest(kind: bytes, encoded: bytes) -> bytes:
    digest = hashlib.sha256(kind)
    digest.update(encoded)  # releases the GIL
    return digest.digest()


def _error(param: str, message: str, code: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code=code)
