"""Random requests, reproducible by their generator of random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL
from paddlemix_qwenvl_plugin.processing.prompts import Prompt
from paddlemix_qwenvl_plugin.runtime.generation import ImageInput


class RandomRequest:
    """A request drawn from `rng`: a prompt, possibly with an image and an earlier answer, and options.

    For the demo model: text ids are below 300, and have to be below the model's `image_start_id`. `image_seeds` are the
    seeds of the images' pixels, `answer_spans` the (start, end) of earlier answers in the prompt (Prompt.generated).
    """

    def __init__(
        self, vl: QwenVL, rng: random.Random, max_new_below: int = 40, image_probability: float = 0.4
    ) -> None:
        vision = vl.config.visual
        self.ids = [rng.randrange(50) for _ in range(rng.randrange(1, 30))]
        self.image_seeds: list[int] = []
        self.answer_spans: list[tuple[int, int]] = []
        if rng.random() < image_probability:
            self.image_seeds.append(rng.randrange(4))
            # The special tokens <img>, </img> and <imgpad> have consecutive ids.
            slots = [vision.image_start_id + 2] * vision.n_queries
            self.ids += [vision.image_start_id, *slots, vision.image_start_id + 1]
        if rng.random() < 0.3:
            start = len(self.ids)
            self.ids += [rng.randrange(300) for _ in range(rng.randrange(1, 40))]
            self.answer_spans.append((start, len(self.ids)))
        self.ids += [rng.randrange(300) for _ in range(rng.randrange(1, 50))]
        sampled = {"temperature": 1.3, "top_p": 0.9, "seed": rng.randrange(99)}
        penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.3}
        chosen = rng.choice([{}, {}, sampled, {"top_k": 5, "seed": 3}, penalties, {**sampled, **penalties}])
        self.stop = [vl.tokenizer.eod_id] if rng.random() < 0.4 else []
        self.options = GenerationOptions(max_new_tokens=rng.randrange(1, max_new_below), **chosen)

    def start(self, vl: QwenVL) -> Any:
        side = vl.config.visual.image_size
        images = [
            ImageInput.of(np.random.default_rng(seed).standard_normal([3, side, side]).astype("float32"))
            for seed in self.image_seeds
        ]
        prompt = Prompt(self.ids, [], self.answer_spans)
        return vl.start(prompt, images, self.stop, self.options, image_size=None)
