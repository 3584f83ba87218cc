"""Routing key of a request: a digest of its adapter and of the beginning of its prompt."""

from __future__ import annotations

import hashlib

import numpy as np

from paddlemix_qwenvl_plugin.serve.engine_api import EngineRequest


def prefix_of(request: EngineRequest, image_end: int) -> str:
    """Compute a digest of a request's adapter and of its prompt up to the last image of the first turn.

    If the first turn has no image, all of the prompt before the first answer counts. All turns of a conversation have
    the same digest, and so have requests whose adapter, prompt and images are the same up to the last image of the
    first turn, such as other questions about the same image.

    Args:
        image_end: id of the token after an image's slots.
    """
    # The first turn without its answer, which is the first generated range of the prompt.
    first_turn = list(request.prompt[: request.generated[0][0] if request.generated else None])
    image_ends = [index for index, token in enumerate(first_turn) if token == image_end]
    beginning = first_turn[: image_ends[-1] + 1] if image_ends else first_turn
    digest = hashlib.blake2b(repr(request.adapter).encode(), digest_size=16)
    digest.update(np.asarray(beginning, np.int64).tobytes())
    for image in request.images[: len(image_ends)]:
        digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()
