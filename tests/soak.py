"""Soak test of the loop on the engine: random requests join, end and are cancelled, in a small KV cache."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from asked import Asked
from executors import without_cache

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.engine.library import device_info
from paddlemix_qwenvl_plugin.runtime.engine_executor import EngineExecutor
from paddlemix_qwenvl_plugin.runtime.loop import Loop

DISTINCT = 60  # requests; each is repeated many times


@dataclass
class Report:
    """Results. `grown_bytes` (process) and `taken_bytes` (GPU): growth of memory from the first fifth to the end."""

    requests: int = 0
    cancelled: int = 0
    preempted: int = 0
    cached_tokens: int = 0
    grown_bytes: int = 0
    taken_bytes: int = 0


def soak(vl: QwenVL, monkeypatch: pytest.MonkeyPatch, n_requests: int) -> Report:
    """Run the requests, at most 12 concurrently, and compare each answer with that of the request without a batch.

    Raises:
        AssertionError: an answer differs, or blocks are left in use.
    """
    rng = random.Random(5)
    report = Report(n_requests)
    asked = [Asked(vl, rng, 90) for _ in range(DISTINCT)]
    expected = []
    for each in asked:
        without_cache(vl)
        expected.append(each.start(vl).finish().token_ids)
    n_blocks = vl.config.max_position_embeddings // 32
    loop = Loop(EngineExecutor(*vl._stages, n_blocks=n_blocks))
    monkeypatch.setattr(vl, "_loop", loop)
    pool, scheduler = loop._scheduler.pool, loop._scheduler
    held = [pool.allocate() for _ in range(n_blocks - 17)]
    preempt = scheduler._preempt

    def counting(generation: Any) -> None:
        report.preempted += 1
        preempt(generation)

    monkeypatch.setattr(scheduler, "_preempt", counting)
    active: list[tuple[int, Any]] = []
    started, early, free = 0, 0, 0
    while started < n_requests or active:
        if started < n_requests and len(active) < 12:
            which = rng.randrange(DISTINCT)
            active.append((which, asked[which].start(vl).submit()))
            started += 1
            if started == n_requests // 5:
                early, free = resident_bytes(), free_bytes(vl)
        scheduler.prompt_budget = rng.choice([9, 40, 200, 512])
        loop.step()
        for which, stream in list(active):
            if stream.done:
                active.remove((which, stream))
                report.cached_tokens += stream._generation.n_cached
                assert stream.finish().token_ids == expected[which], which
            elif rng.random() < 0.002:
                active.remove((which, stream))
                stream.close()
                tokens = stream._generation.tokens
                assert tokens == expected[which][: len(tokens)], which
                report.cancelled += 1
    loop.step()
    assert pool.n_free == n_blocks - len(held)
    report.grown_bytes, report.taken_bytes = resident_bytes() - early, free - free_bytes(vl)
    return report


def free_bytes(vl: QwenVL) -> int:
    """Used memory of the model's GPU; 0 on a CPU."""
    gpu = vl._stages[1].gpu
    return 0 if gpu is None else int(device_info(gpu).free_bytes)


def resident_bytes() -> int:
    """Resident memory of this process."""
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")
    ]
    return int(line.split()[1]) * 1024
