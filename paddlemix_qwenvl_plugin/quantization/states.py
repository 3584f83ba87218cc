"""Hidden states of all rows (rows.py), the held-out ones included, stored in a file; one row at a time is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class States:
    """A file of hidden states: the float32 [tokens, width] of all rows, one row after the other."""

    def __init__(self, path: Path, lengths: Sequence[int], width: int) -> None:
        self.path = path
        self._lengths, self._width = lengths, width
        self._starts = [0, *accumulate(lengths)]

    def read(self, row: int) -> NDArray[np.float32]:
        """Read the states of a row, [tokens, width]."""
        count, offset = self._lengths[row] * self._width, 4 * self._starts[row] * self._width
        return np.fromfile(self.path, np.float32, count, offset=offset).reshape(-1, self._width)

    def write(self, rows: Iterable[NDArray[np.float32]]) -> None:
        """Write the states of all rows in order."""
        with self.path.open("wb") as file:
            for states in rows:
                file.write(np.ascontiguousarray(states, np.float32).data)

    def beside(self, name: str) -> States:
        """Create the States of another file, `name` in the same folder, for the same rows."""
        return States(self.path.with_name(name), self._lengths, self._width)
