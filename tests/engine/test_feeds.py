"""Inputs of the operators: a violation of the contract gives an error message, not a crash.

Also the end of an engine with its program.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import needs_compiler
from stock_inputs import stock_feed

from paddlemix_qwenvl_plugin.engine.operators import load
from paddlemix_qwenvl_plugin.runtime.programs import Program, Stage
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def programs(tiny_exported: Path) -> Iterator[dict[str, Program]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENVL_ENGINE", "fused")
        yield {
            "language": Stage(tiny_exported / "text" / "qwen", "language", "cpu").open(),
            "vision": Stage(tiny_exported / "vision" / "vision", "vision", "cpu").open(),
        }


def feed() -> list[np.ndarray]:
    """Inputs of two prompts of 300 tokens, with an image in the first one."""
    shapes = {"num_attention_heads": 4, "kv_channels": 64, "num_hidden_layers": 2}
    ids = np.arange(600).reshape(2, 300) % 200
    features = np.zeros([1, 256, 256], np.float32)
    return stock_feed(shapes, ids, features, np.array([[0, 10, 267]]), max_new=3)


def test_the_unchanged_feed_is_accepted(programs: dict[str, Program]) -> None:
    assert programs["language"](feed())[-1].shape == [2, 3]


@pytest.mark.parametrize(
    ("index", "values", "message"),  # index of the input that is replaced, and its new values
    [
        (0, np.zeros(300, np.int64), "input_ids: shape is [300]; it must be [any, any]"),
        (0, np.full([2, 300], 1 << 40, np.int64), "the vocabulary has"),
        (1, np.zeros([1, 256, 255], np.float32), "image_features: shape is [1, 256, 255]"),
        (1, np.zeros([1, 255, 256], np.float32), "image_features: shape is [1, 255, 256]"),
        (1, np.zeros([256, 256], np.float32), "image_features: shape is [256, 256]"),
        (2, np.array([[0, 10]]), "img_pos: shape is [1, 2]; it must be [any, 3]"),
        (2, np.array([[0, 10, 267], [1, 10, 267]]), "img_pos: image 1: no such row"),
        (2, np.array([[2, 10, 267]]), "img_pos: image 0: no such row"),
        (2, np.array([[0, 44, 301]]), "img_pos: image 0: does not end within its row"),
        (2, np.array([[0, (1 << 32) + 10, 0]]), "img_pos: image 0: does not end within its row"),
        (2, np.array([[0, -1, 267]]), "img_pos: image 0: does not end within its row"),
        (5, np.ones([1, 1], np.float32), "penalty_score: shape is [1, 1]; it must be [2, 1]"),
        (8, np.ones([2, 2], np.int64), "min_length: shape is [2, 2]"),
        (9, np.full([2, 1], 1 << 40, np.int64), "max_length: is 1099511627776; the model takes"),
        (10, np.ones([3, 1], np.float32), "temperature: shape is [3, 1]"),
        (10, np.full([2, 1], np.nan, np.float32), "temperature is"),
        (12, np.ones([1, 1], np.int64), "eos_token_id: shape is [1, 1]"),
        (13, np.full([2, 1], 301, np.int32), "seq_len_encoder: must be 1 to the width"),
        (13, np.full([2, 1], 200, np.int32), "ends at 267; there are 200 tokens"),
        (13, np.full([2, 1], 300, np.int64), "seq_len_encoder: is int64; it must be int32"),
        (14, np.ones([1, 1], np.int32), "seq_len_decoder: shape is [1, 1]"),
        (15, np.full([2, 1], -1, np.int64), "step_idx: is -1"),
        (16, np.zeros([5, 1], bool), "stop_flags: shape is [5, 1]"),
        (18, np.ones([1, 1], np.int64), "tgt_pos: shape is [1, 1]"),
        (21, np.ones([2], np.int64), "stop_nums: shape is [2]; it must be [1]"),
    ],
)
def test_invalid_feeds(programs: dict[str, Program], index: int, values: Any, message: str) -> None:
    corrupted = feed()
    corrupted[index] = values
    if message.startswith("temperature is"):
        corrupted[11][:] = 0.5  # top_p: the temperature of greedy rows is not checked
    with pytest.raises(QwenVLError) as error:
        programs["language"](corrupted)
    assert message in str(error.value)


@pytest.mark.parametrize("shape", [[1, 3, 448, 447], [3, 448, 448], [1, 1, 448, 448], [1, 3, 224, 224]])
def test_invalid_images(programs: dict[str, Program], shape: list[int]) -> None:
    with pytest.raises(QwenVLError, match="images: shape is"):
        programs["vision"]([np.zeros(shape, np.float32)])


def test_an_engine_is_freed_with_its_program(tiny_exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's threads end when the program is deleted, not when the next engine is created."""
    monkeypatch.setenv("QWENVL_ENGINE", "fused")

    def threads() -> int:
        gc.collect()
        return len(list(Path("/proc/self/task").iterdir()))

    load().qwenvl_set_threads(4)
    try:
        program = Stage(tiny_exported / "text" / "qwen", "language", "cpu").open()
        before = threads()
        program(feed())
        assert threads() >= before + 3  # 4 threads, one of which is the caller
        del program
        assert threads() <= before
    finally:
        load().qwenvl_set_threads(0)
