"""Export the language stage in bfloat16, 8 bits and 4 bits, and compare size and answer.

    python examples/quantize.py
    python examples/quantize.py --checkpoint qwen-vl-chat-7b --image street.png --question "Is there a dog?"

The second command needs the checkpoint of Qwen-VL-Chat: the base model is not trained on questions. The first one
prints

    bfloat16             5.39 MB  The circle is on the right and the star is in the centre, so yes.
    weight_only_int8     2.97 MB  The circle is on the right and the star is in the centre, so yes.
    weight_only_int4     2.27 MB  The circle is on the right and the star is in the centre, so yes.

Quantized weights need the engine. A release wheel contains it; otherwise its first use needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from demo_model import CHECKPOINT, IMAGES

from paddlemix_qwenvl_plugin import QwenVL, export_language, export_vision


def main() -> None:
    flags = argparse.ArgumentParser(description="Compare storage types of the language stage.")
    flags.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    flags.add_argument("--image", type=Path, default=IMAGES / "relation.png")
    flags.add_argument("--question", default="Is the circle to the right of the star?")
    arguments = flags.parse_args()

    parts = [{"image": arguments.image.read_bytes()}, {"text": arguments.question}]
    with tempfile.TemporaryDirectory() as folder:
        vision = Path(folder) / "vision" / "vision"
        export_vision(arguments.checkpoint, vision, dtype="bfloat16")
        for quant_type in (None, "weight_only_int8", "weight_only_int4"):
            text = Path(folder) / (quant_type or "bfloat16")
            manifest = export_language(
                arguments.checkpoint, text, "qwen", dtype="bfloat16", quant_type=quant_type
            )
            answer = QwenVL.from_exported(vision, text / "qwen").generate(parts, chat=True, max_new_tokens=64)
            print(f"{text.name:16} {manifest.weights.bytes / 1e6:8.2f} MB  {answer.text.strip()}")


if __name__ == "__main__":
    main()
