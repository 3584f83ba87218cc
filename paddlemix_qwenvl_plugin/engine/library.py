"""The C interface of the engine (csrc/include/qwenvl.h) through ctypes; calls release Python's GIL."""

from __future__ import annotations

import ctypes
import functools
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any, Optional

from paddlemix_qwenvl_plugin.engine.build import library as library_path
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

DTYPES = {
    "float32": 0,
    "bfloat16": 1,
    "int8": 2,
    "int4_g64": 3,
    "int4_g128": 4,
    "float16": 5,
    "uint4_g32": 6,
    "uint4_g64": 7,
    "uint4_g128": 8,
    "uint8_g32": 9,
    "uint8_g64": 10,
    "uint8_g128": 11,
    "int32": 12,
}
"""Codes in qvl_dtype of the storage types, and of int32, the type of input orders."""

CPU, CUDA = 0, 1
"""Devices: QVL_DEVICE_*."""

VISION, LANGUAGE = 1, 2
"""Stages: QVL_STAGE_*."""

NO_LOGITS, GENERATED = 1, 2
"""Flags of a sequence: QVL_SEQUENCE_*."""


class Error(Structure):
    """The struct qvl_error: a one-line error message."""

    _fields_ = [("message", c_char * 512)]


class Config(Structure):
    """The struct qvl_config: sizes of the model, and the device of an engine."""

    _fields_ = [
        ("size", c_uint32),
        ("stages", c_uint32),
        ("device", c_int32),
        ("device_index", c_int32),
        ("n_threads", c_int32),
        ("isa", c_int32),
        ("max_tokens", c_int32),
        ("hidden", c_int32),
        ("layers", c_int32),
        ("heads", c_int32),
        ("head_dim", c_int32),
        ("mlp_width", c_int32),
        ("vocab", c_int32),
        ("norm_epsilon", c_float),
        ("seq_length", c_int32),
        ("max_positions", c_int32),
        ("rotary_base", c_float),
        ("dynamic_ntk", c_int32),
        ("logn", c_int32),
        ("image_size", c_int32),
        ("patch_size", c_int32),
        ("vision_width", c_int32),
        ("vision_layers", c_int32),
        ("vision_heads", c_int32),
        ("vision_mlp_width", c_int32),
        ("n_queries", c_int32),
        ("compute", c_int32),
    ]


class Tensor(Structure):
    """The struct qvl_tensor: name, data, storage type, device and shape of a weight."""

    _fields_ = [
        ("name", c_char_p),
        ("data", c_void_p),
        ("dtype", c_int32),
        ("device", c_int32),
        ("n_dims", c_int32),
        ("shape", c_int64 * 4),
        ("bytes", c_uint64),
    ]


class DeviceInfo(Structure):
    """The struct qvl_device_info: name, memory and capabilities of a CPU or a GPU."""

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


class SequenceRow(Structure):
    """The struct qvl_sequence: tokens of one sequence in a batch, with the blocks and the adapter of the sequence."""

    _fields_ = [
        ("n_new", c_int32),
        ("n_past", c_int32),
        ("prompt_len", c_int32),
        ("n_blocks", c_int32),
        ("blocks", c_void_p),
        ("flags", c_uint32),
        ("reserved", c_uint32),
        ("adapter", c_void_p),
    ]


class AdapterMatrix(Structure):
    """The struct qvl_adapter_matrix: an adapter's low-rank update of one matrix."""

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


class Span(Structure):
    """The struct qvl_span: tokens of a batch that are vectors (image features) instead of ids."""

    _fields_ = [("start", c_int32), ("count", c_int32), ("features", c_void_p)]


class Batch(Structure):
    """The struct qvl_batch: the sequences of a step, with their tokens and spans."""

    _fields_ = [
        ("size", c_uint32),
        ("n_sequences", c_int32),
        ("sequences", c_void_p),
        ("tokens", c_void_p),
        ("n_spans", c_int32),
        ("reserved", c_int32),
        ("spans", c_void_p),
        ("sequence_size", c_uint32),
        ("span_size", c_uint32),
    ]


class Sampling(Structure):
    """The struct qvl_sampling: sampling parameters of one row of logits."""

    _fields_ = [
        ("size", c_uint32),
        ("temperature", c_float),
        ("top_p", c_float),
        ("top_k", c_int32),
        ("repetition_penalty", c_float),
        ("frequency_penalty", c_float),
        ("presence_penalty", c_float),
        ("n_forbidden", c_int32),
        ("forbidden", c_void_p),
        ("seed", c_uint64),
        ("counter", c_uint64),
    ]


