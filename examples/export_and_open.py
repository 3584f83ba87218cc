"""Export both stages of a checkpoint, inspect their manifests, and open them.

    python examples/export_and_open.py
    python examples/export_and_open.py --checkpoint qwen-vl-7b --out out --dtype bfloat16

The first command prints

    vision: 5.8 MB of float16 in vision.pdiparams
    language: 5.4 MB of float16 in qwen.pdiparams
    4 layers, 128 x 128 pixels
    both stages are from one checkpoint: True
"""

from __future__ import annotations

import argparse
from pathlib import Path

from demo_model import CHECKPOINT

from paddlemix_qwenvl_plugin import QwenVL, export_language, export_vision


def main() -> None:
    flags = argparse.ArgumentParser(description="Export both stages of a checkpoint and open them.")
    flags.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    flags.add_argument("--out", type=Path, default=Path("out/export_and_open"), help="folder for both stages")
    flags.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    arguments = flags.parse_args()

    prefixes = arguments.out / "vision" / "vision", arguments.out / "text" / "qwen"
    vision = export_vision(arguments.checkpoint, prefixes[0], dtype=arguments.dtype)
    language = export_language(
        arguments.checkpoint, prefixes[1].parent, prefixes[1].name, dtype=arguments.dtype
    )
    for prefix, manifest in zip(prefixes, (vision, language)):
        print(
            f"{manifest.stage}: {manifest.weights.bytes / 1e6:.1f} MB of {manifest.dtype} in {prefix.name}.pdiparams"
        )

    # verify=True reads every file and compares it with its digest. Stages of different checkpoints are always refused.
    model = QwenVL.from_exported(*prefixes, verify=True)
    config = model.config
    print(
        f"{config.num_hidden_layers} layers, {config.visual.image_size} x {config.visual.image_size} pixels"
    )
    print("both stages are from one checkpoint:", vision.model == language.model)


if __name__ == "__main__":
    main()
