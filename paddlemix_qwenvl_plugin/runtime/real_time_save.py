"""Token files in the format of upstream's graph, one per step, for upstream's reader.

Written by the hooks for upstream's scripts, and by `qwenvl predict --real_time_save`.

The file of step N, from 1 on, is `real_time_save.temp_ids_rank_0_step_N`: the byte "1" (file complete), the type byte
"1" (int64), then one little-endian int64 per batch row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from paddlemix_qwenvl_plugin.util.files import write_beside

_NAME = "real_time_save.temp_ids_rank_0_step_"


def write_tokens(folder: Path, tokens: Sequence[Sequence[int]], end_token: int) -> None:
    """Write the token files of a batch, replacing those of an earlier run.

    Args:
        folder: an existing folder; upstream's reader uses the working directory.
        tokens: the generated tokens of each row; -1 after the end of a row, the padding of this package's stock
            program, is ignored.
        end_token: padding for rows that end early.
    """
    tokens = [[token for token in row if token >= 0] for row in tokens]
    for old in folder.glob(f"{_NAME}*"):
        old.unlink()
    n_steps = max(map(len, tokens), default=0)
    for step in range(n_steps):
        values = [row[step] if step < len(row) else end_token for row in tokens]
        content = b"11" + np.asarray(values, "<i8").tobytes()
        write_beside(folder / f"{_NAME}{step + 1}", partial(Path.write_bytes, data=content))
