"""The library of launchers that tests on a GPU call, with PyTorch's tensors as memory."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cuda_library():
    """`libqwenvl_cuda_test.so` of the folder QWENVL_CUDA_KERNELS, where the kernels lie too."""
    torch = pytest.importorskip("torch", reason="tests of GPU kernels need PyTorch")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    folder = os.environ.get("QWENVL_CUDA_KERNELS")
    if not folder:
        pytest.skip("QWENVL_CUDA_KERNELS names no folder with GPU kernels and their test library")
    torch.zeros(1, device="cuda")  # PyTorch's context is the one that is used
    return ctypes.CDLL(Path(folder) / "libqwenvl_cuda_test.so")


@pytest.fixture(scope="session")
def launch(cuda_library):
    """`launch(NAME, *arguments)` calls a launcher: integers as int, tensors as pointers; it must not fail."""
    import torch

    def converted(argument):
        if argument is None:
            return ctypes.c_void_p(0)
        if isinstance(argument, torch.Tensor):
            return ctypes.c_void_p(argument.data_ptr())
        return ctypes.c_int(argument) if isinstance(argument, int) else argument

    def call(name, half, *arguments):
        function = getattr(cuda_library, name)
        function.restype = ctypes.c_char_p
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        failed = function(ctypes.c_int(half), stream, *map(converted, arguments))
        assert failed is None, failed.decode()

    return call
