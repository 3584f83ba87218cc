"""Peak memory of the phases of `qwenvl quantize` in the 7B geometry with random weights.

Run: python benchmarks/quantize_memory.py embed|layer|report FOLDER
The first run writes a checkpoint of 7 GB to FOLDER (the vision tower, the resampler, one decoder layer, the embedding
and `lm_head`), which later runs use. Each phase needs a separate run, because the peak is that of the whole process.
`embed` encodes the images of three default calibration rows, with the vision tower and the resampler in float32.
`layer` quantizes mlp.c_proj, a layer's last matrix, which has the largest Hessian, with random inputs. `report`
computes the most likely next tokens from random hidden states, twice, as for the original and the quantized model.
"""

from __future__ import annotations

import re
import sys
from itertools import islice
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests"))

from geometry_7b import CONFIG, write_model  # noqa: E402

from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint  # noqa: E402
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer  # noqa: E402
from paddlemix_qwenvl_plugin.quantization.embedding import embed  # noqa: E402
from paddlemix_qwenvl_plugin.quantization.judge import count_changed  # noqa: E402
from paddlemix_qwenvl_plugin.quantization.layer import DecoderLayer  # noqa: E402
from paddlemix_qwenvl_plugin.quantization.layers import Streams  # noqa: E402
from paddlemix_qwenvl_plugin.quantization.rounding import Hessian, quantize  # noqa: E402
from paddlemix_qwenvl_plugin.quantization.rows import CalibrationRows  # noqa: E402
from paddlemix_qwenvl_plugin.tiny.vocab import write_tiny_vocabulary  # noqa: E402

HIDDEN, MLP = 4096, 11008
TOKENS = 2048  # of the calibration rows in the phase `layer`
ROW_TOKENS = 300  # of the row in the phase `report`


def write_checkpoint(folder: Path) -> None:
    folder.mkdir()
    write_tiny_vocabulary(folder / "qwen.tiktoken")
    image_start_id = QwenTokenizer.from_folder(folder).img_start_id
    vision = {**CONFIG["visual"], "layers": 48, "image_start_id": image_start_id}
    write_model(folder, {**CONFIG, "visual": vision}, "bfloat16")


def print_memory(point: str) -> None:
    """Print the peak and the current resident memory of this process at a point of the program."""
    status = Path("/proc/self/status").read_text()
    peak, current = (int(re.findall(rf"{key}:\s+(\d+)", status)[0]) / 2**20 for key in ("VmHWM", "VmRSS"))
    print(f"{point}: peak {peak:.2f} GiB, now {current:.2f}", flush=True)


def measure_embed(checkpoint: Checkpoint) -> None:
    tokenizer = QwenTokenizer.of_model(checkpoint.folder, checkpoint.config)
    rows = CalibrationRows(None, tokenizer, checkpoint.config, chat=False)
    for number, _ in enumerate(islice(embed(checkpoint, rows), 3), start=1):
        print_memory(f"{number} rows")


def measure_layer(checkpoint: Checkpoint) -> None:
    # During calibration two copies of a layer are in memory, the original and the quantized one.
    layers = [DecoderLayer(checkpoint.config) for _ in range(2)]
    for layer in layers:
        layer.load({"mlp.c_proj.weight": np.full((HIDDEN, MLP), 0.01, np.float32)})
    print_memory("two layers")
    random = np.random.default_rng(0)
    weight = random.standard_normal((HIDDEN, MLP), np.float32)
    inputs = random.standard_normal((TOKENS, MLP), np.float32)
    gram = inputs.T @ inputs
    print_memory("inputs")
    hessian = Hessian(gram.copy(), "mlp.c_proj")  # as in calibration, which also needs the Gram matrix itself
    print_memory("Hessian factorized")
    quantize(weight, hessian, 4, 32)  # 4 bits, groups of 32
    print_memory("quantized")


class RandomStates:
    """Stub of the stored hidden states of calibration rows, with random values."""

    def read(self, row: int) -> np.ndarray:
        return np.random.default_rng(row).standard_normal((ROW_TOKENS, HIDDEN), np.float32)


class Row:
    """Stub of a calibration row; the tokens predicted at the positions `judged` are compared."""

    judged = np.arange(100, ROW_TOKENS)


def measure_report(checkpoint: Checkpoint) -> None:
    count_changed(checkpoint, [Row()], [0], Streams(RandomStates(), RandomStates()))  # type: ignore[arg-type,list-item]
    print_memory("tokens compared")


if __name__ == "__main__":
    phase, path = sys.argv[1], Path(sys.argv[2])
    if not path.exists():
        write_checkpoint(path)
    globals()[f"measure_{phase}"](Checkpoint(path))
