"""Make the files beside this file with PyTorch 2.x: `python make.py`. Values are small integers: exact in any dtype.

"before-1.6" in a name: the format of PyTorch before 1.6, a stream of pickles in place of a ZIP archive.
tests/checkpoint/test_bin_shards.py reads the files, except module.bin, which must be refused.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch

HERE = Path(__file__).parent
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    base = torch.arange(60, dtype=dtype).reshape(3, 20)
    tensors = OrderedDict(
        whole=base,
        transposed=base.T,  # not contiguous, shares the storage of `whole`
        part=base[1:, 5:9],  # begins inside the storage
        scalar=torch.tensor(7, dtype=dtype),
        empty=torch.zeros([0, 4], dtype=dtype),
        parameter=torch.nn.Parameter(torch.full([2, 2], 5.0, dtype=dtype)),
    )
    name = str(dtype).partition(".")[2]
    torch.save(tensors, HERE / f"{name}.bin")
    torch.save(tensors, HERE / f"{name}-before-1.6.bin", _use_new_zipfile_serialization=False)
module = torch.nn.Linear(2, 3)
torch.nn.init.constant_(module.weight, 2.0)
torch.nn.init.constant_(module.bias, 1.0)
torch.save(module.state_dict(), HERE / "state_dict.bin")
torch.save({"steps": torch.arange(3)}, HERE / "integers.bin")
torch.save({"module": module}, HERE / "module.bin")
torch.save({"eighth": torch.ones(2).to(torch.float8_e4m3fn)}, HERE / "float8.bin")
