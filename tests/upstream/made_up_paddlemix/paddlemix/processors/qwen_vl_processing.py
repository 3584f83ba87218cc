"""Fake of PaddleMIX's module of this name: the processor for queries, with this project's tokenizer."""

from __future__ import annotations

import numpy as np
import paddle

from paddlemix_qwenvl_plugin.processing.images import load_image, preprocess
from paddlemix_qwenvl_plugin.processing.prompts import base_prompt


class ImageProcessor:
    image_size = (448, 448)

    def __call__(self, paths):
        return paddle.to_tensor(
            np.stack([preprocess(load_image(path), self.image_size[0]) for path in paths])
        )


class QwenVLProcessor:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.tokenizer.picture_label = "Picture {}:"  # as PaddleMIX writes it
        self.image_processor = ImageProcessor()

    def __call__(self, query, return_tensors):
        prompt = base_prompt(self.tokenizer, query)
        images = self.image_processor(prompt.images) if prompt.images else None
        return {"input_ids": paddle.to_tensor([prompt.input_ids]), "images": images}