class StepArgs(Structure):
    """The struct qvl_step_args: a batch, its sampling parameters, and the buffers for the results of the step."""

    _fields_ = [
        ("size", c_uint32),
        ("sampling_size", c_uint32),
        ("batch", POINTER(Batch)),
        ("rows", c_int32),
        ("n_logprobs", c_int32),
        ("sampling", c_void_p),
        ("counts", c_void_p),
        ("tokens", c_void_p),
        ("logprobs", c_void_p),
        ("top_tokens", c_void_p),
        ("top_logprobs", c_void_p),
        ("logits", c_void_p),
    ]


_HANDLE, _ERROR = c_void_p, POINTER(Error)

# Functions that this package calls -> (type of the result, types of the arguments).
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "qvl_packed_bytes": (c_uint64, [c_int32, c_int64, c_int64]),
    "qvl_pack": (c_int32, [c_int32, c_int64, c_int64, c_void_p, c_void_p, c_uint64, _ERROR]),
    "qvl_pack_groups": (
        c_int32,
        [c_int32, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_uint64, _ERROR],
    ),
    "qvl_get_device_info": (c_int32, [c_int32, c_int32, POINTER(DeviceInfo), _ERROR]),
    "qvl_weights_create": (c_int32, [POINTER(Tensor), c_int64, c_uint32, POINTER(_HANDLE), _ERROR]),
    "qvl_weights_open": (c_int32, [c_char_p, POINTER(_HANDLE), _ERROR]),
    "qvl_weights_free": (None, [_HANDLE]),
    "qvl_engine_create": (c_int32, [POINTER(Config), _HANDLE, POINTER(_HANDLE), _ERROR]),
    "qvl_engine_free": (None, [_HANDLE]),
    "qvl_adapter_create": (
        c_int32,
        [_HANDLE, POINTER(AdapterMatrix), c_int64, c_uint32, POINTER(_HANDLE), _ERROR],
    ),
    "qvl_adapter_free": (None, [_HANDLE]),
    "qvl_alloc": (c_int32, [_HANDLE, c_uint64, POINTER(c_void_p), _ERROR]),
    "qvl_dealloc": (None, [_HANDLE, c_void_p]),
    "qvl_copy": (c_int32, [_HANDLE, c_void_p, c_void_p, c_uint64, c_void_p, _ERROR]),
    "qvl_host_alloc": (c_int32, [_HANDLE, c_uint64, POINTER(c_void_p), _ERROR]),
    "qvl_host_free": (None, [_HANDLE, c_void_p]),
    "qvl_event_create": (c_int32, [_HANDLE, POINTER(_HANDLE), _ERROR]),
    "qvl_event_record": (c_int32, [_HANDLE, c_void_p, _ERROR]),
    "qvl_event_wait": (c_int32, [_HANDLE, _ERROR]),
    "qvl_event_free": (None, [_HANDLE]),
    "qvl_encode_images": (c_int32, [_HANDLE, c_int64, c_void_p, c_void_p, c_void_p, _ERROR]),
    "qvl_kv_pool_create": (c_int32, [_HANDLE, c_int32, c_int32, c_int32, POINTER(_HANDLE), _ERROR]),
    "qvl_kv_pool_bytes": (c_uint64, [_HANDLE, c_int32, c_int32, c_int32]),
    "qvl_kv_pool_free": (None, [_HANDLE]),
    "qvl_sampling_init": (None, [POINTER(Sampling)]),
    "qvl_step": (c_int32, [_HANDLE, _HANDLE, POINTER(StepArgs), c_void_p, _ERROR]),
}


@functools.cache
def load() -> ctypes.CDLL:
    """Load the engine's library, built now if necessary, and declare the signatures of its functions.

    Raises:
        QwenVLError: the library cannot be built.
    """
    # RTLD_GLOBAL, so that the calls from the operators for Paddle (csrc/paddle) resolve to this library.
    library = ctypes.CDLL(str(library_path()), mode=ctypes.RTLD_GLOBAL)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def call(function: str, *arguments: Any) -> None:
    """Call a function of the engine that returns a qvl_status and takes a qvl_error as its last argument.

    Raises:
        QwenVLError: the function failed; the message is the engine's.
    """
    error = Error()
    if getattr(load(), function)(*arguments, byref(error)):
        raise failure(error)


def failure(error: Error) -> QwenVLError:
    """Create an exception with the engine's error message."""
    return QwenVLError(error.message.decode("utf-8", "replace"))


def device_info(gpu: Optional[int] = None) -> DeviceInfo:
    """Query the GPU with index `gpu`; None: the CPU and the memory available to this process. Errors as for `call`."""
    info = DeviceInfo(size=ctypes.sizeof(DeviceInfo))
    call("qvl_get_device_info", CPU if gpu is None else CUDA, gpu or 0, byref(info))
    return info
