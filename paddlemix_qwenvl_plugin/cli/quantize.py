"""`qwenvl quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer


def quantize(
    model: Path = typer.Argument(
        ..., metavar="MODEL", help="Model folder in any supported format, not quantized."
    ),
    out: Path = typer.Argument(..., metavar="OUT", help="New folder, in GPTQ's format."),
    bits: int = typer.Option(..., "--bits", help="4 or 8."),
    data: Optional[Path] = typer.Option(
        None,
        "--data",
        metavar="ROWS.jsonl",
        help='Calibration rows: as for `qwenvl batch`, with "answer" where known. Default: drawn images.',
    ),
    group_size: Optional[int] = typer.Option(
        None,
        "--group_size",
        help="Inputs that share a scale: 32, 64 or 128. Default: 32 with 4 bits, 64 with 8.",
    ),
) -> None:
    """Quantize the language model, calibrated on images and prompts; run the command again to resume."""
    from paddlemix_qwenvl_plugin.quantization.job import quantize_model
    from paddlemix_qwenvl_plugin.quantization.report import REPORT

    for line in quantize_model(model, out, bits, group_size, data, print).lines():
        print(line)
    print(f"wrote {out}; the figures are in {out / REPORT}")
