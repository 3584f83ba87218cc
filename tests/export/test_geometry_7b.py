"""Exports of models with the layer sizes of the 7B model: memory and completions. Memory of `convert` of a smaller one.

Each exported stage has one layer, the language stage of the GPTQ model three.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from geometry_7b import CONFIG, write_gptq, write_model

GIB = 1024**3
# The model and its exports, 2.9 GiB each; meanwhile, the model of test_convert_memory and its conversion, 0.8 GiB each.
FREE_GIB_NEEDED = 8

# Runs `code` and prints by how many bytes it raises the peak memory of the process. Imports come first, to be left out.
MEASURE = """
import re
import paddle, paddlemix_qwenvl_plugin.export.export, paddlemix_qwenvl_plugin.checkpoint.convert
from pathlib import Path
# Not ru_maxrss: it includes the peak of the parent process.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
{code}
print(peak() - before)
"""


def rise_of_peak(code):
    """By how many bytes `code` raises the peak memory of a process."""
    process = subprocess.run(
        [sys.executable, "-c", MEASURE.format(code=code)], capture_output=True, text=True, timeout=900
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return int(process.stdout.split()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("7b")
    if shutil.disk_usage(folder).free < FREE_GIB_NEEDED * GIB:
        pytest.skip(f"needs {FREE_GIB_NEEDED} GiB of free disk in {folder}; set TMPDIR to a larger one")
    write_model(folder, CONFIG, "float16")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """The folder of both exported stages, and the increase of peak memory by each export in bytes."""
    folder = tmp_path_factory.mktemp("7b-exported")
    source, target, vision = str(model), str(folder), str(folder / "vision")
    rises = {
        "vision": rise_of_peak(
            "from paddlemix_qwenvl_plugin.export.export import export_vision; "
            f"export_vision(Path({source!r}), Path({vision!r}), 'float16')"
        ),
        "qwen": rise_of_peak(
            "from paddlemix_qwenvl_plugin.export.export import export_language; "
            f"export_language(Path({source!r}), Path({target!r}), 'qwen', 'float16')"
        ),
    }
    yield folder, rises
    shutil.rmtree(folder)


@pytest.mark.parametrize("stage", ["vision", "qwen"])
def test_export_memory(exported, stage):
    """The language stage's weights are never all in memory; the vision stage has too few weights to tell."""
    folder, rises = exported
    weights = (folder / f"{stage}.pdiparams").stat().st_size
    limit = 3.6e8  # Paddle's working memory for building programs
    if stage == "qwen":
        limit += 2 * 151936 * 4096 * 2  # two copies of the largest tensor, the token embedding in float16
        assert limit < weights
    assert rises[stage] <= limit, f"{rises[stage] / 1e9:.2f} GB for {weights / 1e9:.2f} GB of weights"


def test_convert_memory(tmp_path):
    """A model of 0.8 GB in shards of 0.1 GB: only a shard, a tensor and two copies of the tensor are in memory."""
    config = {
        **CONFIG,
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "num_hidden_layers": 24,
        "intermediate_size": 5504,
        "vocab_size": 40000,
        "visual": {**CONFIG["visual"], "output_dim": 1024, "image_start_id": 39000},
    }
    largest_tensor, shard = 40000 * 1024 * 2, 10**8
    source, target = str(write_model(tmp_path / "model", config, "float16")), str(tmp_path / "converted")
    rise = rise_of_peak(
        "from paddlemix_qwenvl_plugin.checkpoint.convert import convert; "
        f"convert(Path({source!r}), Path({target!r}), max_shard_bytes={shard})"
    )
    shutil.rmtree(tmp_path)
    # The tensor as read, transposed, and written; 50 MB of room.
    assert rise <= shard + 3 * largest_tensor + 5e7


def test_quantized_export_memory(tmp_path):
    """Three GPTQ layers of the 7B sizes, with groups of 128 and act-order: only one matrix at a time is in memory."""
    config = {
        **CONFIG,
        "num_hidden_layers": 3,
        "vocab_size": 2048,
        "visual": {**CONFIG["visual"], "image_size": 56, "image_start_id": 2000, "width": 16, "heads": 2},
    }
    source = str(write_gptq(tmp_path / "model", config))
    rise = rise_of_peak(
        "from paddlemix_qwenvl_plugin.export.export import export_language; "
        f"export_language(Path({source!r}), Path({str(tmp_path / 'text')!r}), 'qwen', 'float16')"
    )
    stored = (tmp_path / "text" / "qwen.pdiparams").stat().st_size
    shutil.rmtree(tmp_path)
    # More than the limit below: the process cannot have had all weights in memory.
    assert stored > 3.2e8
    # The largest matrix, of 12288 x 4096 values, is in memory four times: as int32 words, as integers, as sorted
    # integers, and packed for the engine. Together these take 3 bytes for each value, 1.5e8 in all. The rest of the
    # limit is room for Paddle's working memory.
    assert rise <= 3e8


def test_completions(exported):
    """Run both stages: image features, then completions that depend on them."""
    folder, _ = exported
    code = f"""
import numpy as np
from paddlemix_qwenvl_plugin import QwenVL
vl = QwenVL.from_exported({str(folder / "vision")!r}, {str(folder / "qwen")!r})
pixels = np.random.default_rng(0).standard_normal((1, 3, 448, 448)).astype("float32")
features = vl.encode_images(pixels)
assert features.shape == (1, 256, 4096) and np.isfinite(features).all() and features.std() > 0
prompt = [[*[151857], *[151859] * 256, 151858, 198, 3838, 374, 419, 30]]
first = vl.generate_ids(prompt, features, max_new_tokens=2, eos_token_ids=())[0]
second = vl.generate_ids(prompt, features * -3, max_new_tokens=2, eos_token_ids=())[0]
for tokens in (first, second):
    assert len(tokens) == 2 and all(0 <= token < 151936 for token in tokens)
assert first != second, first
"""
    rise_of_peak(code)  # as a process of its own; its memory is not compared
