"""The golden models (tests/golden/README.md) in the engine's naming and layout, loaded with NumPy alone.

For tests/csrc, which also runs without Paddle; the tests of the plugin use `Golden` in tests/conftest.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
# Matrices that PaddleMIX stores as [in, out] and the engine as [out, in].
LINEAR = re.compile(
    r"(c_attn|c_proj|w1|w2|c_fc|in_proj|out_proj|kv_proj|lm_head)\.weight$"
    r"|attn_pool\.attn\.in_proj_weight$|visual\.proj$"
)


def cubic(distance: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel (Keys, 1981) with a = -0.75."""
    a, d = -0.75, np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def resize_matrix(source: int, target: int) -> np.ndarray:
    """Matrix [target, source] of cubic interpolation along an axis, with half-pixel centres and the border repeated."""
    matrix = np.zeros([target, source])
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(tap, 0), source - 1)] += cubic(np.array(centre - tap))
    return matrix


def resize(table: np.ndarray, grid: int) -> np.ndarray:
    """Resize a table of positions on a square grid: [side * side, width] -> [grid * grid, width]."""
    side = int(len(table) ** 0.5)
    matrix = resize_matrix(side, grid)
    square = table.astype(np.float64).reshape(side, side, -1)
    resized = np.einsum("ia,jb,abc->ijc", matrix, matrix, square)
    return np.asarray(resized.reshape(grid * grid, -1), np.float32)


class GoldenModel:
    """A golden model's weights with the engine's names, float32, matrices [out, in].

    `figures` are the prompt, and outputs recorded from upstream's model.
    """

    def __init__(self, name: str) -> None:
        self.config = json.loads((GOLDEN / name / "config.json").read_text())
        self.figures = dict(np.load(GOLDEN / name / "golden.npz"))
        grid = self.config["visual"]["image_size"] // self.config["visual"]["patch_size"]
        self.weights: dict[str, np.ndarray] = {}
        for upstream_name, float16_values in np.load(GOLDEN / name / "weights.npz").items():
            engine_name = upstream_name.replace("transformer.llm.", "").replace("visual.vit.", "visual.")
            values = float16_values.astype(np.float32)
            if LINEAR.search(engine_name):
                values = np.ascontiguousarray(values.T)
            if engine_name == "visual.attn_pool.pos_embed":
                self.weights["visual.attn_pool.key_pos_embed"] = resize(values, grid)
            if engine_name == "visual.positional_embedding":
                values = resize(values, grid)
            self.weights[engine_name] = values

    @property
    def prompt(self) -> list[int]:
        return [int(token) for token in self.figures["input_ids"][0]]

    @property
    def images(self) -> np.ndarray:
        """The random images [n, 3, 448, 448] for which upstream's figures were recorded."""
        n = len(self.figures["features_every_16th_query"])
        return np.random.RandomState(101).randn(n, 3, 448, 448).astype("float32")

    def spans(self, features: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(Position of the first token after the image's <img>, features) of every image in the prompt."""
        starts = np.flatnonzero(self.figures["input_ids"][0] == self.config["visual"]["image_start_id"]) + 1
        return list(zip(starts.tolist(), features))

    def language_weights(self) -> dict[str, np.ndarray]:
        return {name: values for name, values in self.weights.items() if not name.startswith("visual.")}
