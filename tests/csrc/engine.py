"""The engine's C interface (csrc/include/qwenvl.h) through ctypes, for tests and benchmarks: no Paddle, NumPy only."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from ctypes import (
    POINTER,
    c_char,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Constants of qwenvl.h. The number after _G is the group size, as in INT4_G64: 64 weights of a row share a scale.
# GROUPS has only the types with zero points.
FLOAT32, BFLOAT16, INT8, INT4_G64, INT4_G128, FLOAT16 = range(6)
UINT4_G32, UINT4_G64, UINT4_G128, UINT8_G32, UINT8_G64, UINT8_G128, INT32 = range(6, 13)
GROUPS = {UINT4_G32: 32, UINT4_G64: 64, UINT4_G128: 128, UINT8_G32: 32, UINT8_G64: 64, UINT8_G128: 128}
UINT4 = (UINT4_G32, UINT4_G64, UINT4_G128)
QUANTIZED = (INT8, INT4_G64, INT4_G128, *GROUPS)
DTYPES = {
    "float32": FLOAT32,
    "bfloat16": BFLOAT16,
    "int8": INT8,
    "int4_g64": INT4_G64,
    "int4_g128": INT4_G128,
    "float16": FLOAT16,
    "uint4_g32": UINT4_G32,
    "uint4_g64": UINT4_G64,
    "uint4_g128": UINT4_G128,
    "uint8_g32": UINT8_G32,
    "uint8_g64": UINT8_G64,
    "uint8_g128": UINT8_G128,
}
# Path of a libqwenvl.so with a GPU back end, which the tests then use on the GPU (conftest.py); "": test on the CPU.
DEVICE_LIBRARY = os.environ.get("QWENVL_TEST_LIBRARY", "")
ISAS = {"best": 0, "generic": 1, "avx2": 2, "avx512": 3, "avx512_bf16": 4}
OK, INVALID, BAD_WEIGHT, UNSUPPORTED, NO_MEMORY, STOPPED, INTERNAL = range(7)
VISION, LANGUAGE = 1, 2
FINISH_END, FINISH_LENGTH = 1, 2
NO_LOGITS, GENERATED = 1, 2
COMPUTE_BEST, COMPUTE_FLOAT32, COMPUTE_BFLOAT16, COMPUTE_FLOAT16 = range(4)

# Names of int32 fields of Config: three lists, each of fields that are consecutive in the C struct.
CONFIG_RUN = ["device", "device_index", "n_threads", "isa", "max_tokens"]
CONFIG_LANGUAGE = ["hidden", "layers", "heads", "head_dim", "mlp_width", "vocab"]
CONFIG_VISION = ["image_size", "patch_size", "vision_width", "vision_layers", "vision_heads"]


class Error(ctypes.Structure):
    _fields_ = [("message", c_char * 512)]


class Config(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("stages", c_uint32),
        *((name, c_int32) for name in CONFIG_RUN),
        *((name, c_int32) for name in CONFIG_LANGUAGE),
        ("norm_epsilon", c_float),
        ("seq_length", c_int32),
        ("max_positions", c_int32),
        ("rotary_base", c_float),
        ("dynamic_ntk", c_int32),
        ("logn", c_int32),
        *((name, c_int32) for name in CONFIG_VISION),
        ("vision_mlp_width", c_int32),
        ("n_queries", c_int32),
        ("compute", c_int32),
    ]


class DeviceInfo(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("name", c_char * 128),
        ("memory_bytes", c_uint64),
        ("free_bytes", c_uint64),
        ("threads", c_int32),
        ("compute_major", c_int32),
        ("compute_minor", c_int32),
        ("isa", c_char * 32),
    ]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p),
        ("data", c_void_p),
        ("dtype", c_int32),
        ("device", c_int32),
        ("n_dims", c_int32),
        ("shape", c_int64 * 4),
        ("bytes", c_uint64),
    ]


class Sequence_(ctypes.Structure):
    _fields_ = [
        ("n_new", c_int32),
        ("n_past", c_int32),
        ("prompt_len", c_int32),
        ("n_blocks", c_int32),
        ("blocks", POINTER(c_int32)),
        ("flags", c_uint32),
        ("reserved", c_uint32),
        ("adapter", c_void_p),
    ]


class AdapterMatrix(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p),
        ("a", c_void_p),
        ("b", c_void_p),
        ("dtype", c_int32),
        ("scale", c_float),
        ("out", c_int64),
        ("in_", c_int64),
        ("rank", c_int64),
    ]


class Span(ctypes.Structure):
    _fields_ = [("start", c_int32), ("count", c_int32), ("features", c_void_p)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("n_sequences", c_int32),
        ("sequences", POINTER(Sequence_)),
        ("tokens", c_void_p),
        ("n_spans", c_int32),
        ("reserved", c_int32),
        ("spans", POINTER(Span)),
        ("sequence_size", c_uint32),
        ("span_size", c_uint32),
    ]


class Sampling(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("temperature", c_float),
        ("top_p", c_float),
        ("top_k", c_int32),
        ("repetition_penalty", c_float),
        ("frequency_penalty", c_float),
        ("presence_penalty", c_float),
        ("n_forbidden", c_int32),
        ("forbidden", POINTER(c_int32)),
        ("seed", c_uint64),
        ("counter", c_uint64),
    ]


class Request(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("n_spans", c_int32),
        ("tokens", POINTER(c_int32)),
        ("spans", POINTER(Span)),
        ("max_new", c_int32),
        ("min_new", c_int32),
        ("sampling", POINTER(Sampling)),
        ("span_size", c_uint32),
        ("reserved", c_uint32),
        ("adapter", c_void_p),
    ]


class StepArgs(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("sampling_size", c_uint32),
        ("batch", POINTER(Batch)),
        ("rows", c_int32),
        ("n_logprobs", c_int32),
        ("sampling", POINTER(Sampling)),
        ("counts", c_void_p),
        ("tokens", c_void_p),
        ("logprobs", c_void_p),
        ("top_tokens", c_void_p),
        ("top_logprobs", c_void_p),
        ("logits", c_void_p),
    ]


class Result(ctypes.Structure):
    _fields_ = [("n_tokens", c_int32), ("finish", c_int32), ("reserved", c_int32 * 2)]


OnStep = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int32, c_int32, POINTER(c_int32), POINTER(c_int32))


class EngineError(Exception):
    """A failed call of the library: its status code, and its message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def pointer(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def aligned(n_bytes: int) -> np.ndarray:
    """Uninitialized uint8 memory aligned to a cache line of 64 bytes, as are the weights of parameter files."""
    memory = np.empty(n_bytes + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + n_bytes]


def int_pointer(array: np.ndarray) -> Any:
    assert array.dtype == np.int32
    assert array.flags.c_contiguous
    return array.ctypes.data_as(POINTER(c_int32))


class Library:
    """A loaded engine library: `call` raises EngineError with the message of a failed function."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dll = ctypes.CDLL(str(path))
        self.dll.qvl_version.restype = c_char_p
        self.dll.qvl_engine_describe.restype = c_char_p
        self.dll.qvl_packed_bytes.restype = c_uint64
        self.dll.qvl_packed_bytes.argtypes = [c_int32, c_int64, c_int64]
        self.dll.qvl_kv_pool_bytes.restype = c_uint64
        self.dll.qvl_kv_pool_bytes.argtypes = [c_void_p, c_int32, c_int32, c_int32]
        self.dll.qvl_sampling_init.argtypes = [POINTER(Sampling)]
        self.dll.qvl_weights_count.argtypes = [c_void_p]
        self.dll.qvl_weights_count.restype = c_int64
        self.dll.qvl_device_count.argtypes = [c_int32]
        for name in (
            "engine_free",
            "kv_pool_free",
            "adapter_free",
            "weights_free",
            "event_free",
            "engine_describe",
        ):
            getattr(self.dll, f"qvl_{name}").argtypes = [c_void_p]
        for name in ("dealloc", "host_free"):
            getattr(self.dll, f"qvl_{name}").argtypes = [c_void_p, c_void_p]
        signatures: dict[str, list[Any]] = {
            "qvl_pack": [c_int32, c_int64, c_int64, c_void_p, c_void_p, c_uint64],
            "qvl_pack_groups": [c_int32, c_int64, c_int64, *[c_void_p] * 4, c_uint64],
            "qvl_unpack": [c_int32, c_int64, c_int64, c_void_p, c_uint64, c_void_p],
            "qvl_get_device_info": [c_int32, c_int32, POINTER(DeviceInfo)],
            "qvl_weights_create": [POINTER(Tensor), c_int64, c_uint32, POINTER(c_void_p)],
            "qvl_weights_open": [c_char_p, POINTER(c_void_p)],
            "qvl_weights_get": [c_void_p, c_int64, POINTER(Tensor), c_uint32],
            "qvl_engine_create": [POINTER(Config), c_void_p, POINTER(c_void_p)],
            "qvl_adapter_create": [c_void_p, POINTER(AdapterMatrix), c_int64, c_uint32, POINTER(c_void_p)],
            "qvl_host_alloc": [c_void_p, c_uint64, POINTER(c_void_p)],
            "qvl_copy_async": [c_void_p, c_void_p, c_void_p, c_uint64, c_void_p],
            "qvl_event_create": [c_void_p, POINTER(c_void_p)],
            "qvl_event_record": [c_void_p, c_void_p],
            "qvl_event_query": [c_void_p, POINTER(c_int32)],
            "qvl_event_wait": [c_void_p],
            "qvl_kv_copy_blocks": [c_void_p, c_int32, c_void_p, c_void_p, c_void_p],
            "qvl_kv_read_blocks": [c_void_p, c_int32, c_void_p, c_void_p, c_uint64, c_void_p],
            "qvl_kv_write_blocks": [c_void_p, c_int32, c_void_p, c_void_p, c_uint64, c_void_p],
            "qvl_step": [c_void_p, c_void_p, POINTER(StepArgs), c_void_p],
            "qvl_alloc": [c_void_p, c_uint64, POINTER(c_void_p)],
            "qvl_copy": [c_void_p, c_void_p, c_void_p, c_uint64, c_void_p],
            "qvl_synchronize": [c_void_p, c_void_p],
            "qvl_encode_images": [c_void_p, c_int64, c_void_p, c_void_p, c_void_p],
            "qvl_kv_pool_create": [c_void_p, c_int32, c_int32, c_int32, POINTER(c_void_p)],
            "qvl_forward": [c_void_p, c_void_p, POINTER(Batch), c_void_p, c_void_p],
            "qvl_sample": [
                *(c_void_p, c_int32, c_void_p, POINTER(Sampling), c_uint32, c_void_p, c_void_p, c_void_p)
            ],
            "qvl_generate": [
                *(c_void_p, c_void_p, c_int32, POINTER(Request), c_uint32, c_int32, c_void_p, OnStep),
                c_void_p,
                *(c_int64, c_void_p, c_void_p, c_void_p),
            ],
        }
        # Only libqwenvl_testing.so has the functions qvlr_NAME (references) and qvlt_NAME. The first argument of those
        # in `kernels` is the ISA, which the dict omits.
        i32, i64, f32, p = c_int32, c_int64, c_float, c_void_p
        references: dict[str, list[Any]] = {
            "linear": [i64, i64, i64, p, p, p, i32, p],
            "rms_norm": [i64, i64, p, p, f32, p],
            "layer_norm": [i64, i64, p, p, p, f32, p],
            "gelu": [i64, p],
            "silu_mul": [i64, p, p],
            "rotary": [i64, i64, p, p, p, p],
            "attention": [i64, i64, i64, i64, i32, p, p, p, p],
        }
        kernels: dict[str, list[Any]] = {
            **references,
            "linear": [i32, i32, i64, i64, i64, i64, p, p, p, p, i32, p],
            "add": [i64, p, p],
            "bfloat16": [i64, p, p, p],
            "rotary": [POINTER(Config), i32, i64, p, p, p, p],
            "attention": [i32, i32, i32, i32, i32, *references["attention"]],
            "textbook_matvec": [i32, i32, i64, i64, p, p, p],
            "textbook_attention": [i32, i32, i32, i32, i32, p, p, p],
        }
        if hasattr(self.dll, "qvlt_linear"):
            for name, arguments in references.items():
                getattr(self.dll, f"qvlr_{name}").argtypes = arguments
            for name, arguments in kernels.items():
                getattr(self.dll, f"qvlt_{name}").argtypes = [i32, *arguments]
            self.dll.qvlt_textbook_name.argtypes = [i32, i32]
            self.dll.qvlt_textbook_name.restype = c_char_p
            self.dll.qvlt_query_scale.argtypes = [POINTER(Config), i32]
            self.dll.qvlt_query_scale.restype = c_float
            self.dll.qvlt_pool_blocks.argtypes = [*([i32] * 6), p, i32, i32, p]
            self.dll.qvlt_pool_blocks.restype = i64
            self.dll.qvlt_cpu_quota.argtypes = [c_char_p, c_char_p]
            self.dll.qvlt_cpu_quota.restype = c_double
            self.dll.qvlt_memory_limit.argtypes = [c_char_p, c_char_p, *([POINTER(c_uint64)] * 2)]
            self.dll.qvlt_memory_limit.restype = None
        for name, arguments in signatures.items():
            getattr(self.dll, name).argtypes = [*arguments, POINTER(Error)]
            getattr(self.dll, name).restype = c_int32

    def has_isa(self, isa: int) -> bool:
        """Whether this processor has an ISA; needs libqwenvl_testing.so."""
        x = np.zeros(1, np.float32)
        return bool(self.dll.qvlt_gelu(isa, 1, pointer(x)) == OK)  # any kernel reports a missing ISA

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns a status; this method adds the last argument, the error struct."""
        error = Error()
        status = getattr(self.dll, name)(*arguments, ctypes.byref(error))
        if status != OK:
            message = error.message.decode()
            assert message
            assert "\n" not in message
            raise EngineError(status, message)

    def pack(self, values: np.ndarray, dtype: int) -> np.ndarray:
        """Pack a matrix [out, in] into the engine's storage as `dtype`; return the bytes, uint8.

        For a type with zero points, `quantize_groups` computes the integers, scales and zero points to pack.
        """
        values = np.ascontiguousarray(values, np.float32)
        if dtype in GROUPS:
            return self.pack_groups(*quantize_groups(values, dtype), dtype)
        rows, columns = values.shape
        packed = aligned(self.dll.qvl_packed_bytes(dtype, rows, columns))
        self.call("qvl_pack", dtype, rows, columns, pointer(values), pointer(packed), packed.nbytes)
        return packed

    def pack_groups(
        self, integers: np.ndarray, scales: np.ndarray, zeros: np.ndarray, dtype: int
    ) -> np.ndarray:
        """Pack an already quantized matrix into the engine's storage; return the bytes, uint8.

        Args:
            integers: uint8 [out, in].
            scales: float16 [out, groups], as are `zeros`, the zero points.
        """
        packed = aligned(self.dll.qvl_packed_bytes(dtype, *integers.shape))
        pointers = [pointer(array) for array in (integers, scales, zeros, packed)]
        self.call("qvl_pack_groups", dtype, *integers.shape, *pointers, packed.nbytes)
        return packed

    def unpack(self, packed: np.ndarray, dtype: int, rows: int, columns: int) -> np.ndarray:
        values = np.empty([rows, columns], np.float32)
        self.call("qvl_unpack", dtype, rows, columns, pointer(packed), packed.nbytes, pointer(values))
        return values


def quantize_groups(values: np.ndarray, dtype: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize a float32 matrix asymmetrically, by the range of values of each group.

    Returns:
        Integers uint8 [out, in]; scales and zero points, both float16 [out, groups].
    """
    group, max_integer = GROUPS[dtype], 15 if dtype in UINT4 else 255
    rows, columns = values.shape
    n_groups = -(-columns // group)
    padded = np.zeros([rows, n_groups * group], np.float32)
    padded[:, :columns] = values
    padded = padded.reshape(rows, n_groups, group)
    low, high = padded.min(-1).clip(max=0), padded.max(-1).clip(min=0)
    scales = np.maximum((high - low) / max_integer, 1e-6).astype(np.float16)
    zeros = np.rint(-low / scales.astype(np.float32)).clip(0, max_integer).astype(np.float16)
    scaled = padded / scales[..., None].astype(np.float32) + zeros[..., None]
    integers = np.rint(scaled).clip(0, max_integer).astype(np.uint8).reshape(rows, -1)[:, :columns]
    return np.ascontiguousarray(integers), scales, zeros


def make_config(data: Mapping[str, Any], stages: int = VISION | LANGUAGE, **changes: Any) -> Config:
    """Engine configuration from a model's config.json; `changes` override fields.

    In config.json, `intermediate_size` is the width of w1 and w2 together.
    """
    vision = data["visual"]
    config = Config(
        size=ctypes.sizeof(Config),
        stages=stages,
        device=bool(DEVICE_LIBRARY),  # QVL_DEVICE_CPU is 0, QVL_DEVICE_CUDA 1
        hidden=data["hidden_size"],
        layers=data["num_hidden_layers"],
        heads=data["num_attention_heads"],
        head_dim=data["kv_channels"],
        mlp_width=data["intermediate_size"] // 2,
        vocab=data["vocab_size"],
        norm_epsilon=data["layer_norm_epsilon"],
        seq_length=data["seq_length"],
        max_positions=data["max_position_embeddings"],
        rotary_base=data["rotary_emb_base"],
        dynamic_ntk=int(data["use_dynamic_ntk"]),
        logn=int(data["use_logn_attn"]),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        vision_width=vision["width"],
        vision_layers=vision["layers"],
        vision_heads=vision["heads"],
        vision_mlp_width=int(vision["width"] * vision["mlp_ratio"]),
        n_queries=vision.get("n_queries", 256),
    )
    for name, value in changes.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return config


Stored = tuple[np.ndarray, int, tuple[int, ...]]
"""A weight in the engine's storage: packed data, dtype, shape."""


def store(
    library: Library,
    weights: Mapping[str, np.ndarray],
    dtype: int,
    dtype_of: Callable[[str], int] | None = None,
) -> dict[str, Stored]:
    """Pack weights into the engine's storage as `dtype`, or as `dtype_of(name)` if given.

    Only matrices of linear layers can be quantized: in place of a quantized type, tables of embeddings, positions and
    the resampler's queries get bfloat16, and vectors float32.
    """
    stored = {}
    for name, values in weights.items():
        storage = dtype_of(name) if dtype_of else dtype
        linear = values.ndim > 1 and not name.endswith(("wte.weight", "embedding", "query", "pos_embed"))
        if storage in QUANTIZED and not linear:
            storage = BFLOAT16 if values.ndim > 1 else FLOAT32
        matrix = values.reshape(values.shape[0], -1)
        stored[name] = (library.pack(matrix, storage), storage, values.shape)
    return stored


def make_tensors(stored: Mapping[str, Stored]) -> Any:
    """C array of qvl_tensor that refers to the memory of `stored`."""
    tensors = (Tensor * len(stored))()
    for tensor, (name, (data, dtype, shape)) in zip(tensors, stored.items()):
        tensor.name, tensor.data, tensor.dtype = name.encode(), pointer(data), dtype
        tensor.n_dims, tensor.bytes = len(shape), data.nbytes
        for i, size in enumerate(shape):
            tensor.shape[i] = size
    return tensors


class Weights:
    """Weights in memory, or mapped from a parameter file."""

    def __init__(self, library: Library, source: Mapping[str, Stored] | Path) -> None:
        # `_source` keeps the memory of the weights alive.
        self.library, self._source, handle = library, source, c_void_p()
        if isinstance(source, Path):
            library.call("qvl_weights_open", str(source).encode(), ctypes.byref(handle))
        else:
            tensors = make_tensors(source)
            library.call(
                "qvl_weights_create", tensors, len(tensors), ctypes.sizeof(Tensor), ctypes.byref(handle)
            )
        self.handle = handle

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.dll.qvl_weights_free(self.handle)

    def __len__(self) -> int:
        return int(self.library.dll.qvl_weights_count(self.handle))

    def __getitem__(self, i: int) -> Tensor:
        tensor = Tensor()
        self.library.call("qvl_weights_get", self.handle, i, tensor, ctypes.sizeof(Tensor))
        return tensor


class Engine:
    """An engine and the weights that it refers to."""

    def __init__(self, library: Library, config: Config, weights: Mapping[str, Stored] | Weights) -> None:
        self.library, self.config, self._weights = library, config, weights
        handle = c_void_p()
        if isinstance(weights, Weights):
            library.call("qvl_engine_create", config, weights.handle, ctypes.byref(handle))
        else:
            with Weights(library, weights) as opened:  # the engine keeps the tensors, not the handle
                library.call("qvl_engine_create", config, opened.handle, ctypes.byref(handle))
        self.handle = handle

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.dll.qvl_engine_free(self.handle)

    def describe(self) -> str:
        return str(self.library.dll.qvl_engine_describe(self.handle).decode())

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        images = np.ascontiguousarray(images, np.float32)
        features = np.empty([len(images), self.config.n_queries, self.config.hidden], np.float32)
        self.library.call(
            "qvl_encode_images", self.handle, len(images), pointer(images), pointer(features), None
        )
        return features

    def pool(self, n_blocks: int, block_tokens: int = 32, dtype: int = FLOAT32) -> Pool:
        return Pool(self, n_blocks, block_tokens, dtype)

    def adapter(self, matrices: Mapping[str, LowRank]) -> Adapter:
        return Adapter(self, matrices)

    def sample(
        self,
        logits: np.ndarray,
        sampling: Sequence[Sampling],
        counts: Sequence[np.ndarray | None] | None = None,
    ) -> list[int]:
        """Sample a token for each row of logits.

        Args:
            counts: for each row, how often each token id was generated, int32 [vocab], for the penalties; or None. The
                engine increments the count of the sampled token.
        """
        n = len(sampling)
        logits = np.ascontiguousarray(logits, np.float32)
        tokens = np.empty(n, np.int32)
        count_pointers = None
        if counts is not None:
            count_pointers = (c_void_p * n)(*(None if row is None else pointer(row) for row in counts))
        self.library.call(
            "qvl_sample",
            self.handle,
            n,
            pointer(logits),
            (Sampling * n)(*sampling),
            ctypes.sizeof(Sampling),
            count_pointers,
            pointer(tokens),
            None,
        )
        return [int(token) for token in tokens]

    def sampling(self, **changes: Any) -> Sampling:
        """Default sampling parameters with changed fields."""
        sampling = Sampling(size=ctypes.sizeof(Sampling))
        self.library.dll.qvl_sampling_init(sampling)
        for name, value in changes.items():
            assert hasattr(sampling, name)
            setattr(sampling, name, value)
        return sampling

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        spans: Sequence[Sequence[tuple[int, np.ndarray]]] | None = None,
        end_ids: Sequence[int] = (),
        min_new: int = 0,
        pool: Pool | None = None,
        on_step: Callable[[int, list[int], list[int]], int] | None = None,
        adapters: Sequence[Adapter | None] | None = None,
        **sampling: Any,
    ) -> tuple[list[list[int]], list[int]]:
        """Generate completions; return their tokens and their finish reasons.

        Args:
            spans: image features of each prompt, as (first position, features [count, hidden]).
            end_ids: the stop tokens of all requests.
            pool: KV block pool to use; without one, the engine creates a pool for the call.
            on_step: called with the step, the indices of requests and their new tokens; if it returns a number other
                than 0, the generation ends with the error STOPPED.
            adapters: the adapter of each prompt, or None.
            sampling: fields of Sampling, the same for all requests.
        """
        n = len(prompts)
        keep_alive: list[Any] = []  # the structs have pointers to these objects
        requests = (Request * n)()
        for i, (request, prompt) in enumerate(zip(requests, prompts)):
            ids = np.asarray(prompt, np.int32)
            request_spans = make_spans(spans[i] if spans else [])
            keep_alive += [ids, request_spans]
            request.n_tokens, request.tokens = len(ids), int_pointer(ids)
            request.n_spans, request.spans = len(request_spans), request_spans
            request.max_new, request.min_new = max_new, min_new
            request.span_size = ctypes.sizeof(Span)
            if adapters and adapters[i]:
                request.adapter = adapters[i].handle.value
            if sampling:
                parameters = self.sampling(**sampling)
                keep_alive.append(parameters)
                request.sampling = ctypes.pointer(parameters)
        tokens = np.full([n, max_new], -1, np.int32)
        results = (Result * n)()
        stop_ids = np.asarray(end_ids, np.int32)

        def relay(_: Any, step: int, count: int, indices: Any, new_tokens: Any) -> int:
            return on_step(step, indices[:count], new_tokens[:count]) if on_step else 0

        callback = OnStep(relay) if on_step else OnStep()
        self.library.call(
            "qvl_generate",
            *(self.handle, pool.handle if pool else None, n, requests, ctypes.sizeof(Request)),
            *(len(stop_ids), pointer(stop_ids), callback, None, max_new, pointer(tokens), results, None),
        )
        completions = [row[: result.n_tokens].tolist() for row, result in zip(tokens, results)]
        return completions, [result.finish for result in results]


def make_spans(spans: Sequence[tuple[int, np.ndarray]]) -> Any:
    """C array of qvl_span for (first position, features)."""
    array = (Span * len(spans))()
    for span, (start, features) in zip(array, spans):
        span.start, span.count, span.features = start, len(features), pointer(features)
    return array


class LowRank(NamedTuple):
    """Update scale * B A of a matrix: A [rank, in], B [out, rank] as float32, float16, or uint16 bits of bfloat16."""

    a: np.ndarray
    b: np.ndarray
    scale: float = 1.0


class Adapter:
    """An adapter of an engine, from the low-rank updates of its matrices."""

    def __init__(self, engine: Engine, updates: Mapping[str, LowRank]) -> None:
        matrices = (AdapterMatrix * len(updates))()
        dtypes = {"float32": FLOAT32, "float16": FLOAT16, "uint16": BFLOAT16}
        for matrix, (name, (a, b, scale)) in zip(matrices, updates.items()):
            matrix.name, matrix.a, matrix.b, matrix.scale = name.encode(), pointer(a), pointer(b), scale
            matrix.rank, matrix.out, matrix.in_ = a.shape[0], b.shape[0], a.shape[1]
            matrix.dtype = dtypes[a.dtype.name]
        self.library, handle = engine.library, c_void_p()
        engine.library.call(
            "qvl_adapter_create",
            *(engine.handle, matrices, len(matrices), ctypes.sizeof(AdapterMatrix), ctypes.byref(handle)),
        )
        self.handle = handle

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.dll.qvl_adapter_free(self.handle)


Entry = tuple[Sequence[int], int, int, Sequence[int]]
"""A sequence of a batch: its new tokens, n_past, prompt_len, block table.

n_past: number of earlier tokens, whose keys and values are in the pool; prompt_len: length of the entire prompt.
"""


class Pool:
    """A KV block pool, and forward passes and steps on it."""

    def __init__(self, engine: Engine, n_blocks: int, block_tokens: int, dtype: int) -> None:
        self.engine, self.block_tokens, self.dtype = engine, block_tokens, dtype
        handle = c_void_p()
        engine.library.call(
            "qvl_kv_pool_create", engine.handle, n_blocks, block_tokens, dtype, ctypes.byref(handle)
        )
        self.handle = handle

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.library.dll.qvl_kv_pool_free(self.handle)

    def batch(
        self,
        entries: Sequence[Entry],
        spans: Sequence[tuple[int, np.ndarray]] = (),
        flags: Sequence[int] = (),
        adapters: Sequence[Adapter | None] = (),
    ) -> Batch:
        """Make the C struct of a batch; spans: (first position among all tokens of the batch, features)."""
        tables = [np.asarray(table, np.int32) for _, _, _, table in entries]
        sequences = (Sequence_ * len(entries))()
        for sequence, (tokens, n_past, prompt_len, _), table in zip(sequences, entries, tables):
            sequence.n_new, sequence.n_past, sequence.prompt_len = len(tokens), n_past, prompt_len
            sequence.n_blocks, sequence.blocks = len(table), int_pointer(table)
        for sequence, flag in zip(sequences, flags):
            sequence.flags = flag
        for sequence, adapter in zip(sequences, adapters):
            sequence.adapter = adapter.handle if adapter is not None else None
        ids = np.concatenate([np.asarray(tokens, np.int32) for tokens, _, _, _ in entries])
        c_spans = make_spans(spans)
        batch = Batch(ctypes.sizeof(Batch), len(entries), sequences, pointer(ids), len(c_spans), 0, c_spans)
        batch.sequence_size, batch.span_size = ctypes.sizeof(Sequence_), ctypes.sizeof(Span)
        batch.keep_alive = tables, ids  # the structs have pointers to these arrays
        return batch

    def forward(
        self,
        entries: Sequence[Entry],
        spans: Sequence[tuple[int, np.ndarray]] = (),
        logits: bool = True,
        flags: Sequence[int] = (),
        adapters: Sequence[Adapter | None] = (),
    ) -> np.ndarray:
        """Run a forward pass and return the logits [rows, vocab] of the entries without NO_LOGITS.

        With logits=False the engine computes none, and the returned values are NaN.
        """
        rows = len(entries) - sum(flag & NO_LOGITS for flag in flags)
        output = np.full([rows, self.engine.config.vocab], np.nan, np.float32)
        self.engine.library.call(
            "qvl_forward",
            *(self.engine.handle, self.handle, self.batch(entries, spans, flags, adapters)),
            *(pointer(output) if logits else None, None),
        )
        return output

    def step(
        self,
        entries: Sequence[Entry],
        sampling: Sequence[Sampling],
        spans: Sequence[tuple[int, np.ndarray]] = (),
        flags: Sequence[int] = (),
        counts: Sequence[np.ndarray | None] | None = None,
        n_logprobs: int = 0,
    ) -> Step:
        """Run a forward pass and sample a token for each entry without NO_LOGITS."""
        n = len(sampling)
        step = Step(
            np.full(n, -9, np.int32),  # -9: not written by the engine
            np.empty(n, np.float32),
            np.empty([n, n_logprobs], np.int32),
            np.empty([n, n_logprobs], np.float32),
            np.full([n, self.engine.config.vocab], np.nan, np.float32),
        )
        args = StepArgs(size=ctypes.sizeof(StepArgs), sampling_size=ctypes.sizeof(Sampling))
        args.batch, args.rows = ctypes.pointer(self.batch(entries, spans, flags)), n
        args.sampling, args.n_logprobs = (Sampling * n)(*sampling), n_logprobs
        count_pointers = None
        if counts is not None:
            count_pointers = (c_void_p * n)(*(None if row is None else pointer(row) for row in counts))
            args.counts = ctypes.addressof(count_pointers)
        args.tokens, args.logprobs, args.top_tokens, args.top_logprobs, args.logits = map(pointer, step)
        self.engine.library.call("qvl_step", self.engine.handle, self.handle, args, None)
        return step

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        from_, to = np.asarray(sources, np.int32), np.asarray(targets, np.int32)
        self.engine.library.call(
            "qvl_kv_copy_blocks", self.handle, len(from_), pointer(from_), pointer(to), None
        )

    def read_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        """Copy blocks to host memory, uint8."""
        numbers = np.asarray(blocks, np.int32)
        pool = self.engine.handle, len(numbers), self.block_tokens, self.dtype
        host = np.zeros(self.engine.library.dll.qvl_kv_pool_bytes(*pool), np.uint8)
        self.engine.library.call(
            "qvl_kv_read_blocks",
            self.handle,
            len(numbers),
            pointer(numbers),
            pointer(host),
            host.nbytes,
            None,
        )
        return host

    def write_blocks(self, blocks: Sequence[int], host: np.ndarray) -> None:
        numbers = np.asarray(blocks, np.int32)
        self.engine.library.call(
            "qvl_kv_write_blocks",
            self.handle,
            len(numbers),
            pointer(numbers),
            pointer(host),
            host.nbytes,
            None,
        )


class Step(NamedTuple):
    """Output of a step, a row for each entry without NO_LOGITS."""

    tokens: np.ndarray  # int32 [rows]
    logprobs: np.ndarray  # float32 [rows]
    top_tokens: np.ndarray  # int32 [rows, n_logprobs]
    top_logprobs: np.ndarray  # float32 [rows, n_logprobs]
    logits: np.ndarray  # float32 [rows, vocab]
