"""Reproducible random requests of all kinds."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL
from paddlemix_qwenvl_plugin.processing.prompts import Prompt
from paddlemix_qwenvl_plugin.runtime.generation import ImageInput


class Asked:
    """A reproducible request: a prompt, possibly with an image and an earlier answer, and options."""

    def __init__(self, vl: QwenVL, rng: random.Random, most_new: int = 40, with_image: float = 0.4) -> None:
        vision = vl.config.visual
        words = [rng.randrange(50) for _ in range(rng.randrange(1, 30))]
        self.ids, self.pixels, self.generated = list(words), [], []
        if rng.random() < with_image:
            self.pixels.append(rng.randrange(4))
            slots = [vision.image_start_id + 2] * vision.n_queries
            self.ids += [vision.image_start_id, *slots, vision.image_start_id + 1]
        if rng.random() < 0.3:
            start = len(self.ids)
            self.ids += [rng.randrange(300) for _ in range(rng.randrange(1, 40))]
            self.generated.append((start, len(self.ids)))
        self.ids += [rng.randrange(300) for _ in range(rng.randrange(1, 50))]
        sampled = {"temperature": 1.3, "top_p": 0.9, "seed": rng.randrange(99)}
        penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.3}
        chosen = rng.choice([{}, {}, sampled, {"top_k": 5, "seed": 3}, penalties, {**sampled, **penalties}])
        self.stop = [vl.tokenizer.eod_id] if rng.random() < 0.4 else []
        self.options = GenerationOptions(max_new_tokens=rng.randrange(1, most_new), **chosen)

    def start(self, vl: QwenVL) -> Any:
        side = vl.config.visual.image_size
        images = [
            ImageInput.of(np.random.default_rng(n).standard_normal([3, side, side]).astype("float32"))
            for n in self.pixels
        ]
        prompt = Prompt(self.ids, [], self.generated)
        return vl.start(prompt, images, self.stop, self.options, None)
