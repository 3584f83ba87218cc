"""The engine's operators in exported programs; `test_rows_end_independently` also tests the portable graph.

tests/runtime/test_golden_exported.py compares both with goldens.
"""

from __future__ import annotations

import gc
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import needs_compiler
from stock_inputs import stock_feed

from paddlemix_qwenvl_plugin.export.export import export_language
from paddlemix_qwenvl_plugin.runtime.programs import Stage
from paddlemix_qwenvl_plugin.tiny.make import make_tiny

# Indices of inputs of the stock program.
MIN_LENGTH, MAX_LENGTH, STOP_FLAGS, STOP_NUMS = 8, 9, 16, 21


@pytest.mark.parametrize("extension", [".json", ".pdmodel"])
def test_rows_end_independently(golden: Callable[[str], Any], engine: str, extension: str) -> None:
    """Row 0 ends at a stop token, row 1 is stopped at the start, row 2 has a limit of 3 tokens.

    A second run ends all rows after two have ended (`stop_nums`); a third one has a minimum length for row 0.
    """
    model = golden("a")
    # The fifth token of golden a does not occur before; as stop token it ends row 0 after five tokens.
    tokens = model.figures["tokens"].tolist()
    stop, n_prompt = tokens[4], model.input_ids.shape[1]
    assert stop not in tokens[:4]
    [features] = Stage(model.vision, "vision", "cpu").open()([model.images])
    features = np.concatenate([features.numpy()] * 3)
    img_pos = [[row, *span] for row in range(3) for _, *span in model.img_pos.tolist()]
    ids = np.repeat(model.input_ids, 3, axis=0)
    feed = stock_feed(model.config, ids, features, np.array(img_pos), max_new=9, stop_ids=[stop])
    feed[MAX_LENGTH][2], feed[STOP_FLAGS][1] = 3, True
    stock = Stage(f"{model.language}{extension}", "language", "cpu").open()

    def run() -> list[np.ndarray]:
        return [output.numpy() for output in stock(feed)]

    def completions(generated: np.ndarray) -> list[list[int]]:
        return [[token for token in row if token >= 0] for row in generated.tolist()]

    last, n_generated, stopped, _, position, generated = run()
    assert completions(generated) == [tokens[:5], [], tokens[:3]]
    assert n_generated.ravel().tolist() == [5, 0, 3]
    assert stopped.ravel().tolist() == [1, 1, 1]
    assert last.ravel().tolist() == [stop, 0, tokens[2]]
    assert (position.ravel() - n_prompt + 1).tolist() == [5, 0, 3]

    # With row 1, which is stopped already, and row 2, two rows have ended after three tokens.
    feed[STOP_NUMS][0] = 2
    *_, stopped, lengths, _, generated = run()
    assert completions(generated) == [tokens[:3], [], tokens[:3]]
    assert stopped.ravel().tolist() == [0, 1, 1]
    assert lengths.ravel().tolist() == [n_prompt + 2, 0, 0]

    feed[STOP_NUMS][0], feed[MIN_LENGTH][0] = 3, 6
    first, *others = completions(run()[-1])
    assert others == [[], tokens[:3]]
    assert first[:4] == tokens[:4]
    assert len(first) > 6
    assert stop not in first[:6]


@needs_compiler
def test_a_program_in_place_of_a_deleted_one(tmp_path: Path) -> None:
    """Programs opened and deleted at one path, with alternating storage types, each compute with their own weights."""
    completions = set()
    for seed in range(6):
        make_tiny(tmp_path / f"model-{seed}", seed)
        quant_type = "weight_only_int8" if seed % 2 else "weight_only_int4"
        export_language(tmp_path / f"model-{seed}", tmp_path / "text", "qwen", quant_type=quant_type)
        feed = stock_feed(
            {"num_attention_heads": 4, "kv_channels": 64, "num_hidden_layers": 2},
            np.array([[5, 6, 7, 8]]),
            np.zeros([1, 256, 256], np.float32),
            np.array([[-1, 0, 0]]),
            max_new=8,
        )
        program = Stage(tmp_path / "text" / "qwen", "language", "cpu").open()
        completions.add(tuple(program(feed)[-1].numpy().ravel().tolist()))
        del program
    assert len(completions) == 6


@needs_compiler
def test_kv_caches_are_freed(tiny_exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENVL_ENGINE", "fused")
    program = Stage(tiny_exported / "text" / "qwen", "language", "cpu").open()
    feed = stock_feed(
        {"num_attention_heads": 4, "kv_channels": 64, "num_hidden_layers": 2},
        np.arange(1000).reshape(1, -1) % 200,
        np.zeros([1, 256, 256], np.float32),
        np.array([[-1, 0, 0]]),
        max_new=2,
    )

    def resident_bytes() -> int:
        gc.collect()
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * mmap.PAGESIZE

    for _ in range(3):
        program(feed)
    before = resident_bytes()
    for _ in range(40):  # each run has a KV cache of 4 MB
        program(feed)
    assert resident_bytes() - before < 40e6


PROGRAM = """
import os, sys
from pathlib import Path
import numpy as np
import paddle
from paddlemix_qwenvl_plugin.engine import operators
from paddlemix_qwenvl_plugin.runtime import programs

operators.load()
os.environ["QWENVL_DEVICE"] = sys.argv[2]
prefix = Path(sys.argv[1])
opened = programs._create_predictor(prefix.with_suffix(".fused.json"), prefix.with_suffix(".pdiparams"), None)
try:
    opened.run([paddle.zeros([1, 3, 448, 448])])
    print("answered")
except Exception as error:
    print(programs._cause(error))
"""


@needs_compiler
@pytest.mark.parametrize(
    ("device", "pattern"),  # QWENVL_DEVICE, and a pattern of the printed line
    [
        ("", "^answered$"),
        ("cpu", "^answered$"),
        ("gpu:12345", "^QWENVL_DEVICE gpu:12345: must be cpu, gpu or gpu:N$"),
        ("gpu:", "^QWENVL_DEVICE gpu:: must be cpu, gpu or gpu:N$"),
        ("gpu", "(?i)cuda|nvidia|gpu"),  # the engine for GPUs is not loaded
        ("gpu:1", "(?i)cuda|nvidia|gpu"),
    ],
)
def test_a_program_opened_directly_in_paddle_inference(
    tiny_exported: Path, device: str, pattern: str
) -> None:
    """Without a `Stage`, which sets the device before each run, QWENVL_DEVICE sets it."""
    environment = {name: value for name, value in os.environ.items() if name != "QWENVL_DEVICE"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, tiny_exported / "vision" / "vision", device],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(pattern, result.stdout.strip().splitlines()[-1])
