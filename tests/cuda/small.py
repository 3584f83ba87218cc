"""Helpers for tests of elementwise, adapter, image and sampling kernels: calls of csrc/testing/cuda_small.cc.

PyTorch tensors are the memory.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="these tests need PyTorch for memory on the GPU")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
FOLDER = os.environ.get("QWENVL_CUDA_KERNELS", "")
LIBRARY = Path(FOLDER) / "libqwenvl_cuda_test.so"
if not FOLDER or not LIBRARY.exists():
    pytest.skip(
        "no libqwenvl_cuda_test.so: set QWENVL_CUDA_KERNELS to the folder of it and its cubins",
        allow_module_level=True,
    )

DLL = ctypes.CDLL(str(LIBRARY))
DLL.qvlt_gpu_sample_scratch.restype = ctypes.c_int64
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
# Largest relative error of rounding to the nearest number.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
UNWRITTEN = -77777777


def run(name: str, half: torch.dtype, *args: object) -> None:
    """Call qvlt_gpu_NAME on the current stream; tensors are passed by address, None as NULL."""
    converted: list[object] = [
        ctypes.c_int64(half == torch.bfloat16),
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
    ]
    for arg in args:
        if arg is None:
            converted.append(ctypes.c_void_p(None))
        elif isinstance(arg, torch.Tensor):
            assert arg.is_cuda
            assert arg.is_contiguous()
            converted.append(ctypes.c_void_p(arg.data_ptr()))
        elif isinstance(arg, float):
            converted.append(ctypes.c_double(arg))
        else:
            converted.append(ctypes.c_int64(int(arg)))  # type: ignore[call-overload]
    function = getattr(DLL, f"qvlt_gpu_{name}")
    function.restype = ctypes.c_char_p
    error = function(*converted)
    assert error is None, error.decode()


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda") * scale


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Tensor of NaN, or of an integer that no kernel writes, to detect values that a kernel did not write."""
    value = float("nan") if dtype.is_floating_point else UNWRITTEN
    return torch.full(shape, value, dtype=dtype, device="cuda")


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Assert that `found` is `expected` (float64), rounded to the type of `found`, within `tolerance`."""
    error = (found.double() - expected).abs()
    # 2 % more than the rounding of `expected`, since the value that the kernel rounds differs from it.
    bound = ROUNDING[found.dtype] * 1.02 * expected.abs() + tolerance
    assert found.shape == expected.shape
    assert bool((error <= bound).all()), f"largest error {error.max().item()}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(a, b)
