"""The report of a quantization: `quantization_report.json` in the model folder, and lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from paddlemix_qwenvl_plugin.quantization.judge import Changed

REPORT = "quantization_report.json"


@dataclass(frozen=True)
class Report:
    """Settings, errors and sizes of a quantization.

    Attributes:
        bits, group_size: storage of the quantized matrices.
        rows, tokens: numbers of rows and tokens that were used for calibration.
        skipped_rows: number of rows beyond the limit on tokens.
        held_out: changed predictions on the held-out rows.
        layers: per layer, `matrices`: matrix -> [relative error of its products on the calibration rows, that of
            rounding to nearest]; `states`: relative error of the held-out rows' hidden states after the layer.
        bytes, bytes_before: size of the weights in OUT and in MODEL.
    """

    bits: int
    group_size: int
    rows: int
    tokens: int
    skipped_rows: int
    held_out: Changed
    layers: list[dict[str, Any]]
    bytes: int
    bytes_before: int

    def as_dict(self) -> dict[str, Any]:
        """The content of the report file."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """The lines for the terminal."""
        skipped = (
            f"; {self.skipped_rows} more rows are beyond the limit on tokens" if self.skipped_rows else ""
        )
        yield f"calibrated on {self.rows} rows, {self.tokens} tokens{skipped}"
        pairs = [pair for layer in self.layers for pair in layer["matrices"].values()]
        mean = [sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1)]
        yield (
            f"error of the matrices' products: {mean[0]:.2%} on average; {mean[1]:.2%} if rounded to nearest; "
            f"of the hidden states after the last layer: {self.layers[-1]['states']:.2%}"
        )
        held = self.held_out
        yield (
            f"held-out rows: {held.tokens} of {held.of_tokens} tokens changed, in {held.rows} of {held.of_rows} rows"
        )
        yield f"size: {self.bytes / 1e6:.1f} MB of {self.bytes_before / 1e6:.1f} MB"
