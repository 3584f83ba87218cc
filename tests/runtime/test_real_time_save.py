"""Files of generated tokens for upstream's reader, one per step; the test reads their bytes itself."""

from __future__ import annotations

import struct

from paddlemix_qwenvl_plugin.runtime.real_time_save import write_tokens


def test_files(tmp_path):
    (tmp_path / "real_time_save.temp_ids_rank_0_step_9").write_bytes(b"old")  # of an earlier run
    write_tokens(tmp_path, [[5, 6, 7], [8]], end_token=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"real_time_save.temp_ids_rank_0_step_{n}" for n in (1, 2, 3)
    ]
    steps = []
    for n in (1, 2, 3):
        data = (tmp_path / f"real_time_save.temp_ids_rank_0_step_{n}").read_bytes()
        assert data[:2] == b"11"  # "1": the file is complete; "1": the type is int64
        steps.append(list(struct.unpack("<2q", data[2:])))
    assert steps == [[5, 8], [6, 2], [7, 2]]  # the end token pads the shorter row
