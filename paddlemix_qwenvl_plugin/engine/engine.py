"""Python objects for the engine library's weights, engines, KV pools, adapters, device arrays and step outputs.

An object frees its C counterpart when it is garbage-collected.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from ctypes import byref, c_float, c_int32, c_void_p, sizeof
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.engine import library as c
from paddlemix_qwenvl_plugin.util.threads import cpu_threads


class NamedTensor(NamedTuple):
    """A weight in memory: canonical name (qwenvl.h), dtype (a key of library.DTYPES), shape, raw bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


class Weights:
    """The weights of a stage. An engine created from them keeps them alive."""

    def __init__(self, handle: c_void_p, keep: Any = None) -> None:
        self.handle = handle
        self._keep = keep
        weakref.finalize(self, c.load().qvl_weights_free, handle)

    @classmethod
    def open(cls, params: Path) -> Weights:
        """Map a parameter file with tensor names (contract version 3) into memory.

        Raises:
            QwenVLError: the file is missing or damaged, or has no tensor names.
        """
        handle = c_void_p()
        c.call("qvl_weights_open", str(params).encode(), byref(handle))
        return cls(handle)

    @classmethod
    def of(cls, tensors: Sequence[NamedTensor]) -> Weights:
        """Wrap tensors in memory without copying them; qvl_tensor (qwenvl.h) states their alignment."""
        c_tensors = (c.Tensor * len(tensors))()
        for c_tensor, tensor in zip(c_tensors, tensors):
            c_tensor.name = tensor.name.encode()
            c_tensor.data = tensor.data.ctypes.data
            c_tensor.dtype = c.DTYPES[tensor.dtype]
            c_tensor.n_dims = len(tensor.shape)
            c_tensor.shape[: len(tensor.shape)] = tensor.shape
            c_tensor.bytes = tensor.data.nbytes
        handle = c_void_p()
        c.call("qvl_weights_create", c_tensors, len(tensors), sizeof(c.Tensor), byref(handle))
        return cls(handle, tensors)


