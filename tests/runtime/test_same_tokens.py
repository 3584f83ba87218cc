"""The same tokens in any batch, on the engine, with each storage type of an export without GPTQ or AWQ; a soak test.

With QWENVL_TEST_DEVICE=gpu on a GPU.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, Optional

import pytest
from engines import DEVICE, needs_compiler
from executors import without_cache
from random_requests import RandomRequest
from soak import soak

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL, export_language, export_vision
from paddlemix_qwenvl_plugin.demo.run import MODEL
from paddlemix_qwenvl_plugin.runtime.engine_executor import EngineExecutor
from paddlemix_qwenvl_plugin.runtime.loop import Loop

pytestmark = needs_compiler

# (dtype, quant_type) of an export.
STORAGE = [
    ("float32", None),
    ("bfloat16", None),
    ("float16", None),
    ("bfloat16", "weight_only_int8"),
    ("bfloat16", "weight_only_int4"),
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Optional[str]], QwenVL]:
    """Function that opens the demo model, exported with a dtype and a quant_type; each combination only once."""
    models: dict[Any, QwenVL] = {}

    def get(dtype: str, quant_type: Optional[str]) -> QwenVL:
        if (dtype, quant_type) not in models:
            folder = tmp_path_factory.mktemp("same")
            export_vision(MODEL, folder / "vision", dtype, engine="fused")
            export_language(MODEL, folder, "qwen", dtype, engine="fused", quant_type=quant_type)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("QWENVL_ENGINE", "fused")
                models[dtype, quant_type] = QwenVL.from_exported(
                    folder / "vision", folder / "qwen", device=DEVICE
                )
                models[dtype, quant_type].load()
        return models[dtype, quant_type]

    return get


def alone(vl: QwenVL, request: RandomRequest) -> list[int]:
    """The completion on a new loop, without cached content."""
    without_cache(vl)
    return request.start(vl).finish().token_ids


def set_step_tokens(executor: EngineExecutor, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(executor, "limits", dataclasses.replace(executor.limits, step_tokens=tokens))


@pytest.mark.parametrize(("dtype", "quant_type"), STORAGE)
def test_same_tokens_alone_batched_chunked_and_cached(opened, monkeypatch, dtype, quant_type):
    """Alone; in a batch of 64, with steps of three sizes, which chunk prompts; and again, with prefixes in the cache.

    The first 20 completions of the 64 are compared, and repeated one by one.
    """
    vl = opened(dtype, quant_type)
    rng = random.Random(dtype)
    requests = [RandomRequest(vl, rng) for _ in range(64)]
    expected = [alone(vl, request) for request in requests[:20]]
    assert len({tuple(tokens) for tokens in expected}) > 10

    executor = vl._loop._executor
    for step_tokens in (512, 96, 71):
        set_step_tokens(executor, monkeypatch, step_tokens)
        without_cache(vl)
        streams = (request.start(vl) for request in requests)
        together = [answer.token_ids for answer in vl.finish_all(streams, 64)]
        assert together[:20] == expected
        again = [request.start(vl) for request in requests[:20]]
        assert [stream.finish().token_ids for stream in again] == expected
        assert sum(stream._generation.n_cached for stream in again) > 500


def test_one_step_ahead(opened, monkeypatch):
    """A step starts before the tokens of the previous one are read, as on a GPU."""
    vl = opened("float32", None)
    rng = random.Random(4)
    requests = [RandomRequest(vl, rng) for _ in range(24)]
    expected = [alone(vl, request) for request in requests]
    executor = EngineExecutor(*vl._stages, ahead=True)
    start, ahead = executor.start, []

    def record_ahead(chunks):
        ahead.append(chunks[0].ahead)
        return start(chunks)

    monkeypatch.setattr(executor, "start", record_ahead)
    for window in (1, 5, 24):
        monkeypatch.setattr(vl, "_loop", Loop(executor))
        streams = (request.start(vl) for request in requests)
        assert [answer.token_ids for answer in vl.finish_all(streams, window)] == expected
    assert sum(ahead) > len(ahead) / 3


@pytest.mark.parametrize(("dtype", "quant_type"), STORAGE)
def test_after_a_preemption(opened, monkeypatch, dtype, quant_type):
    """With so few blocks that requests preempt each other."""
    vl = opened(dtype, quant_type)
    rng = random.Random(1)
    requests = [RandomRequest(vl, rng, max_new_below=90, image_probability=0) for _ in range(24)]
    expected = [alone(vl, request) for request in requests]
    context = vl.config.max_position_embeddings
    n_blocks = context // 32
    executor = EngineExecutor(*vl._stages, n_blocks=n_blocks)
    monkeypatch.setattr(vl, "_loop", Loop(executor))
    # A KV cache has at least the blocks of a full context; all but 8 are taken away from the requests.
    held = [vl._loop._scheduler.pool.allocate() for _ in range(n_blocks - 8)]
    preempted = []  # number of generated tokens at each preemption
    preempt = vl._loop._scheduler._preempt

    def record_preemption(generation):
        preempted.append(len(generation.tokens))
        preempt(generation)

    monkeypatch.setattr(vl._loop._scheduler, "_preempt", record_preemption)
    streams = (request.start(vl) for request in requests)
    assert [answer.token_ids for answer in vl.finish_all(streams, 24)] == expected
    assert any(preempted), "no request was preempted after it had generated tokens"
    vl._loop._scheduler.pool.release(held)


def test_after_an_interrupted_step(opened, monkeypatch):
    """Ctrl-C discards a token that the engine has picked: penalties do not count it."""
    vl = opened("float32", None)
    request = RandomRequest(vl, random.Random(2))
    request.stop, request.options = [], GenerationOptions(max_new_tokens=12, repetition_penalty=1.4)
    expected = alone(vl, request)
    stream = request.start(vl).submit()
    executor = vl._loop._executor
    start, n_steps = executor.start, iter(range(99))

    def interrupted(chunks):
        picked = start(chunks)
        if next(n_steps) % 3 == 2:
            raise KeyboardInterrupt
        return picked

    monkeypatch.setattr(executor, "start", interrupted)
    lengths = []  # number of tokens at each interruption
    while not stream.done:
        try:
            vl._loop.step()
        except KeyboardInterrupt:
            lengths.append(len(stream._generation.tokens))
    assert len(lengths) > 2
    assert stream._generation.tokens == expected


def test_soak(opened, monkeypatch):
    """400 random requests, chunked, cancelled, cached and preempted: answers as alone, and memory that hardly grows.

    `python benchmarks/soak.py` runs 10,000 of them.
    """
    report = soak(opened("bfloat16", "weight_only_int8"), monkeypatch, 400)
    assert report.preempted > 5
    assert report.cancelled > 5
    assert report.cached_tokens > 1000
    assert report.grown_bytes < 16 * 2**20
