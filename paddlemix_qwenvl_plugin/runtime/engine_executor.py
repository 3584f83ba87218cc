"""Executor on the engine: one call computes a batch of prompts, chunks of prompts and decode steps."""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.artifact.params_file import read_tensors
from paddlemix_qwenvl_plugin.checkpoint.adapter import Adapter as AdapterFolder
from paddlemix_qwenvl_plugin.engine import library as c
from paddlemix_qwenvl_plugin.engine.engine import (
    Adapter,
    DeviceArray,
    Engine,
    KvPool,
    NamedTensor,
    StepOutput,
    Weights,
)
from paddlemix_qwenvl_plugin.runtime.adapters import low_rank
from paddlemix_qwenvl_plugin.runtime.executor import Picked
from paddlemix_qwenvl_plugin.runtime.generation import MAX_LOGPROBS, Generation, TokenLogprobs
from paddlemix_qwenvl_plugin.runtime.gpu_memory import check_room
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.programs import Stage
from paddlemix_qwenvl_plugin.runtime.scheduler import Chunk, Limits, images_of
from paddlemix_qwenvl_plugin.util.memory import address_space_left

_BLOCK_TOKENS = 32  # tokens of a block of the KV cache
# Maximum number of tokens in a step, on a CPU and on a GPU: one pass of the engine (qvl_config.max_tokens).
_STEP_TOKENS = 512
_GPU_STEP_TOKENS = 2048
_MAX_RUNNING = 256  # maximum number of requests in a step, as in the engine's CUDA graphs

# Size of the KV cache on a CPU, as a share of the memory free when the executor is created, if this is enough for a
# request of the full context. The operating system commits the memory only as the cache fills.
_CACHE_SHARE = 0.25
# Maximum size of the KV cache on any device, in requests of the full context, unless `n_blocks` is given.
_CACHE_CONTEXTS = 64

# Numbers that identify _RequestState objects: unlike id(), a number is never used again for a later object.
_state_numbers = itertools.count()


