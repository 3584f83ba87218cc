"""Model and flags that the examples share: the bundled demo model, or your own exported stages.

    python examples/demo_model.py

exports the demo model into the user's cache folder, once, and prints the prefixes of its two stages.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Optional

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.demo import MODEL
from paddlemix_qwenvl_plugin.serve.demo_model import demo_stages

CHECKPOINT = MODEL
"""The demo model before its export: config.json, weights, vocabulary."""

IMAGES = MODEL.with_name("images")
"""Drawn images of shapes, words and numbers, the only kind that the demo model is trained on."""


def stages() -> tuple[Path, Path]:
    """Prefixes of the demo model's vision and language stages, which are exported unless they are in the cache."""
    return demo_stages(lambda line: print(line, file=sys.stderr))


def parser(description: Optional[str]) -> argparse.ArgumentParser:
    """Create a parser with the flags common to the examples that take exported stages."""
    flags = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    flags.add_argument(
        "--model",
        nargs=2,
        metavar=("VISION", "LANGUAGE"),
        help="prefixes of your exported stages, out/vision/vision out/text/qwen; default: the demo model",
    )
    flags.add_argument("--device", default="cpu", help="cpu, gpu or gpu:N")
    return flags


def open_model(arguments: argparse.Namespace) -> QwenVL:
    """Open the stages that --model names, or the demo model."""
    vision, language = arguments.model or stages()
    return QwenVL.from_exported(vision, language, device=arguments.device)


if __name__ == "__main__":
    print(*stages())
