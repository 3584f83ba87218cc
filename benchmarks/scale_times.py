"""Service times of an engine with the 7B model, measured (docs/benchmarks.md) or computed; the inputs of scale.py."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Service times, in seconds.

    Attributes:
        image: encoding of an image.
        chunk, token: fixed time of all prompt chunks of a step, and time per prompt token.
        decode: (rows, seconds) of decode steps, measured or computed, in ascending order of rows; a row is a decoding
            request.
        start: from the start of a process until its engine accepts requests, with cached files.
        cached_tokens: capacity of the KV cache in tokens.
    """

    image: float
    chunk: float
    token: float
    decode: tuple[tuple[int, float], ...]
    start: float
    cached_tokens: int

    def decode_step(self, rows: int) -> float:
        """Return the duration of a decode step with this number of rows.

        Interpolated linearly between the pairs of `decode`, and extrapolated from the last two. A single pair holds for
        all numbers of rows.
        """
        if rows == 0:
            return 0.0
        if len(self.decode) == 1:
            return self.decode[0][1]
        # Index of the pair that ends the interval: the first with more rows, at least 1 and at most the last.
        end = min(max(bisect_right(self.decode, (rows, float("inf"))), 1), len(self.decode) - 1)
        (rows_0, seconds_0), (rows_1, seconds_1) = self.decode[end - 1], self.decode[end]
        return seconds_0 + (seconds_1 - seconds_0) * (rows - rows_0) / (rows_1 - rows_0)

    def prompt(self, tokens: int) -> float:
        """Return the duration of a step's prompt chunks, which have this number of tokens in all."""
        return self.chunk + tokens * self.token if tokens else 0.0


def line(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float]:
    """Return (intercept, slope) of the line through two points."""
    slope = (y1 - y0) / (x1 - x0)
    return y0 - x0 * slope, slope


def _h200(
    prefill_284: float, prefill_2000: float, decode: tuple[tuple[int, float], ...], weights_gb: float
) -> Times:
    """Return the times of an H200 with 141 GB, from the durations of prompts with 284 and 2000 tokens."""
    chunk, token = line(284, prefill_284, 2000, prefill_2000)
    # The KV cache gets 0.9 (`gpu_memory`) of the memory without the weights; a token needs 512 KiB.
    cached_tokens = int(0.9 * (141 - weights_gb) * 1e9 / 2**19)
    # The first argument, `image`: the row "vision, 1 image". `start`: 1.87 s to open the model, and the imports of a
    # server process.
    return Times(8.98e-3, chunk, token, decode, start=5.0, cached_tokens=cached_tokens)


# NVIDIA H200, section "On a GPU": prefill of 284 and 2000 tokens, decode steps at 300 positions.
H200_BF16 = _h200(
    8.23e-3, 45.33e-3, ((1, 3.90e-3), (8, 4.31e-3), (32, 5.83e-3), (64, 7.82e-3)), weights_gb=19.3
)
H200_INT4 = _h200(13.89e-3, 46.66e-3, ((1, 2.27e-3), (8, 2.62e-3), (32, 4.63e-3)), weights_gb=10.0)
# Two virtual CPUs (Zen 4), weight_only_int8, 24 GiB of memory, at the lower of the two levels of memory bandwidth that
# benchmarks.md describes; section "The 7B geometry, whole": image 10.9 s, prompt of 300 tokens 9.7 s, opening 25 s,
# decode step with one row 0.223 s, with 64 rows 2.5 s (not measured, but computed from the rate of prompt products).
# `cached_tokens` is one full context, the engine's minimum.
CPU2_INT8 = Times(
    image=10.9, chunk=0.0, token=9.7 / 300, decode=((1, 0.223), (64, 2.5)), start=25.0, cached_tokens=8192
)
PROFILES = {"h200-bf16": H200_BF16, "h200-int4": H200_INT4, "cpu2-int8": CPU2_INT8}

# Section "The server": CPU seconds of the front per streamed token, mean of 16 and 64 clients, with four layers of
# the 7B geometry (rows "slice").
FRONT_TOKEN = 375e-6

# Seconds per image with a caption of 64 tokens, at full utilisation. On H200: the row "64 requests at once, an image
# and 64 tokens each", divided by 64. On two CPUs, computed: image, prompt, and one decode step of 64 rows, since
# 64 such steps generate the 64 tokens of 64 captions.
IMAGE_SECONDS = {
    "NVIDIA H200, bfloat16": 1.419 / 64,
    "NVIDIA H200, int8": 1.439 / 64,
    "NVIDIA H200, int4": 1.400 / 64,
    "two virtual CPUs (Zen 4), int8": CPU2_INT8.image + CPU2_INT8.prompt(300) + CPU2_INT8.decode_step(64),
}

# CPU seconds, measured by scale_ray.py.
COSTS = {
    "admission": 2.1e-3,  # coordinator, per request: acquire and release
    "report_engine": 2.2e-3,  # coordinator, per report of an engine; each engine sends one per second
    "report_front": 2.5e-3,  # coordinator, per report of a front; each front sends one per second
    "stream": 0.37e-3,  # front, per item that it reads from a stream of Ray, in addition to FRONT_TOKEN
    "part": 17e-3,  # Ray Data's driver, per part
}
