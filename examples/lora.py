"""Export a checkpoint with and without a LoRA adapter, and compare the answers.

    python examples/lora.py
    python examples/lora.py --checkpoint qwen-vl-chat-7b --adapter output_qwen --question "Where is the dog?"

The first command creates an adapter that swaps two words, and prints

    base   The circle is brown.
    lora   The circle is blue.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from demo_model import CHECKPOINT, IMAGES
from safetensors.numpy import save_file

from paddlemix_qwenvl_plugin import QwenVL, export_language, export_vision
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint

BROWN, BLUE = 503, 548  # the ids of these words in the demo model's vocabulary


def make_adapter(folder: Path) -> Path:
    """Write an adapter of rank 1, in PEFT's format, that swaps the rows of BROWN and BLUE in lm_head."""
    demo = Checkpoint(CHECKPOINT)
    [(_, lm_head)] = demo.tensors({"lm_head.weight": demo.language["lm_head.weight"]}, "float32", out_in=True)
    a, b = lm_head[[BLUE]] - lm_head[[BROWN]], np.zeros([len(lm_head), 1], np.float32)
    b[BROWN], b[BLUE] = 1, -1  # B A adds the difference of the two rows to BROWN and subtracts it from BLUE
    tensors = {f"base_model.model.lm_head.lora_{name}.weight": value for name, value in (("A", a), ("B", b))}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    return folder


def main() -> None:
    flags = argparse.ArgumentParser(description="Compare a checkpoint with and without a LoRA adapter.")
    flags.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    flags.add_argument("--adapter", type=Path, help="folder that PEFT or PaddleNLP saved")
    flags.add_argument("--image", type=Path, default=IMAGES / "relation.png")
    flags.add_argument("--question", default="What colour is the circle?")
    arguments = flags.parse_args()
    parts = [{"image": arguments.image.read_bytes()}, {"text": arguments.question}]
    with tempfile.TemporaryDirectory() as folder:
        for name, lora in (("base", []), ("lora", [arguments.adapter or make_adapter(Path(folder))])):
            vision, language = Path(folder) / name / "vision", Path(folder) / name / "qwen"
            export_vision(arguments.checkpoint, vision, lora=lora)
            export_language(arguments.checkpoint, language.parent, language.name, lora=lora)
            answer = QwenVL.from_exported(vision, language).generate(parts, chat=True, max_new_tokens=64)
            print(f"{name}   {answer.text.strip()}")


if __name__ == "__main__":
    main()
