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
        layers: one dict per layer. `matrices` maps each matrix to two relative errors of its products on the
            calibration rows: as quantized, and if it were rounded to nearest. `states` is the relative error of the
            hidden states of the held-out rows after the layer.
        bytes: size of the weights in the quantized model folder.
        bytes_before: size of the weights if no tensor were quantized.
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
        errors = [pair for layer in self.layers for pair in layer["matrices"].values()]
        quantized_mean = sum(quantized for quantized, _ in errors) / len(errors)
        nearest_mean = sum(nearest for _, nearest in errors) / len(errors)
        yield (
            f"error of the matrices' products: {quantized_mean:.2%} on average; "
            f"{nearest_mean:.2%} if rounded to nearest; "
            f"of the hidden states after the last layer: {self.layers[-1]['states']:.2%}"
        )
        changed = self.held_out
        yield (
            f"held-out rows: {changed.tokens} of {changed.of_tokens} tokens changed, "
            f"in {changed.rows} of {changed.of_rows} rows"
        )
        yield f"size: {self.bytes / 1e6:.1f} MB of {self.bytes_before / 1e6:.1f} MB"
