"""Peak memory of `qwenvl quantize`: three copies of a layer and its widest inputs, and the work on their Hessian."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
from geometry_7b import CONFIG, write_model

from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.tiny.vocab import write_tiny_vocabulary

HIDDEN, MLP, LAYERS = 256, 2048, 2
# Prints by how many bytes quantization (4 bits, groups of 32) raises the peak memory of a process. A first product
# precedes the measurement, since Paddle then allocates memory that it keeps.
MEASURE = """
import re, sys
from pathlib import Path
import paddle
from paddlemix_qwenvl_plugin.quantization.job import quantize_model
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
paddle.ones([64, 64]) @ paddle.ones([64, 64])
before = peak()
quantize_model(*map(Path, sys.argv[1:3]), 4, 32, Path(sys.argv[3]))
print(peak() - before)
"""


def test_memory(tmp_path):
    write_tiny_vocabulary(tmp_path / "qwen.tiktoken")
    tokenizer = QwenTokenizer.from_folder(tmp_path)
    vision = {"image_size": 56, "width": 16, "heads": 2, "output_dim": HIDDEN, "n_queries": 64}
    config = {
        **CONFIG,
        "hidden_size": HIDDEN,
        "num_attention_heads": HIDDEN // 128,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 2 * MLP,
        "vocab_size": 1024,
        "visual": {**CONFIG["visual"], **vision, "image_start_id": tokenizer.img_start_id},
    }
    model = write_model(tmp_path / "model", config, "bfloat16")
    shutil.move(tmp_path / "qwen.tiktoken", model)
    letters = np.random.default_rng(0).integers(97, 123, (8, 300), np.uint8)
    rows = tmp_path / "rows.jsonl"
    lines = [{"id": i, "prompt": row.tobytes().decode(), "chat": False} for i, row in enumerate(letters)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-c", MEASURE, str(model), str(tmp_path / "out"), str(rows)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    rise = int(re.findall(r"\d+", result.stdout)[-1])
    layer = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * MLP)  # weights of a layer in float32
    # While X^T X is damped and factored: at most two matrices [MLP, MLP] of float32 and three of float64 at a time.
    hessian = MLP**2 * (2 * 4 + 3 * 8)
    # Three copies of the float32 inputs of seven rows of at most 300 tokens; the eighth row is held out.
    inputs = 3 * 4 * 2100 * MLP
    paddle_memory = 6e7  # bytes, an allowance for what Paddle itself allocates
    assert hessian < rise  # the measurement includes the factorization
    # Three layers: the weights as read, and the original and the quantized layer in Paddle.
    assert rise < 3 * layer + hessian + inputs + paddle_memory
