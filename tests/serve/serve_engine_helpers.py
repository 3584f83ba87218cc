"""Engine client of the demo model, random requests, and QwenVL's own answers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL
from paddlemix_qwenvl_plugin.processing.images import normalise
from paddlemix_qwenvl_plugin.processing.prompts import Prompt
from paddlemix_qwenvl_plugin.runtime.generation import ImageInput
from paddlemix_qwenvl_plugin.serve.engine_api import EngineRequest, ModelSettings, TokenStream
from paddlemix_qwenvl_plugin.serve.engine_client import ProcessEngineClient

# Longer than anything takes on a busy machine.
PATIENCE = 120.0


def settings_of(stages: tuple[Path, Path]) -> ModelSettings:
    return ModelSettings(*stages)


def with_engine(stages: tuple[Path, Path], use: Callable[[ProcessEngineClient], Awaitable[Any]]) -> Any:
    """Run `use` with a started client, and stop the client afterwards."""

    async def run() -> Any:
        client = ProcessEngineClient(settings_of(stages))
        await client.start()
        try:
            return await asyncio.wait_for(use(client), PATIENCE)
        finally:
            await client.stop()

    return asyncio.run(run())


async def until(true: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never became so"
        await asyncio.sleep(0.01)


async def read(stream: TokenStream) -> list[int]:
    """The ids of all tokens."""
    return [token.id async for tokens in stream for token in tokens]


def running(pid: int) -> bool:
    """Whether a process runs and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"


@dataclass
class RequestCase:
    """Request of the front, with the completion that QwenVL generates for it."""

    request: EngineRequest

    @classmethod
    def at_random(cls, vl: QwenVL, rng: random.Random, n_logprobs: Optional[int] = None) -> RequestCase:
        """Random request; few prefixes, so that many share them; some with an image, an earlier answer, sampling."""
        vision = vl.config.visual
        ids = [rng.randrange(3) for _ in range(rng.randrange(1, 90))]
        images, generated = [], []
        if rng.random() < 0.4:
            side = vision.image_size
            seed = rng.randrange(3)
            images.append(np.random.default_rng(seed).integers(0, 256, [side, side, 3]).astype(np.uint8))
            slots = [vision.image_start_id + 2] * vision.n_queries
            ids += [vision.image_start_id, *slots, vision.image_start_id + 1]
        if rng.random() < 0.3:
            start = len(ids)
            ids += [rng.randrange(300) for _ in range(rng.randrange(1, 40))]
            generated.append((start, len(ids)))
        ids += [rng.randrange(300) for _ in range(rng.randrange(1, 50))]
        sampled = {"temperature": 1.3, "top_p": 0.9, "seed": rng.randrange(99)}
        chosen = rng.choice([{}, sampled, {"top_k": 5, "seed": 3}, {**sampled, "presence_penalty": 0.3}])
        options = GenerationOptions(max_new_tokens=rng.randrange(1, 60), **chosen)
        stop = [vl.tokenizer.eod_id] if rng.random() < 0.4 else []
        return cls(EngineRequest(ids, images, stop, options, generated, n_logprobs))

    def expected_ids(self, vl: QwenVL) -> list[int]:
        """QwenVL's answer, with its own preprocessing of the pixels."""
        asked = self.request
        images = [ImageInput.of(normalise(image)) for image in asked.images]
        prompt = Prompt(list(asked.prompt), [], list(asked.generated))
        return vl.start(prompt, images, asked.stop_token_ids, asked.options, None).finish().token_ids


def words(n: int = 400, seed: int = 1) -> EngineRequest:
    """A request that generates n tokens."""
    return EngineRequest([seed, 20, 30], [], [], GenerationOptions(max_new_tokens=n))