class Engine:
    """An instance of the engine for one stage, library.VISION or library.LANGUAGE."""

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        stage: int,
        gpu: Optional[int] = None,
    ) -> None:
        """Create an engine on the CPU or a GPU.

        Args:
            gpu: index of the GPU, for which `load` of engine/gpu.py must have been called; None: the CPU.

        Raises:
            QwenVLError: a weight is missing or does not have the shape that the config requires, or the device does not
                support the model or has too little memory.
        """
        vision = config.visual
        self.config = config
        c_config = c.Config(
            size=sizeof(c.Config),
            stages=stage,
            device=c.CPU if gpu is None else c.CUDA,
            device_index=gpu or 0,
            n_threads=cpu_threads(),
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
            mlp_width=config.mlp_width,
            vocab=config.vocab_size,
            norm_epsilon=config.layer_norm_epsilon,
            seq_length=config.seq_length,
            max_positions=config.max_position_embeddings,
            rotary_base=config.rotary_emb_base,
            dynamic_ntk=config.use_dynamic_ntk,
            logn=config.use_logn_attn,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            vision_width=vision.width,
            vision_layers=vision.layers,
            vision_heads=vision.heads,
            vision_mlp_width=vision.mlp_width,
            n_queries=vision.n_queries,
        )
        self.handle = c_void_p()
        c.call("qvl_engine_create", byref(c_config), weights.handle, byref(self.handle))
        self._weights = weights
        weakref.finalize(self, c.load().qvl_engine_free, self.handle)

    def encode_images(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the vision stage: float32 [N, 3, image_size, image_size] -> float32 [N, n_queries, hidden_size].

        An engine on a GPU copies the arrays, and waits for the features.
        """
        features = np.empty([len(pixels), self.config.visual.n_queries, self.config.hidden_size], np.float32)
        c.call("qvl_encode_images", self.handle, len(pixels), pixels.ctypes.data, features.ctypes.data, None)
        return features


def _free_before(engine: Engine, owner: Any, function: Any, *arguments: Any) -> None:
    """Call `function` when `owner` is garbage-collected, before the engine is freed, even if both are in one cycle."""
    # The finalizer's reference keeps the engine alive until the call.
    weakref.finalize(owner, _call, engine, function, arguments)


def _call(_: Engine, function: Any, arguments: tuple[Any, ...]) -> None:
    function(*arguments)


class KvPool:
    """A KV cache of `n_blocks` blocks of `block_tokens` tokens; on a CPU, only written blocks take memory."""

    def __init__(self, engine: Engine, n_blocks: int, block_tokens: int, dtype: str) -> None:
        self.handle = c_void_p()
        c.call(
            "qvl_kv_pool_create", engine.handle, n_blocks, block_tokens, c.DTYPES[dtype], byref(self.handle)
        )
        _free_before(engine, self, c.load().qvl_kv_pool_free, self.handle)

    @staticmethod
    def block_bytes(engine: Engine, block_tokens: int, dtype: str) -> int:
        """Size of a block in bytes: keys and values of all layers."""
        return int(c.load().qvl_kv_pool_bytes(engine.handle, 1, block_tokens, c.DTYPES[dtype]))


class LowRank(NamedTuple):
    """Low-rank update y += scale * B (A x) of a matrix.

    Attributes:
        name: canonical name of the matrix.
        a, b: A [rank, in] and B [out, rank], contiguous; bfloat16 as uint16.
        scale: the factor of B A.
        dtype: storage type of `a` and `b`: float32, bfloat16 or float16.
    """

    name: str
    a: NDArray[Any]
    b: NDArray[Any]
    scale: float
    dtype: str = "float32"


class Adapter:
    """A LoRA adapter of a language-stage engine, separate from the weights; a step applies it to chosen sequences."""

    def __init__(self, engine: Engine, updates: Iterable[LowRank]) -> None:
        """Copy the updates into the engine's memory.

        Raises:
            QwenVLError: an update does not fit its matrix or is not finite, or the device has too little memory.
        """
        update_list = list(updates)  # keeps the arrays alive until they are copied
        matrices = (c.AdapterMatrix * len(update_list))()
        for matrix, update in zip(matrices, update_list):
            matrix.name = update.name.encode()
            matrix.a, matrix.b = update.a.ctypes.data, update.b.ctypes.data
            matrix.dtype = c.DTYPES[update.dtype]
            matrix.scale = update.scale
            matrix.out, matrix.in_, matrix.rank = len(update.b), update.a.shape[1], len(update.a)
        self.handle = c_void_p()
        c.call(
            *("qvl_adapter_create", engine.handle, matrices, len(matrices), sizeof(c.AdapterMatrix)),
            byref(self.handle),
        )
        _free_before(engine, self, c.load().qvl_adapter_free, self.handle)


class DeviceArray:
    """A copy of an array in the memory of the engine's device, at `address`."""

    def __init__(self, engine: Engine, values: NDArray[np.int32]) -> None:
        memory = c_void_p()
        c.call("qvl_alloc", engine.handle, values.nbytes, byref(memory))
        _free_before(engine, self, c.load().qvl_dealloc, engine.handle, memory)
        c.call("qvl_copy", engine.handle, memory, values.ctypes.data, values.nbytes, None)
        self.address = memory.value


class StepOutput:
    """Output buffers of a step for up to `n_rows` rows, in memory accessible to host and device, and the step's event.

    A row has a picked token (int32) and its log probability (float32), and the same of the `n_top` most likely tokens.
    `tokens`, `logprobs`, `top_tokens` and `top_logprobs` are the addresses of the buffers.
    """

    def __init__(self, engine: Engine, n_rows: int, n_top: int) -> None:
        memory, self._event = c_void_p(), c_void_p()
        # Each row has 2 + 2 * n_top values of 4 bytes.
        c.call("qvl_host_alloc", engine.handle, 4 * n_rows * (2 + 2 * n_top), byref(memory))
        _free_before(engine, self, c.load().qvl_host_free, engine.handle, memory)
        c.call("qvl_event_create", engine.handle, byref(self._event))
        _free_before(engine, self, c.load().qvl_event_free, self._event)
        assert memory.value is not None
        self.tokens = memory.value
        self.logprobs = self.tokens + 4 * n_rows
        self.top_tokens = self.logprobs + 4 * n_rows
        self.top_logprobs = self.top_tokens + 4 * n_rows * n_top
        self._tokens = (c_int32 * n_rows).from_address(self.tokens)
        self._logprobs = (c_float * n_rows).from_address(self.logprobs)
        self._top_tokens = (c_int32 * (n_rows * n_top)).from_address(self.top_tokens)
        self._top_logprobs = (c_float * (n_rows * n_top)).from_address(self.top_logprobs)

    def record(self) -> None:
        """Record the event after a step that writes to these buffers."""
        c.call("qvl_event_record", self._event, None)

    def wait(self, n_tokens: int) -> list[int]:
        """Wait for the step to end and return the first `n_tokens` tokens.

        Raises:
            QwenVLError: the step failed.
        """
        c.call("qvl_event_wait", self._event)
        return self._tokens[:n_tokens]

    def logprob(self, row: int) -> float:
        """Log probability of a row's token. Call after `wait`, for a step that computes log probabilities."""
        return self._logprobs[row]

    def top(self, row: int, n: int, n_written: int) -> list[tuple[int, float]]:
        """(token, log probability) of the n most likely tokens of a row. Call after `wait`.

        Args:
            row: index of the row.
            n: number of tokens to return.
            n_written: number of most likely tokens per row that the step wrote, at least n.
        """
        entries = slice(row * n_written, row * n_written + n)
        return list(zip(self._top_tokens[entries], self._top_logprobs[entries]))