class EngineExecutor:
    """Executor on the engine, on the CPU or a GPU, with a paged KV cache."""

    def __init__(
        self,
        vision: Stage,
        language: Stage,
        n_blocks: int | None = None,
        gpu_memory: float = 0.9,
        ahead: bool | None = None,
        adapters: Mapping[str, AdapterFolder] | None = None,
    ) -> None:
        """Create an executor; the vision stage is loaded at its first use, on a GPU immediately.

        Args:
            vision: the vision stage.
            language: the language stage.
            n_blocks: size of the KV cache in blocks; None: a share of the free memory, but at least one and at most 64
                requests of the full context.
            gpu_memory: on a GPU, the share of the memory left by the weights that the KV cache takes if `n_blocks` is
                None; in any case, one request of the full context must fit into this share.
            ahead: start a step while the previous one is computed (loop.py); None: on a GPU only.
            adapters: adapters by the names with which requests choose them.

        Raises:
            QwenVLError: there is too little memory, or the engine does not support the model or an adapter.
        """
        self._vision_stage = vision
        self._gpu = gpu = language.gpu
        self._ahead = gpu is not None if ahead is None else ahead
        config = language.manifest.config
        self._vocab_size = config.vocab_size
        # Dtype of the KV cache; on a GPU, the compute type that the engine chooses.
        dtype = "float32" if language.manifest.dtype == "float32" else "bfloat16"
        step_tokens = _STEP_TOKENS
        if gpu is not None:
            device = c.device_info(gpu)
            check_room(vision, language, device.free_bytes, gpu_memory)
            use_bfloat16 = device.compute_major >= 8 and language.manifest.dtype != "float16"
            dtype = "bfloat16" if use_bfloat16 else "float16"
            step_tokens = _GPU_STEP_TOKENS
            _ = self._vision  # load it before the cache, which gets a share of the memory left by both stages
        self._language = self._engine(language, c.LANGUAGE)
        self._adapters = {
            name: Adapter(self._language, low_rank(adapter)) for name, adapter in (adapters or {}).items()
        }
        context_blocks = -(-config.max_position_embeddings // _BLOCK_TOKENS)
        if n_blocks is None:
            block_bytes = KvPool.block_bytes(self._language, _BLOCK_TOKENS, dtype)
            share = _CACHE_SHARE if gpu is None else gpu_memory
            affordable = int(_free_bytes(gpu) * share) // block_bytes
            n_blocks = max(context_blocks, min(affordable, _CACHE_CONTEXTS * context_blocks))
        self._pool = KvPool(self._language, n_blocks, _BLOCK_TOKENS, dtype)
        self.limits = Limits(_MAX_RUNNING, step_tokens, n_blocks, _BLOCK_TOKENS, ahead=self._ahead)
        self._states: dict[Generation, _RequestState] = {}
        self._batch = c.Batch(
            size=ctypes.sizeof(c.Batch),
            sequence_size=ctypes.sizeof(c.SequenceRow),
            span_size=ctypes.sizeof(c.Span),
        )
        self._args = c.StepArgs(
            size=ctypes.sizeof(c.StepArgs),
            sampling_size=ctypes.sizeof(c.Sampling),
            batch=ctypes.pointer(self._batch),
        )
        # Every step with top tokens computes this number of them: each number would need its own CUDA graph.
        self._n_top = min(MAX_LOGPROBS, config.vocab_size)
        # The last element was written by the latest step; a step that is started ahead reads its input tokens from it.
        self._outputs = [
            StepOutput(self._language, _MAX_RUNNING, self._n_top) for _ in range(1 + self._ahead)
        ]
        self._capacity = 0
        self._sequences = (c.SequenceRow * 0)()
        self._sampling = (c.Sampling * 0)()
        self._grow(8)
        self._step = c.load().qvl_step
        self._error = c.Error()

    @cached_property
    def _vision(self) -> Engine:
        return self._engine(self._vision_stage, c.VISION)

    def _engine(self, stage: Stage, which: int) -> Engine:
        return Engine(_weights(stage), stage.manifest.config, which, self._gpu)

    def load(self, vision: bool) -> None:
        """Load the vision stage if `vision`; the language stage is loaded already."""
        if vision:
            _ = self._vision

    def encode_image(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode an image: float32 [3, image_size, image_size] -> float32 [n_queries, hidden_size]."""
        features: NDArray[np.float32]
        [features] = self._vision.encode_images(pixels[None])
        return features

    def start(self, chunks: Sequence[Chunk]) -> Callable[[], Picked]:
        """Start a step (see Executor); unless steps are started ahead, the step has ended when this returns."""
        tokens: list[int] = []
        spans: list[tuple[int, int, NDArray[np.float32]]] = []
        counts: list[int | None] = []
        n_logprobs: list[int | None] = []
        n_entries = n_rows = 0  # entries of the batch, and rows of the logits
        for chunk in chunks:
            generation = chunk.generation
            state = self._states.get(generation) or self._new_state(generation)
            start = generation.n_computed
            if chunk.ahead:  # the token that the running step picks follows all known ones
                self._put(n_entries, state, generation.n_total, 1, picks=True, generated=False)
                n_entries += 1
            elif generation.decoding:
                self._put(n_entries, state, start, 1, picks=True, generated=False)
                n_entries += 1
                tokens.append(generation.tokens[-1])
            else:
                end = start + chunk.n
                for first, last, generated in generation.entries(start, end):
                    self._put(n_entries, state, first, last - first, chunk.picks and last == end, generated)
                    n_entries += 1
                for image, first, last in images_of(generation, start, end):
                    assert image.features is not None
                    features = image.features[first - image.slots[0] : last - image.slots[0]]
                    spans.append((len(tokens) + first - start, last - first, features))
                tokens += generation.ids(start, end)
            if chunk.picks:
                self._put_sampling(n_rows, state, len(generation.tokens) + chunk.ahead)
                counts.append(state.counts_address)
                n_logprobs.append(generation.n_logprobs)
                n_rows += 1
        output = self._run(tokens, spans, counts, n_logprobs, n_entries)
        output.record()
        if not self._ahead:
            picked = self._read(output, n_logprobs)
            return lambda: picked
        return lambda: self._read(output, n_logprobs)

    def check_device(self) -> None:
        """Raise an error if the GPU is unusable after a fault, which a copy to it detects."""
        DeviceArray(self._language, np.zeros(1, np.int32))

    def forget(self, generation: Generation) -> None:
        """Free the state of a request."""
        self._states.pop(generation, None)

    def _new_state(self, generation: Generation) -> _RequestState:
        engine = self._language if self._ahead else None
        adapter = None if generation.adapter is None else self._adapters[generation.adapter].handle.value
        state = self._states[generation] = _RequestState(generation, self._vocab_size, engine, adapter)
        return state

    def _put(
        self, i: int, state: _RequestState, n_past: int, n_new: int, picks: bool, generated: bool
    ) -> None:
        """Write entry `i` of the batch, a range of a request's tokens.

        `n_past` is always written, the other fields only if one of them differs from what the entry contains.
        `generated`: compute the entry's tokens as decode steps, as tokens after the prompt always are (qwenvl.h).
        """
        if i == self._capacity:
            self._grow(2 * self._capacity)
        entry = self._entry_views[i]
        entry.n_past = n_past
        key = (state.number, state.update_blocks(), n_new, picks, generated)
        if self._written_entries[i] != key:
            self._written_entries[i] = key
            entry.n_new = n_new
            entry.prompt_len = state.prompt_len
            entry.n_blocks = state.n_blocks
            entry.blocks = state.blocks_address
            entry.adapter = state.adapter
            entry.flags = (0 if picks else c.NO_LOGITS) | (c.GENERATED if generated else 0)

    def _put_sampling(self, i: int, state: _RequestState, n_tokens: int) -> None:
        """Write the sampling parameters of row `i` of the logits; the request has `n_tokens` generated tokens."""
        stop_forbidden = state.stop_forbidden(n_tokens)
        sampling = self._sampling_views[i]
        if self._written_sampling[i] != (state.number, stop_forbidden):
            self._written_sampling[i] = state.number, stop_forbidden
            self._sampling[i] = state.sampling(stop_forbidden)
        sampling.counter = n_tokens

    def _run(
        self,
        tokens: list[int],
        spans: list[tuple[int, int, NDArray[np.float32]]],
        counts: list[int | None],
        n_logprobs: list[int | None],
        n_entries: int,
    ) -> StepOutput:
        """Start a step and return its output buffers.

        If `tokens` is empty, all chunks are `ahead`, and the step takes the previous step's picks.
        """
        batch, args, n_rows = self._batch, self._args, len(counts)
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        batch.n_sequences = n_entries
        batch.tokens = ctypes.addressof(ids) if tokens else self._outputs[-1].tokens
        self._outputs.reverse()
        output = self._outputs[-1]
        args.tokens = output.tokens
        args.n_logprobs = self._n_top if any(n_logprobs) else 0  # any: a request wants more than 0 top tokens
        with_logprobs = any(n is not None for n in n_logprobs)
        args.logprobs = output.logprobs if with_logprobs else None
        args.top_tokens = output.top_tokens if args.n_logprobs else None
        args.top_logprobs = output.top_logprobs if args.n_logprobs else None
        batch.n_spans = len(spans)
        span_array = (c.Span * len(spans))()
        for span, (start, n_tokens, features) in zip(span_array, spans):
            span.start, span.count, span.features = start, n_tokens, features.ctypes.data
        batch.spans = ctypes.addressof(span_array)
        args.rows = n_rows
        addresses = (ctypes.c_void_p * n_rows)(*counts) if any(counts) else None
        args.counts = ctypes.addressof(addresses) if addresses is not None else None
        if self._step(self._language.handle, self._pool.handle, self._args, None, self._error):
            raise c.failure(self._error)
        return output

    def _read(self, output: StepOutput, n_logprobs: list[int | None]) -> Picked:
        """Wait for a step and read its output."""
        tokens = output.wait(len(n_logprobs))
        if all(n is None for n in n_logprobs):
            return Picked(tokens)
        n_written = self._n_top if any(n_logprobs) else 0
        return Picked(
            tokens,
            [
                None if n is None else TokenLogprobs(output.logprob(i), tuple(output.top(i, n, n_written)))
                for i, n in enumerate(n_logprobs)
            ],
        )

    def _grow(self, capacity: int) -> None:
        """Enlarge the batch to `capacity` entries and as many rows of the logits."""
        self._capacity = capacity
        self._sequences = (c.SequenceRow * capacity)(*self._sequences)
        self._sampling = (c.Sampling * capacity)(*self._sampling)
        # Views of the array elements, and what was last written to them.
        self._entry_views, self._sampling_views = list(self._sequences), list(self._sampling)
        self._written_entries: list[Any] = [None] * capacity
        self._written_sampling: list[Any] = [None] * capacity
        self._batch.sequences = ctypes.addressof(self._sequences)
        self._args.sampling = ctypes.addressof(self._sampling)


class _RequestState:
    """Engine input of a request that persists across steps: block table, adapter, sampling parameters, counts."""

    def __init__(
        self, generation: Generation, vocab_size: int, counts_engine: Engine | None, adapter: int | None
    ) -> None:
        """Create the state of a request.

        Args:
            generation: the request.
            vocab_size: size of the vocabulary; if penalties are set, each of its tokens has a count.
            counts_engine: the engine in whose device memory the counts are; None: in a NumPy array.
            adapter: address of the engine's adapter; None: no adapter.
        """
        self.number = next(_state_numbers)
        self.adapter = adapter
        self._generation = generation
        options = generation.options
        self.prompt_len = len(generation.prompt)
        self._blocks: list[int] = []
        self._table: Any = (ctypes.c_int32 * 0)()
        self.n_blocks = 0
        self._version = 0
        self.blocks_address = 0
        stop = [token for token in generation.stop_token_ids if 0 <= token < vocab_size]
        self._forbidden = (ctypes.c_int32 * len(stop))(*stop)
        self._sampling = _sampling(options)
        self._counts: NDArray[np.int32] | DeviceArray | None = None
        self.counts_address: int | None = None
        if (options.repetition_penalty, options.frequency_penalty, options.presence_penalty) != (1, 0, 0):
            # After an interrupted step (loop.py), the state of a request that has generated tokens is created again.
            counts = np.bincount(generation.tokens, minlength=vocab_size).astype(np.int32)
            if counts_engine is None:
                self._counts, self.counts_address = counts, counts.ctypes.data
            else:
                self._counts = DeviceArray(counts_engine, counts)
                self.counts_address = self._counts.address

    def update_blocks(self) -> int:
        """Update the block table and return its version, which changes with the table."""
        blocks = self._generation.blocks
        if blocks is not self._blocks:  # the first step, or new blocks after a preemption
            self._blocks = blocks
            self.n_blocks = 0
            self._version += 1
        if len(blocks) != self.n_blocks:
            if len(blocks) > len(self._table):
                self._table = (ctypes.c_int32 * (2 * len(blocks)))(*blocks)
                self.blocks_address = ctypes.addressof(self._table)
            else:
                self._table[self.n_blocks : len(blocks)] = blocks[self.n_blocks :]
            self.n_blocks = len(blocks)
            self._version += 1
        return self._version

    def stop_forbidden(self, n_tokens: int) -> bool:
        """Whether stop tokens are forbidden after `n_tokens` generated tokens."""
        return n_tokens < self._generation.options.min_new_tokens

    def sampling(self, stop_forbidden: bool) -> c.Sampling:
        """The sampling parameters, without the counter."""
        sampling = self._sampling
        sampling.n_forbidden = len(self._forbidden) if stop_forbidden else 0
        sampling.forbidden = ctypes.addressof(self._forbidden)
        return sampling


def _sampling(options: GenerationOptions) -> c.Sampling:
    sampling = c.Sampling(size=ctypes.sizeof(c.Sampling))
    c.load().qvl_sampling_init(sampling)
    if not options.greedy:
        sampling.temperature = 1.0 if options.temperature is None else options.temperature
        sampling.top_p = 1.0 if options.top_p is None else options.top_p
        sampling.top_k = min(options.top_k or 0, 2**31 - 1)
    sampling.repetition_penalty = options.repetition_penalty
    sampling.frequency_penalty = options.frequency_penalty
    sampling.presence_penalty = options.presence_penalty
    seed = random.SystemRandom().getrandbits(64) if options.seed is None else options.seed
    sampling.seed = seed % 2**64
    return sampling


def _free_bytes(gpu: int | None) -> int:
    """Free memory in bytes of a GPU; None: of the machine, at most what the process's address space limit leaves."""
    free = int(c.device_info(gpu).free_bytes)
    left = address_space_left() if gpu is None else None
    return free if left is None else min(free, left)


def _weights(stage: Stage) -> Weights:
    """Open the weights of a stage: mapped, or read into memory for exports before contract version 3."""
    if stage.manifest.contract >= 3:
        return Weights.open(stage.params)
    return Weights.of(
        [
            NamedTensor(entry.name, entry.dtype, entry.shape, _read(stage, entry.offset, entry.n_bytes))
            for entry in read_tensors(stage.params, stage.manifest)
        ]
    )


def _read(stage: Stage, offset: int, n_bytes: int) -> NDArray[np.uint8]:
    """Read a range of the parameter file into memory aligned to 64 bytes."""
    buffer = np.empty(n_bytes + 63, np.uint8)
    aligned = buffer[-buffer.ctypes.data % 64 :][:n_bytes]
    with stage.params.open("rb") as file:
        file.seek(offset)
        file.readinto(aligned.data)
    return aligned
