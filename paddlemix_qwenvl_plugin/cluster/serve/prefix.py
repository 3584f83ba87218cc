"""Prefix of a request, which decides on its replica."""

from __future__ import annotations

import hashlib

import numpy as np

from paddlemix_qwenvl_plugin.serve.engine_api import EngineRequest


def prefix_of(request: EngineRequest, image_end: int) -> str:
    """Digest of the beginning that requests share: the prompt through its last image in the first turn.

    Without an image in the first turn: all of the first turn. Later turns of a conversation contain the first one, and
    different questions about an image have the same beginning, so all of these have the same digest.

    Args:
        image_end: token that ends an image's slots.
    """
    first_turn = list(request.prompt[: request.generated[0][0] if request.generated else None])
    ends = [index for index, token in enumerate(first_turn) if token == image_end]
    beginning = first_turn[: ends[-1] + 1] if ends else first_turn
    digest = hashlib.blake2b(repr(request.adapter).encode(), digest_size=16)
    digest.update(np.asarray(beginning, np.int64).tobytes())
    for image in request.images[: len(ends)]:
        digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()
