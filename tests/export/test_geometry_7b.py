"""Export, its memory, and an answer in the geometry of the 7B model with one layer of each kind.

The weights are a short random pattern repeated: generating 3 GB of random numbers would take longer than the test.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from geometry_7b import CONFIG, write_gptq, write_model

GIB = 1024**3
FREE_GIB_NEEDED = 14

# Runs code and prints the peak resident memory above that of importing Paddle.
MEASURE = """
import re
import paddle, paddlemix_qwenvl_plugin.export.export, paddlemix_qwenvl_plugin.checkpoint.convert
from pathlib import Path
# Not ru_maxrss, which begins with that of the parent process.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
{code}
print(peak() - before)
"""


def rise_of_peak(code):
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
    """The exports and the increase of peak memory of each, in bytes."""
    folder = tmp_path_factory.mktemp("7b-exported")
    export = "from paddlemix_qwenvl_plugin.export.export import export_{0}; export_{0}"
    rises = {
        "vision": rise_of_peak(
            export.format("vision") + f"(Path({str(model)!r}), Path({str(folder / 'vision')!r}), 'float16')"
        ),
        "qwen": rise_of_peak(
            export.format("language") + f"(Path({str(model)!r}), Path({str(folder)!r}), 'qwen', 'float16')"
        ),
    }
    yield folder, rises
    shutil.rmtree(folder)


@pytest.mark.parametrize("stage", ["vision", "qwen"])
def test_export_memory(exported, stage):
    folder, rises = exported
    weights = (folder / f"{stage}.pdiparams").stat().st_size
    # Lower bound for the smaller stage: Paddle's working memory for building programs.
    assert rises[stage] <= max(1.3 * weights, 300e6), (
        f"{rises[stage] / 1e9:.2f} GB for {weights / 1e9:.2f} GB of weights"
    )


def test_convert_memory(tmp_path):
    """A model of 0.8 GB in shards of 0.1 GB: memory holds one shard, the tensor being read, and copies of it."""
    config = {
        **CONFIG,
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "num_hidden_layers": 24,
        "intermediate_size": 5504,
        "vocab_size": 40000,
        "visual": {**CONFIG["visual"], "output_dim": 1024, "image_start_id": 39000},
    }
    largest, shard = 40000 * 1024 * 2, 10**8
    source, target = str(write_model(tmp_path / "model", config, "float16")), str(tmp_path / "converted")
    rise = rise_of_peak(
        "from paddlemix_qwenvl_plugin.checkpoint.convert import convert; "
        f"convert(Path({source!r}), Path({target!r}), max_shard_bytes={shard})"
    )
    shutil.rmtree(tmp_path)
    assert rise <= shard + 3 * largest + 5e7  # read, transposed, written


def test_quantised_export_memory(tmp_path):
    """Three GPTQ blocks of the 7B geometry, in groups of 128 with act-order: memory holds one matrix at a time."""
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
    # Of 22016 x 4096 values: words, integers, their sorted copy, and the packed matrix.
    assert stored > 3.2e8
    assert rise <= 3e8


def test_answers(exported):
    """Run both graphs: image features, then tokens that depend on them."""
    folder, _ = exported
    code = f"""
import numpy as np
from paddlemix_qwenvl_plugin import QwenVL
vl = QwenVL.from_exported({str(folder / "vision")!r}, {str(folder / "qwen")!r})
pixels = np.random.default_rng(0).standard_normal((1, 3, 448, 448)).astype("float32")
features = vl.encode_images(pixels)
assert features.shape == (1, 256, 4096) and np.isfinite(features).all() and features.std() > 0
prompt = [[*[151857], *[151859] * 256, 151858, 198, 3838, 374, 419, 30]]
answers = [vl.generate_ids(prompt, f, max_new_tokens=2, eos_token_ids=()) for f in (features, features * -3)]
assert all(len(a[0]) == 2 and 0 <= min(a[0]) and max(a[0]) < 151936 for a in answers)
assert answers[0] != answers[1], answers
"""
    rise_of_peak(code)
