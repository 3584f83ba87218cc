"""Messages between the engine process and its parent: a JSON header followed by bytes.

The parent is the HTTP front, or an engine replica on a Ray cluster. Both processes have the same version and trust each
other; no received data is executed.

Wire format of a message: the lengths of header and bytes (uint32, little-endian), the header in UTF-8, the bytes.

The first message has the settings of the model. All later ones have a `kind`: `submit` and `cancel` to the engine
process; `ready`, `step`, `statistics` and `broken` from it (engine_process.py).
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

# Encoder for thousands of headers a second: writes no spaces and does not check for circular references.
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def pack(header: dict[str, Any], arrays: Iterable[NDArray[Any]] = ()) -> bytes:
    """Encode a message; the bytes of the arrays are concatenated."""
    encoded_header = _encode(header).encode()
    buffers = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays]
    lengths = _LENGTHS.pack(len(encoded_header), sum(map(len, buffers)))
    return b"".join([lengths, encoded_header, *buffers])


class Unpacker:
    """Incremental decoder of messages from chunks of a byte stream."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Add a chunk; yield the (header, bytes) of each message that it completes.

        Iterate to the end: only then are the messages removed.
        """
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTHS.size:
            n_header, n_bytes = _LENGTHS.unpack_from(self._buffer, start)
            header_end = start + _LENGTHS.size + n_header
            end = header_end + n_bytes
            if len(self._buffer) < end:
                break
            header = json.loads(self._buffer[header_end - n_header : header_end])
            yield header, bytes(self._buffer[header_end:end])
            start = end
        del self._buffer[:start]


def pack_request(number: int, request: EngineRequest) -> bytes:
    """Encode a request, with its images as bytes; the parent chooses `number`, which the replies repeat.

    All images have the same shape, the model's.
    """
    header = {
        "kind": "submit",
        "number": number,
        "prompt": list(request.prompt),
        "image_shape": request.images[0].shape if request.images else None,
        "stop_token_ids": list(request.stop_token_ids),
        "options": asdict(request.options),
        "generated": list(request.generated),
        "n_logprobs": request.n_logprobs,
        "adapter": request.adapter,
    }
    return pack(header, request.images)


def unpack_request(header: dict[str, Any], content: bytes) -> EngineRequest:
    """Decode a request of `pack_request`; the images share the memory of `content`."""
    shape = header["image_shape"]
    images = np.frombuffer(content, np.uint8).reshape(-1, *shape) if shape else ()
    return EngineRequest(
        header["prompt"],
        list(images),
        header["stop_token_ids"],
        GenerationOptions.of(header["options"]),
        [(start, end) for start, end in header["generated"]],
        header["n_logprobs"],
        header["adapter"],
    )


def encode_tokens(generation: Generation, n_sent: int) -> list[Any]:
    """Encode the tokens from index `n_sent` on: token ids, or with log probabilities [id, log probability, top]."""
    tokens = generation.tokens[n_sent:]
    if generation.n_logprobs is None:
        return tokens
    return [[token_id, *logprobs] for token_id, logprobs in zip(tokens, generation.logprobs[n_sent:])]


def decode_tokens(tokens: list[Any]) -> list[Token]:
    """Decode the tokens of `encode_tokens`."""
    return [Token(token) if isinstance(token, int) else _token_with_logprobs(*token) for token in tokens]


def _token_with_logprobs(token_id: int, logprob: float, top: list[list[Any]]) -> Token:
    return Token(token_id, logprob, tuple((other_id, other_logprob) for other_id, other_logprob in top))
