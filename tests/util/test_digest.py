"""Digests of arrays, computed in parts by several threads."""

from __future__ import annotations

import numpy as np
import pytest

from paddlemix_qwenvl_plugin.util import digest

PART_SIZE = (1 << 19) // 4  # float32 values in a part of 512 KiB


@pytest.mark.parametrize("size", [0, 1, PART_SIZE - 1, PART_SIZE, PART_SIZE + 1, 5 * PART_SIZE + 3])
def test_the_number_of_threads_does_not_change_the_digest(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    digests = set()
    for n_threads in (1, 4, 15):
        monkeypatch.setattr(digest, "cpu_threads", lambda n_threads=n_threads: n_threads)
        digests.add(digest.digest_of(array.copy()))
    assert len(digests) == 1


def test_values_at_the_ends_of_parts_and_the_order_change_the_digest() -> None:
    array = np.random.default_rng(0).standard_normal([3, PART_SIZE]).astype(np.float32)
    digests = {digest.digest_of(array), digest.digest_of(np.ascontiguousarray(array[::-1]))}
    for index in (0, PART_SIZE - 1, PART_SIZE, 3 * PART_SIZE - 1):
        changed = array.copy()
        changed.reshape(-1)[index] += 1
        digests.add(digest.digest_of(changed))
    assert len(digests) == 2 + 4
