"""Measure a GPU's limits: `python machine.py` prints a line of JSON for each."""

from __future__ import annotations

import functools

import torch
from model import COPY, DEVICE, RATE, READ
from timing import note, report, times


def main() -> None:
    """Report the fastest of several copies (bytes read plus written), reads and products."""
    note(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    source = torch.randn(1 << 30, device=DEVICE)
    gigabytes, target = source.nbytes / 1e9, torch.empty_like(source)
    report("machine", COPY, 1e3 * 2 * gigabytes / min(times(functools.partial(target.copy_, source))))
    report("machine", READ, 1e3 * gigabytes / min(times(source.sum)))
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    report("machine", RATE, 2 * 8192**3 / 1e9 / min(times(functools.partial(torch.mm, a, b))))


if __name__ == "__main__":
    main()
