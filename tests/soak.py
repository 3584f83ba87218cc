"""Soak test of the loop on the engine: random requests join, end and are cancelled, in a small KV cache.

Run by tests/runtime/test_same_tokens.py, tests/cuda/test_soak.py and benchmarks/soak.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from executors import without_cache
from random_requests import RandomRequest

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.engine.library import device_info
from paddlemix_qwenvl_plugin.runtime.engine_executor import EngineExecutor
from paddlemix_qwenvl_plugin.runtime.loop import Loop

N_DISTINCT = 60  # different requests; each is submitted many times


@dataclass
class Report:
    """Counts of events, and growth of the process's and the GPU's memory since a fifth of the requests had started."""

    requests: int = 0
    cancelled: int = 0
    preempted: int = 0
    cached_tokens: int = 0
    grown_bytes: int = 0
    gpu_grown_bytes: int = 0


def soak(vl: QwenVL, monkeypatch: pytest.MonkeyPatch, n_requests: int) -> Report:
    """Run random requests, at most 12 concurrently; compare each answer with that of the same request run alone.

    Of a cancelled request, the tokens until then are compared. `n_requests` must be at least 5: the memory of a fifth
    of the requests is the starting point of Report's growth.

    Raises:
        AssertionError: an answer differs, or blocks are still in use at the end.
    """
    rng = random.Random(5)
    report = Report(n_requests)
    requests = [RandomRequest(vl, rng, max_new_below=90) for _ in range(N_DISTINCT)]
    expected = []
    for request in requests:
        without_cache(vl)
        expected.append(request.start(vl).finish().token_ids)
    n_blocks = vl.config.max_position_embeddings // 32
    loop = Loop(EngineExecutor(*vl._stages, n_blocks=n_blocks))
    monkeypatch.setattr(vl, "_loop", loop)
    pool, scheduler = loop._scheduler.pool, loop._scheduler
    # Leave 17 blocks for the requests: few enough that they preempt each other.
    held = [pool.allocate() for _ in range(n_blocks - 17)]
    preempt = scheduler._preempt

    def count_and_preempt(generation: Any) -> None:
        report.preempted += 1
        preempt(generation)

    monkeypatch.setattr(scheduler, "_preempt", count_and_preempt)
    active: list[tuple[int, Any]] = []  # (index of the request, its stream)
    started, early_resident, early_free = 0, 0, 0
    while started < n_requests or active:
        if started < n_requests and len(active) < 12:
            index = rng.randrange(N_DISTINCT)
            active.append((index, requests[index].start(vl).submit()))
            started += 1
            if started == n_requests // 5:
                early_resident, early_free = resident_bytes(), free_bytes(vl)
        # In place of the measured budget, for random chunks.
        scheduler.prompt_budget = rng.choice([9, 40, 200, 512])
        loop.step()
        for index, stream in list(active):
            if stream.done:
                active.remove((index, stream))
                report.cached_tokens += stream._generation.n_cached
                assert stream.finish().token_ids == expected[index], index
            elif rng.random() < 0.002:
                active.remove((index, stream))
                stream.close()
                tokens = stream._generation.tokens
                assert tokens == expected[index][: len(tokens)], index
                report.cancelled += 1
    assert pool.n_free == n_blocks - len(held)
    report.grown_bytes = resident_bytes() - early_resident
    report.gpu_grown_bytes = early_free - free_bytes(vl)
    return report


def free_bytes(vl: QwenVL) -> int:
    """Free memory of the model's GPU; 0 on a CPU."""
    gpu = vl._stages[1].gpu
    return 0 if gpu is None else int(device_info(gpu).free_bytes)


def resident_bytes() -> int:
    """Resident memory of this process."""
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")
    ]
    return int(line.split()[1]) * 1024
