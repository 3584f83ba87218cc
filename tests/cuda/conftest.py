"""Fixtures to call launchers: C functions of csrc/testing/cuda_decode.cc that start kernels, on PyTorch tensors.

For test_decode.py and test_low_rank.py; prompt.py and small.py call the launchers of the other files of csrc/testing.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cuda_library():
    """The library `libqwenvl_cuda_test.so`, in the folder QWENVL_CUDA_KERNELS with the kernels."""
    torch = pytest.importorskip("torch", reason="tests of GPU kernels need PyTorch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    folder = os.environ.get("QWENVL_CUDA_KERNELS")
    if not folder:
        pytest.skip("set QWENVL_CUDA_KERNELS to a folder with GPU kernels and libqwenvl_cuda_test.so")
    torch.zeros(1, device="cuda")  # create PyTorch's context, which the launchers use
    return ctypes.CDLL(Path(folder) / "libqwenvl_cuda_test.so")


@pytest.fixture(scope="session")
def launch(cuda_library):
    """`launch(NAME, half, *arguments)` calls a launcher on the current stream and asserts success.

    `half`: 0 for bfloat16, 1 for float16, the reverse of the launchers of prompt.py and small.py. Of the
    arguments, it converts integers to C's int, tensors to pointers and None to NULL, and passes others as they are.
    """
    import torch

    def to_ctypes(argument):
        if argument is None:
            return ctypes.c_void_p(0)
        if isinstance(argument, torch.Tensor):
            return ctypes.c_void_p(argument.data_ptr())
        return ctypes.c_int(argument) if isinstance(argument, int) else argument

    def call(name, half, *arguments):
        function = getattr(cuda_library, name)
        function.restype = ctypes.c_char_p
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = function(ctypes.c_int(half), stream, *map(to_ctypes, arguments))
        assert error is None, error.decode()

    return call
