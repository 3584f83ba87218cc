"""Statistics of the loop: current values, and counters since its creation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoopStatistics:
    """Gauges (current values) and counters of a loop.

    Attributes:
        running, waiting: current number of requests.
        blocks, blocks_used: blocks of the KV cache, and those that running requests use; without the blocks that only
            the prefix cache keeps.
        prompt_tokens, cached_tokens, completion_tokens: counters of tokens; `cached_tokens` are those of the prompt
            tokens that were found in the prefix cache.
        images_encoded, image_cache_hits: counters of images.
        preempted: counter of preemptions.
        steps: counter of steps.
    """

    running: int = 0
    waiting: int = 0
    blocks: int = 0
    blocks_used: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    images_encoded: int = 0
    image_cache_hits: int = 0
    preempted: int = 0
    steps: int = 0
