"""Image worker process, which decodes images for the front: `python -m … IMAGE_SIZE MAX_BYTES MAX_PIXELS`.

Images are untrusted: one may be a decompression bomb, crash a decoder or make it loop. On Linux, this module limits the
memory; the front limits the time and kills the process. This module imports Pillow and NumPy, but neither Paddle nor
the front's libraries.

A frame is a kind (1 byte), the length of its payload (uint32, big-endian) and the payload. Requests are encoded images
(BYTES) and data: URLs in ASCII (DATA_URL). The worker first sends READY. It then answers each request with an IMAGE,
whose payload is the width and height before resizing, of the upright image (uint32 each), and the resized pixels (uint8
RGB), or with an error message in UTF-8 (TOO_LARGE or INVALID).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from paddlemix_qwenvl_plugin.processing.images import ImageLimits, load_image, resize
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, TooLargeError, UsageError, line_of

HEADER = struct.Struct(">cI")  # kind and length of the payload
SIZE = struct.Struct(">II")  # width and height
BYTES, DATA_URL = b"B", b"U"
READY, IMAGE, TOO_LARGE, INVALID = b"R", b"I", b"L", b"X"

# Terms of the memory limit, with a margin. Measured bytes per pixel while decoding: 12 for JPEG and PNG, 16 for AVIF,
# 20 for WebP, 23 for JPEG 2000 without transparency. The encoded image exists several times: as the bytes and the text
# of a data: URL, and decoded from base64.
_BYTES_PER_PIXEL = 32
_COPIES_OF_ENCODED = 6
_BASE_BYTES = 128 * 2**20
_MAX_OPEN_FILES = 16

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Answer the requests on standard input until it ends."""
    _end_with_parent()
    image_size, max_bytes, max_pixels = (int(argument) for argument in sys.argv[1:4])
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # stdout becomes stderr: a library that prints must not write into a frame
    _limit_resources(max_bytes, max_pixels)
    limits = ImageLimits(max_bytes, max_pixels)
    _write(replies, READY, b"")
    while header := requests.read(HEADER.size):
        kind, n_bytes = HEADER.unpack(header)
        _write(replies, *_answer(kind, requests.read(n_bytes), image_size, limits))


def _answer(kind: bytes, payload: bytes, image_size: int, limits: ImageLimits) -> tuple[bytes, bytes]:
    """Decode a request; return the kind and payload of the reply."""
    try:
        size, pixels = _decode(kind, payload, image_size, limits)
    except TooLargeError as error:
        return TOO_LARGE, line_of(error).encode()
    except MemoryError:
        return TOO_LARGE, b"image: out of memory"
    except QwenVLError as error:
        return INVALID, line_of(error).encode()
    return IMAGE, SIZE.pack(*size) + pixels.tobytes()


def _decode(
    kind: bytes, payload: bytes, image_size: int, limits: ImageLimits
) -> tuple[tuple[int, int], NDArray[np.uint8]]:
    """Decode an image; return the upright image's (width, height), and its pixels resized to the model's input size."""
    if kind == BYTES:
        image = load_image(payload, limits=limits)
    else:
        url = payload.decode("ascii")
        if kind != DATA_URL or url[:5].lower() != "data:":  # load_image would take other text as a path
            raise UsageError("not a data: URL")
        image = load_image(url, limits=limits)
    return image.size, resize(image, image_size)


def _write(file: BinaryIO, kind: bytes, payload: bytes) -> None:
    file.write(HEADER.pack(kind, len(payload)) + payload)
    file.flush()


def _end_with_parent() -> None:
    """On Linux, die with the front even while decoding; elsewhere the end of standard input ends the process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the front handles them, and kills the workers at its end
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_resources(max_bytes: int, max_pixels: int) -> None:
    """Forbid core dumps and writing to files, limit open files and, on Linux, the memory beyond that of the imports."""
    Image.init()  # imports Pillow's plugins for all formats
    if features.check("avif"):
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # parallelism comes from the number of worker processes
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
    ):
        resource.setrlimit(kind, (value, value))  # soft and hard limit
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # first victim of the OOM killer
        # The address space in use: the first field of statm, in pages.
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = in_use + _BYTES_PER_PIXEL * max_pixels + _COPIES_OF_ENCODED * max_bytes + _BASE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
