"""Export a checkpoint with and without a LoRA adapter, and compare the answers.

    python examples/lora.py
    python examples/lora.py --checkpoint qwen-vl-chat-7b --adapter output_qwen --question "Where is the dog?"

The first command makes an adapter that swaps two words, and prints

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

BROWN, BLUE = 503, 548  # the demo model's tokens


def make_adapter(folder: Path) -> Path:
    """Write an adapter of rank 1, in PEFT's format, that swaps the rows of two tokens in lm_head."""
    demo = Checkpoint(CHECKPOINT)
    [(_, head)] = demo.tensors({"lm_head.weight": demo.language["lm_head.weight"]}, "float32", out_in=True)
    halves = {"A": head[[BLUE]] - head[[BROWN]], "B": np.zeros([len(head), 1], np.float32)}
    halves["B"][BROWN], halves["B"][BLUE] = 1, -1
    tensors = {f"base_model.model.lm_head.lora_{half}.weight": values for half, values in halves.items()}
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
