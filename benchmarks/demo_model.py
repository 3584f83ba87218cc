"""Benchmark of the demo model on the portable graph and on the engine: milliseconds per token, prompt and image.

Run: python benchmarks/demo_model.py
Needs the plugin and a C++ compiler; takes a minute. Each figure is the best of five rounds of the demo's eight
questions.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from PIL import Image

from paddlemix_qwenvl_plugin import QwenVL, export_language, export_vision
from paddlemix_qwenvl_plugin.demo.questions import QUESTIONS
from paddlemix_qwenvl_plugin.demo.run import MODEL
from paddlemix_qwenvl_plugin.demo.score import request
from paddlemix_qwenvl_plugin.runtime.loop import Loop

# (QWENVL_ENGINE, dtype, quant_type); `fused` selects the engine.
ROWS: Sequence[tuple[str, str, Optional[str]]] = (
    ("portable", "float32", None),
    ("portable", "bfloat16", None),
    ("fused", "float32", None),
    ("fused", "bfloat16", None),
    ("fused", "float16", None),
    ("fused", "bfloat16", "weight_only_int8"),
    ("fused", "bfloat16", "weight_only_int4"),
)


def main() -> None:
    images = {path: Image.open(path).convert("RGB") for question in QUESTIONS for path in question.images}
    print("| | ms per token | ms per prompt | ms per image |\n| --- | --- | --- | --- |")
    for engine, dtype, quant_type in ROWS:
        os.environ["QWENVL_ENGINE"] = engine
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            export_vision(MODEL, folder / "vision", dtype)
            export_language(MODEL, folder, "qwen", dtype, quant_type=quant_type)
            model = QwenVL.from_exported(folder / "vision", folder / "qwen")
            answer_all(model, images)  # warm-up
            rounds = [answer_all(model, images) for _ in range(5)]
        cells = " | ".join(f"{min(figures):.2f}" for figures in zip(*rounds))
        label = {"portable": "portable", "fused": "engine"}[engine]
        print(f"| {label} {quant_type or dtype} | {cells} |", flush=True)


def answer_all(model: QwenVL, images: dict[Path, Image.Image]) -> tuple[float, float, float]:
    """Answer all questions; return the milliseconds per token after the first, per prompt and per image."""
    model.load()
    model._loop = Loop(model._loop._executor)  # empty caches, so that each round encodes the images again
    n_tokens = n_prompts = n_images = 0
    seconds = dict.fromkeys(("decode", "prefill", "encode_images"), 0.0)
    for question in QUESTIONS:
        answer = model.ask(request(question.sample, [images[path] for path in question.images])).finish()
        for phase in seconds:
            seconds[phase] += answer.timings[phase]
        n_tokens += len(answer.token_ids) - 1  # prefill computes the first token
        n_prompts += 1
        n_images += len(question.images)
    decode, prefill, encode = seconds.values()
    return 1e3 * decode / n_tokens, 1e3 * prefill / n_prompts, 1e3 * encode / n_images


if __name__ == "__main__":
    main()
