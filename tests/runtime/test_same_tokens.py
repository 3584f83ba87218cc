"""The same tokens in any batch, on the engine, with every storage type; and a soak test."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, Optional

import pytest
from asked import Asked
from engines import DEVICE, needs_compiler
from executors import without_cache
from soak import soak

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL, export_language, export_vision
from paddlemix_qwenvl_plugin.demo.run import MODEL
from paddlemix_qwenvl_plugin.runtime.engine_executor import EngineExecutor
from paddlemix_qwenvl_plugin.runtime.loop import Loop

pytestmark = needs_compiler

STORAGE = [
    ("float32", None),
    ("bfloat16", None),
    ("float16", None),
    ("bfloat16", "weight_only_int8"),
    ("bfloat16", "weight_only_int4"),
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Optional[str]], QwenVL]:
    """The demo model in the given storage types."""
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


def alone(vl: QwenVL, asked: Asked) -> list[int]:
    """The answer on a separate loop, without cached content."""
    without_cache(vl)
    return asked.start(vl).finish().token_ids


def small_steps(executor: EngineExecutor, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(executor, "limits", dataclasses.replace(executor.limits, step_tokens=tokens))


@pytest.mark.parametrize(("dtype", "quant_type"), STORAGE)
def test_alone_in_a_batch_cut_and_after_a_hit(opened, monkeypatch, dtype, quant_type):
    vl = opened(dtype, quant_type)
    rng = random.Random(dtype)
    asked = [Asked(vl, rng) for _ in range(64)]
    expected = [alone(vl, each) for each in asked[:20]]
    assert len({tuple(tokens) for tokens in expected}) > 10

    executor = vl._loop._executor
    for step_tokens in (512, 96, 71):
        small_steps(executor, monkeypatch, step_tokens)
        without_cache(vl)
        streams = (each.start(vl) for each in asked)
        together = [answer.token_ids for answer in vl.finish_all(streams, 64)]
        assert together[:20] == expected
        again = [each.start(vl) for each in asked[:20]]
        assert [stream.finish().token_ids for stream in again] == expected
        assert sum(stream._generation.n_cached for stream in again) > 500


def test_one_step_ahead(opened, monkeypatch):
    """A step starts before the tokens of the previous one are read, as on a GPU."""
    vl = opened("float32", None)
    rng = random.Random(4)
    asked = [Asked(vl, rng) for _ in range(24)]
    expected = [alone(vl, each) for each in asked]
    executor = EngineExecutor(*vl._stages, ahead=True)
    start, n_ahead = executor.start, []
    monkeypatch.setattr(executor, "start", lambda chunks: n_ahead.append(chunks[0].ahead) or start(chunks))
    for window in (1, 5, 24):
        monkeypatch.setattr(vl, "_loop", Loop(executor))
        streams = (each.start(vl) for each in asked)
        assert [answer.token_ids for answer in vl.finish_all(streams, window)] == expected
    assert sum(n_ahead) > len(n_ahead) / 3


@pytest.mark.parametrize(("dtype", "quant_type"), STORAGE)
def test_after_a_preemption(opened, monkeypatch, dtype, quant_type):
    """In a pool of one context, in which requests preempt each other."""
    vl = opened(dtype, quant_type)
    rng = random.Random(1)
    asked = [Asked(vl, rng, most_new=90, with_image=0) for _ in range(24)]
    expected = [alone(vl, each) for each in asked]
    context = vl.config.max_position_embeddings
    n_blocks = context // 32
    small = EngineExecutor(*vl._stages, n_blocks=n_blocks)
    monkeypatch.setattr(vl, "_loop", Loop(small))
    # All but a few blocks are allocated, without a request.
    held = [vl._loop._scheduler.pool.allocate() for _ in range(n_blocks - 8)]
    preempted = []
    preempt = vl._loop._scheduler._preempt
    monkeypatch.setattr(
        vl._loop._scheduler, "_preempt", lambda each: (preempted.append(len(each.tokens)), preempt(each))
    )
    streams = (each.start(vl) for each in asked)
    assert [answer.token_ids for answer in vl.finish_all(streams, 24)] == expected
    assert any(preempted), "some lost their blocks with tokens generated"
    vl._loop._scheduler.pool.release(held)


def test_after_an_interrupted_step(opened, monkeypatch):
    """Ctrl-C after the engine picked a token that is then discarded: penalties count generated tokens only."""
    vl = opened("float32", None)
    rng = random.Random(2)
    asked = next(each for each in iter(lambda: Asked(vl, rng), None) if each.options.repetition_penalty > 1)
    asked.stop, asked.options = [], GenerationOptions(max_new_tokens=12, repetition_penalty=1.4)
    expected = alone(vl, asked)
    stream = asked.start(vl).submit()
    executor = vl._loop._executor
    start, n_steps = executor.start, iter(range(99))

    def interrupted(chunks):
        picked = start(chunks)
        if next(n_steps) % 3 == 2:
            raise KeyboardInterrupt
        return picked

    monkeypatch.setattr(executor, "start", interrupted)
    tokens = []
    while not stream.done:
        try:
            vl._loop.step()
        except KeyboardInterrupt:
            tokens.append(len(stream._generation.tokens))
    assert len(tokens) > 2
    assert stream._generation.tokens == expected


def test_soak(opened, monkeypatch):
    """Hundreds of random requests, chunked, cancelled, cached and preempted: answers as alone, and constant memory.

    `python benchmarks/soak.py` runs 10,000 of them.
    """
    report = soak(opened("bfloat16", "weight_only_int8"), monkeypatch, 400)
    assert report.preempted > 5
    assert report.cancelled > 5
    assert report.cached_tokens > 1000
    assert report.grown_bytes < 16 * 2**20
