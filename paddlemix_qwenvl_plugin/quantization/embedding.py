"""Hidden states before the first layer: token embeddings, with image features in the image slots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.dtypes import to_float32
from paddlemix_qwenvl_plugin.modeling.weights import load_vision
from paddlemix_qwenvl_plugin.processing.images import preprocess
from paddlemix_qwenvl_plugin.quantization.rows import CalibrationRow, CalibrationRows
from paddlemix_qwenvl_plugin.util.progress import track


def embed(checkpoint: Checkpoint, rows: CalibrationRows) -> Iterator[NDArray[np.float32]]:
    """Yield the embeddings of each row, float32 [tokens, hidden].

    Peak memory: first the embedding table in its storage type; then, in float32, the table's vectors of the tokens in
    use and the vision stage.
    """
    spec = checkpoint.language["wte.weight"]
    ((_, table),) = checkpoint.tensors({"wte.weight": spec}, checkpoint.dtype)
    tokens = sorted({token for row in rows.rows for token in row.input_ids})
    row_of = {token: number for number, token in enumerate(tokens)}
    embeddings = to_float32(table[tokens], checkpoint.dtype)
    del table
    size = checkpoint.config.visual.image_size
    vision: Any = load_vision(checkpoint) if any(row.images for row in rows.rows) else None

    def features(row: CalibrationRow) -> Iterator[NDArray[np.float32]]:
        for image in rows.images(row):
            with paddle.no_grad():
                yield vision(paddle.to_tensor(preprocess(image, size)[None])).numpy()[0]

    for row in track(rows.rows, "rows embedded", len(rows.rows)):
        states = embeddings[[row_of[token] for token in row.input_ids]]
        for (start, end), values in zip(row.spans, features(row)):  # the indices of <img> and </img>
            states[start + 1 : end] = values
        yield states
