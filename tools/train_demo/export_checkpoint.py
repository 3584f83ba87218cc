"""Write trained weights as `model.safetensors` to a model folder, with Hugging Face's tensor names.

python -m tools.train_demo.export_checkpoint weights.npz paddlemix_qwenvl_plugin/demo/model
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def hugging_face_name(name: str) -> str:
    """Name in the checkpoint of a parameter of QwenVL in model.py."""
    return name if name == "lm_head.weight" else f"transformer.{name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path, help="weights file of train.py, float16")
    parser.add_argument("folder", type=Path, help="the model folder, with config.json and qwen.tiktoken")
    options = parser.parse_args()
    weights = np.load(options.weights)
    tensors = {hugging_face_name(name): np.ascontiguousarray(weights[name]) for name in weights}
    file = options.folder / "model.safetensors"
    save_file(tensors, str(file), {"format": "pt"})
    print(f"{file}: {sum(array.size for array in tensors.values())} parameters, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
