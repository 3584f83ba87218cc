"""Helpers for tests of prompt kernels: calls of csrc/testing/cuda_prompt.cc with PyTorch tensors as memory."""

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
DLL.qvlt_gpu_linear_prompt_tiles.restype = ctypes.c_int64
DLL.qvlt_gpu_linear_prompt_tile_name.restype = ctypes.c_char_p
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
HALF, FLOAT, ADD, GELU, SILU_TIMES = range(5)  # enum class Epilogue of csrc/cuda/ops.h
PORTABLE, CHOSEN = -1, -2  # in place of a tile: the portable kernel, and the tile that linear_prompt chooses


def tiles() -> list[int]:
    """Indices of the variants of linear_prompt on Hopper, which differ in the sizes of tiles and clusters."""
    return list(range(DLL.qvlt_gpu_linear_prompt_tiles()))


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
            converted.append(ctypes.c_void_p(arg.data_ptr()))
        elif isinstance(arg, float):
            converted.append(ctypes.c_double(arg))
        else:
            converted.append(ctypes.c_int64(int(arg)))  # type: ignore[call-overload]
    function = getattr(DLL, f"qvlt_gpu_{name}")
    function.restype = ctypes.c_char_p
    error = function(*converted)
    assert error is None, error.decode()


def error_of(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference from a float64 reference, relative to the norm of the reference; NaN if a value is NaN."""
    return ((found.double() - reference).norm() / reference.norm()).item()


def rows_of(values: torch.Tensor, stride: int) -> torch.Tensor:
    """A copy of the rows with a stride of `stride` values, and NaN between the rows."""
    padded = values.new_full((values.shape[0], stride), float("nan"))
    padded[:, : values.shape[1]] = values
    return padded
