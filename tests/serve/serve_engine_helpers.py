"""Helpers for tests of the engine client: a client of the demo model, and random requests with expected tokens."""

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

# Seconds; longer than any operation takes on a busy machine.
TIMEOUT = 120.0


def model_settings(stages: tuple[Path, Path]) -> ModelSettings:
    return ModelSettings(*stages)


def run_with_client(
    stages: tuple[Path, Path], scenario: Callable[[ProcessEngineClient], Awaitable[Any]]
) -> Any:
    """Run `scenario` with a started client and stop the client afterwards."""

    async def run() -> Any:
        client = ProcessEngineClient(model_settings(stages))
        await client.start()
        try:
            return await asyncio.wait_for(scenario(client), TIMEOUT)
        finally:
            await client.stop()

    return asyncio.run(run())


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "timeout"
        await asyncio.sleep(0.01)


async def read_ids(stream: TokenStream) -> list[int]:
    """The ids of all tokens of a stream."""
    return [token.id async for tokens in stream for token in tokens]


def is_running(pid: int) -> bool:
    """Whether a process runs and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # The name of the process, in parentheses, may itself contain spaces and parentheses.
    state = stat.rsplit(")", 1)[1].split()[0]
    return state not in "ZX"  # zombie, dead


@dataclass
class RequestCase:
    """Request of the front to the engine process; `expected_ids` returns the tokens that QwenVL generates for it."""

    request: EngineRequest

    @classmethod
    def make_random(cls, vl: QwenVL, rng: random.Random, n_logprobs: Optional[int] = None) -> RequestCase:
        """Random request, sometimes with an image, an earlier answer or sampling parameters.

        A prompt begins with tokens from a vocabulary of three, and its image is one of three, so that many requests
        share a prefix.
        """
        vision = vl.config.visual
        ids = [rng.randrange(3) for _ in range(rng.randrange(1, 90))]
        images, generated = [], []
        if rng.random() < 0.4:
            shape = [vision.image_size, vision.image_size, 3]
            image_rng = np.random.default_rng(rng.randrange(3))
            images.append(image_rng.integers(0, 256, shape).astype(np.uint8))
            # The special tokens <img>, </img> and <imgpad> have consecutive ids.
            image_slots = [vision.image_start_id + 2] * vision.n_queries
            ids += [vision.image_start_id, *image_slots, vision.image_start_id + 1]
        if rng.random() < 0.3:
            start = len(ids)
            ids += [rng.randrange(300) for _ in range(rng.randrange(1, 40))]
            generated.append((start, len(ids)))
        ids += [rng.randrange(300) for _ in range(rng.randrange(1, 50))]
        sampled = {"temperature": 1.3, "top_p": 0.9, "seed": rng.randrange(99)}
        parameters = rng.choice([{}, sampled, {"top_k": 5, "seed": 3}, {**sampled, "presence_penalty": 0.3}])
        options = GenerationOptions(max_new_tokens=rng.randrange(1, 60), **parameters)
        stop = [vl.tokenizer.eod_id] if rng.random() < 0.4 else []
        return cls(EngineRequest(ids, images, stop, options, generated, n_logprobs))

    def expected_ids(self, vl: QwenVL) -> list[int]:
        """The tokens that QwenVL generates for the request in this process, from pixels normalised here."""
        request = self.request
        images = [ImageInput.of(normalise(image)) for image in request.images]
        prompt = Prompt(list(request.prompt), [], list(request.generated))
        return vl.start(prompt, images, request.stop_token_ids, request.options, None).finish().token_ids


def text_request(n_tokens: int = 400) -> EngineRequest:
    """Request without images and stop tokens, which generates exactly this number of tokens."""
    return EngineRequest([1, 20, 30], [], [], GenerationOptions(max_new_tokens=n_tokens))
