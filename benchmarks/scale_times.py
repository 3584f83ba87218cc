"""Service times of one engine of the 7B geometry, measured; docs/benchmarks.md has the tables that they come from."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Service times, in seconds.

    Attributes:
        image: encoding an image.
        chunk, token: a chunk of n prompt tokens takes chunk + n * token.
        decode: (rows, seconds) of a decode step, ascending; interpolated, and extended beyond the last two.
        start: from the start of a process to an engine that accepts requests, files cached.
        cached_tokens: tokens that the KV cache holds.
    """

    image: float
    chunk: float
    token: float
    decode: tuple[tuple[int, float], ...]
    start: float
    cached_tokens: int

    def decode_step(self, rows: int) -> float:
        """Seconds of a decode step."""
        if rows == 0:
            return 0.0
        if len(self.decode) == 1:
            return self.decode[0][1]
        at = min(max(bisect_right(self.decode, (rows, float("inf"))), 1), len(self.decode) - 1)
        (x0, y0), (x1, y1) = self.decode[at - 1], self.decode[at]
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)

    def prompt(self, tokens: int) -> float:
        """Seconds of a chunk of a prompt."""
        return self.chunk + tokens * self.token if tokens else 0.0


def line(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float]:
    """(intercept, slope) of the line through two points."""
    slope = (y1 - y0) / (x1 - x0)
    return y0 - x0 * slope, slope


def _h200(short: float, long: float, decode: tuple[tuple[int, float], ...], weights_gb: float) -> Times:
    chunk, token = line(284, short, 2000, long)
    # gpu_memory (0.9) of what the weights leave of 141 GB, 512 KiB a token.
    cached = int(0.9 * (141 - weights_gb) * 1e9 / 2**19)
    # Opening, 1.87 s, and the imports of a server process.
    return Times(8.98e-3, chunk, token, decode, start=5.0, cached_tokens=cached)


# NVIDIA H200, "On a GPU": prefill of 284 and 2000 tokens, decode at 300 positions.
H200_BF16 = _h200(
    8.23e-3, 45.33e-3, ((1, 3.90e-3), (8, 4.31e-3), (32, 5.83e-3), (64, 7.82e-3)), weights_gb=19.3
)
H200_INT4 = _h200(13.89e-3, 46.66e-3, ((1, 2.27e-3), (8, 2.62e-3), (32, 4.63e-3)), weights_gb=10.0)
# Two virtual CPUs (Zen 4), weight_only_int8, "The 7B geometry, whole", slow memory: an image 10.9 s, a prompt of 300
# tokens 9.7 s, a token 0.223 s, and a step of 64 rows 2.5 s, at 24 GiB.
CPU2_INT8 = Times(
    image=10.9, chunk=0.0, token=9.7 / 300, decode=((1, 0.223), (64, 2.5)), start=25.0, cached_tokens=8192
)
PROFILES = {"h200-bf16": H200_BF16, "h200-int4": H200_INT4, "cpu2-int8": CPU2_INT8}

# "The server": CPU time of the front for each token of a stream, 16 and 64 streams.
FRONT_TOKEN = 375e-6

# Seconds of an image with a caption of 64 tokens, on a machine that is never idle. On H200: "64 requests at once, an
# image and 64 tokens each", over 64. On two CPUs: image and prompt, and 64 steps of 64 rows, over 64.
MEASURED_IMAGE = {
    "NVIDIA H200, bfloat16": 1.419 / 64,
    "NVIDIA H200, int8": 1.439 / 64,
    "NVIDIA H200, int4": 1.400 / 64,
    "two virtual CPUs (Zen 4), int8": CPU2_INT8.image + CPU2_INT8.prompt(300) + CPU2_INT8.decode_step(64),
}

# benchmarks/scale_ray.py: CPU seconds of the coordinator for a request (acquire, release) and for a report, which each
# engine and front sends every second; of the reader of a stream for a chunk; of Ray Data's driver for a part.
COSTS = {
    "admission": 2.1e-3,
    "report_engine": 2.2e-3,
    "report_front": 2.5e-3,
    "stream": 0.37e-3,
    "part": 17e-3,
}
