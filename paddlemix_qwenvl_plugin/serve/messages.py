"""Messages between the HTTP front and the engine process: a JSON header, and bytes behind it.

On the wire: length of the header and of the bytes, uint32 little endian each, the header in UTF-8, the bytes. Both ends
are of one version and trust each other; nothing that is read is executed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.runtime.generation import Generation
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.serve.engine_api import EngineRequest, Token

_LENGTHS = struct.Struct("<II")

# Headers are written by the thousand a second, without spaces and without looking for circles.
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def pack(header: dict[str, Any], arrays: Iterable[NDArray[Any]] = ()) -> bytes:
    """A message as bytes; the arrays' own bytes follow one another."""
    encoded = _encode(header).encode()
    parts = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays]
    return b"".join([_LENGTHS.pack(len(encoded), sum(map(len, parts))), encoded, *parts])


class Unpacker:
    """Messages out of a stream of bytes that comes in pieces of any length."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Take a piece; the messages that are whole with it."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTHS.size:
            n_header, n_bytes = _LENGTHS.unpack_from(self._buffer, start)
            middle = start + _LENGTHS.size + n_header
            if len(self._buffer) < middle + n_bytes:
                break
            header = json.loads(self._buffer[middle - n_header : middle])
            yield header, bytes(self._buffer[middle : middle + n_bytes])
            start = middle + n_bytes
        del self._buffer[:start]


def pack_request(number: int, request: EngineRequest) -> bytes:
    """A request under a number of the front's choice, its images as bytes."""
    header = {
        "kind": "submit",
        "number": number,
        "prompt": list(request.prompt),
        "image_shape": request.images[0].shape if request.images else None,
        "stop_token_ids": list(request.stop_token_ids),
        "options": asdict(request.options),
        "generated": list(request.generated),
        "n_logprobs": request.n_logprobs,
    }
    return pack(header, request.images)


def unpack_request(header: dict[str, Any], content: bytes) -> EngineRequest:
    """What `pack_request` packed; the images share the memory of `content`."""
    shape = header["image_shape"]
    images = np.frombuffer(content, np.uint8).reshape(-1, *shape) if shape else ()
    return EngineRequest(
        header["prompt"],
        list(images),
        header["stop_token_ids"],
        GenerationOptions.of(header["options"]),
        [(start, end) for start, end in header["generated"]],
        header["n_logprobs"],
    )


def tokens_since(generation: Generation, n_sent: int) -> list[Any]:
    """The tokens of a request from number `n_sent` on, as they travel: ids, or [id, log probability, likeliest]."""
    tokens = generation.tokens[n_sent:]
    if generation.n_logprobs is None:
        return tokens
    return [[token, *logprobs] for token, logprobs in zip(tokens, generation.logprobs[n_sent:])]


def read_tokens(tokens: list[Any]) -> list[Token]:
    """What `tokens_since` gave."""
    return [
        Token(each) if isinstance(each, int) else Token(each[0], each[1], tuple(map(tuple, each[2])))
        for each in tokens
    ]
