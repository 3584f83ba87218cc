"""Digests of arrays by parts."""

from __future__ import annotations

import numpy as np
import pytest

from paddlemix_qwenvl_plugin.util import digest

SIZE = (1 << 19) // 4  # float32 values of a part


@pytest.mark.parametrize("n", [0, 1, SIZE - 1, SIZE, SIZE + 1, 5 * SIZE + 3])
def test_the_same_by_any_number_of_threads(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    found = set()
    for n_threads in (1, 4, 15):
        monkeypatch.setattr(digest, "cpu_threads", lambda n_threads=n_threads: n_threads)
        found.add(digest.digest_of(array.copy()))
    assert len(found) == 1


def test_every_value_counts_and_where_it_is() -> None:
    array = np.random.default_rng(0).standard_normal([3, SIZE]).astype(np.float32)
    found = {digest.digest_of(array), digest.digest_of(np.ascontiguousarray(array[::-1]))}
    for place in (0, SIZE - 1, SIZE, 3 * SIZE - 1):
        changed = array.copy()
        changed.reshape(-1)[place] += 1
        found.add(digest.digest_of(changed))
    assert len(found) == 6
