"""Image worker as a child process of the front."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process
from typing import Optional

import numpy as np

from paddlemix_qwenvl_plugin.serve import image_worker
from paddlemix_qwenvl_plugin.serve.service import LoadedImage
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, TooLargeError

# Timeout from a worker's start, with its imports, to its frame READY.
_START_SECONDS = 60.0
# Number of images after which the process is replaced: this frees memory that a decoder leaks.
_MAX_IMAGES = 1000
# Maximum payload of a frame other than IMAGE: an error message, or READY's empty payload.
_MAX_MESSAGE_BYTES = 16 * 1024
# No additional threads in a worker, and one malloc arena: threads and arenas would count against the memory limit.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


class NoWorkerError(QwenVLError):
    """The image worker process cannot be started."""


class ImageProcess:
    """Worker process that decodes one image at a time; started on demand, killed on timeout."""

    def __init__(self, image_size: int, max_bytes: int, max_pixels: int, timeout_seconds: float) -> None:
        """Set the limits; see ImageLimits. The timeout applies to the decoding of each image."""
        self._image_size = image_size
        self._arguments = [str(image_size), str(max_bytes), str(max_pixels)]
        self._timeout_seconds = timeout_seconds
        self._process: Optional[Process] = None
        self._n_images = 0

    @property
    def pid(self) -> Optional[int]:
        """Process id; None while no process runs."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the process, unless one runs that has not reached its maximum of images.

        Raises:
            NoWorkerError: the process does not start.
        """
        if self._process is not None and self._process.returncode is None and self._n_images < _MAX_IMAGES:
            return
        await self.stop()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", image_worker.__name__, *self._arguments),
                stdin=PIPE,
                stdout=PIPE,
                env={**os.environ, **_ENVIRONMENT},
            )
            self._n_images = 0
            kind, _ = await asyncio.wait_for(self._read_frame(), _START_SECONDS)
            if kind != image_worker.READY:
                raise EOFError
        except (OSError, EOFError, asyncio.TimeoutError) as error:
            await self.stop()
            raise NoWorkerError("an image worker process does not start") from error
        except BaseException:
            await self.stop()
            raise

    async def decode(self, kind: bytes, encoded: bytes) -> LoadedImage:
        """Decode an encoded image (kind BYTES) or a data: URL (kind DATA_URL).

        Raises:
            TooLargeError: bytes, pixels, memory or time over the limit.
            NoWorkerError: see `start`.
            QwenVLError: not a valid image, or the process ended while decoding it.
        """
        await self.start()
        self._n_images += 1
        try:
            reply, payload = await asyncio.wait_for(self._request(kind, encoded), self._timeout_seconds)
        except asyncio.TimeoutError:
            await self.stop()
            message = f"decoding the image takes more than {self._timeout_seconds:g} seconds"
            raise TooLargeError(message) from None
        except (EOFError, ConnectionError):
            await self.stop()
            message = (
                "the process that decoded the image ended: the image is damaged or needs too much memory"
            )
            raise QwenVLError(message) from None
        except BaseException:
            await self.stop()
            raise
        if reply == image_worker.IMAGE:
            pixels = np.frombuffer(payload, np.uint8, offset=image_worker.SIZE.size)
            shape = (self._image_size, self._image_size, 3)
            return LoadedImage(pixels.reshape(shape), image_worker.SIZE.unpack_from(payload))
        message = payload.decode("utf-8", "replace")
        raise TooLargeError(message) if reply == image_worker.TOO_LARGE else QwenVLError(message)

    async def stop(self) -> None:
        """Kill the process and wait for its exit."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def _request(self, kind: bytes, encoded: bytes) -> tuple[bytes, bytes]:
        """Send a request; return the kind and payload of the reply."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(image_worker.HEADER.pack(kind, len(encoded)))
        self._process.stdin.write(encoded)
        await self._process.stdin.drain()
        return await self._read_frame()

    async def _read_frame(self) -> tuple[bytes, bytes]:
        """Read a frame's kind and payload; EOFError at the end of the stream or for an invalid frame."""
        assert self._process is not None
        assert self._process.stdout is not None
        header = await self._process.stdout.readexactly(image_worker.HEADER.size)
        kind, n_bytes = image_worker.HEADER.unpack(header)
        if kind == image_worker.IMAGE:
            valid = n_bytes == image_worker.SIZE.size + self._image_size**2 * 3
        else:
            valid = n_bytes <= _MAX_MESSAGE_BYTES
        if not valid:
            raise EOFError
        return kind, await self._process.stdout.readexactly(n_bytes)
