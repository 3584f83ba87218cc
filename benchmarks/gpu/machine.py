"""Measure the limits of a GPU, for run.py: `python machine.py` prints a line of JSON for each.

The limits are the bandwidth of copies (bytes read plus written) and of reads, and the rate of bfloat16 products, each
from the fastest of several runs.
"""

from __future__ import annotations

import functools

import torch
from model import COPY, DEVICE, RATE, READ
from timing import note, report, times


def main() -> None:
    note(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    source = torch.randn(1 << 30, device=DEVICE)  # 4 GiB: far more than the caches
    target = torch.empty_like(source)
    gigabytes = source.nbytes / 1e9
    copy_ms = min(times(functools.partial(target.copy_, source)))
    report("machine", COPY, 2 * gigabytes / (copy_ms / 1e3))
    read_ms = min(times(source.sum))
    report("machine", READ, gigabytes / (read_ms / 1e3))
    n = 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product_ms = min(times(functools.partial(torch.mm, a, b)))
    report("machine", RATE, 2 * n**3 / 1e12 / (product_ms / 1e3))


if __name__ == "__main__":
    main()
