"""Benchmark of the engine on a GPU through its C interface: prints a line of JSON for each row of run.py's table.

    python ours.py --type bf16

run.py starts this script for each storage type, and tests/cuda/check.sh for bf16; adapters.py and flow.py import from
it. Weights, images and tokens are PyTorch tensors on the GPU, passed as pointers. Each step of a caption reads the
token of the previous step from GPU memory, so the host does not wait between steps. With types other than bf16 the rows
`vision` are omitted, since the vision stage is not quantized. Environment variables: QWENVL_LIBRARY is the path of
libqwenvl.so, with libqwenvl_cuda.so in the same folder; QWENVL_CUDA_KERNELS is the folder of the kernels.

With --open FOLDER, the script only times the opening of the bfloat16 model. It writes the model's parameter files
(19 GB) to FOLDER and removes them at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import math
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import (
    CAPTION_ROW,
    DEVICE,
    EPSILON,
    NEW_TOKENS,
    OPEN_ROW,
    PROMPT,
    PROMPT_ROWS,
    REQUESTS,
    REQUESTS_ROW,
    STEPS,
    STORAGES,
    VISION_ROWS,
    Sizes,
    bytes_of,
    image_sets,
    kind_of,
    language_shapes,
    random,
    random_ids,
    step_row,
    vision_shapes,
)
from timing import measure, measure_waiting, note, report

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "csrc"))

from engine import (
    BFLOAT16,
    DTYPES,
    LANGUAGE,
    VISION,
    Batch,
    Config,
    Engine,
    Library,
    Pool,
    Sampling,
    Sequence_,
    Span,
    StepArgs,
    Tensor,
    Weights,
    int_pointer,
)

GPU = 1  # QVL_DEVICE_CUDA
BLOCK = 32  # tokens of a KV cache block
# qvl_dtype by the storage types of model.kind_of.
DTYPE_OF_KIND = {"bf16": BFLOAT16, "int8": DTYPES["int8"], "int4_g64": DTYPES["int4_g64"]}


def config_of(sizes: Sizes, stages: int) -> Config:
    return Config(
        size=ctypes.sizeof(Config),
        stages=stages,
        device=GPU,
        hidden=sizes.hidden,
        layers=sizes.layers,
        heads=sizes.heads,
        head_dim=sizes.head_dim,
        mlp_width=sizes.mlp,
        vocab=sizes.vocab,
        norm_epsilon=EPSILON,
        seq_length=2048,
        max_positions=8192,
        rotary_base=10000,
        dynamic_ntk=1,
        logn=1,
        image_size=sizes.image,
        patch_size=sizes.patch,
        vision_width=sizes.vision_width,
        vision_layers=sizes.vision_layers,
        vision_heads=sizes.vision_heads,
        vision_mlp_width=sizes.vision_mlp,
        n_queries=sizes.queries,
    )


def packed(name: str, shape: tuple[int, ...], kind: str) -> Any:
    """Random weight in the engine's packed layout (qvl_packed_bytes), with the magnitude of model.random's values.

    For an integer type the values come first, then the scales.
    """
    if kind == "bf16":
        return random(name, shape)
    n_out, n_in = shape
    padded = math.ceil(n_in / 128) * 128  # rows of integers are padded to a multiple of 128
    n_values = n_out * padded // (1 if kind == "int8" else 2)
    data = torch.empty(bytes_of(kind, shape), dtype=torch.uint8, device=DEVICE)
    data[:n_values].random_(0, 256)
    deviation = 73.9 if kind == "int8" else 4.6  # standard deviation of uniform 8-bit or 4-bit integers
    scales = data[n_values:].view(torch.float32 if kind == "int8" else torch.bfloat16)
    scales.fill_(0.5 / n_in**0.5 / deviation)
    return data


class RandomWeights(Weights):
    """Random weights in GPU memory."""

    def __init__(self, library: Library, sizes: Sizes, storage: str) -> None:
        shapes = {**language_shapes(sizes), **vision_shapes(sizes)}
        tensors = (Tensor * len(shapes))()
        self._data = []  # keeps the memory, to which the engine has only pointers
        for tensor, (name, shape) in zip(tensors, shapes.items()):
            kind = kind_of(name, shape, storage)
            data = packed(name, shape, kind)
            self._data.append(data)
            tensor.name, tensor.data, tensor.bytes = name.encode(), data.data_ptr(), data.nbytes
            tensor.dtype, tensor.device, tensor.n_dims = DTYPE_OF_KIND[kind], GPU, len(shape)
            tensor.shape[: len(shape)] = shape
        self.library, self.handle = library, ctypes.c_void_p()
        library.call(
            "qvl_weights_create", tensors, len(tensors), ctypes.sizeof(Tensor), ctypes.byref(self.handle)
        )


class Steps:
    """Batch of sequences of equal length, for repeated steps: the C structs of qvl_step's arguments are created once.

    Attributes:
        tables: block tables, int32 [sequences, blocks].
        sequences: the C structs of the sequences.
    """

    def __init__(self, engine: Engine, pool: Pool, tables: np.ndarray) -> None:
        self._engine, self._pool, self.tables = engine, pool, np.ascontiguousarray(tables, np.int32)
        self.n = len(tables)
        self.sequences = (Sequence_ * self.n)()
        for sequence, table in zip(self.sequences, self.tables):
            sequence.n_blocks, sequence.blocks = len(table), int_pointer(table)
        self._batch = Batch(ctypes.sizeof(Batch), self.n, self.sequences)
        self._batch.sequence_size, self._batch.span_size = ctypes.sizeof(Sequence_), ctypes.sizeof(Span)
        greedy = (Sampling * self.n)()
        for sampling in greedy:
            sampling.size = ctypes.sizeof(Sampling)
            engine.library.dll.qvl_sampling_init(sampling)
        self._args = StepArgs(size=ctypes.sizeof(StepArgs), sampling_size=ctypes.sizeof(Sampling))
        self._args.batch, self._args.rows, self._args.sampling = ctypes.pointer(self._batch), self.n, greedy

    def run(
        self,
        ids: Any,
        tokens: Any,
        n_new: int,
        n_past: int,
        prompt_len: int,
        features: Any = None,
        logits: Any = None,
    ) -> None:
        """Enqueue a step. All tensors are in GPU memory, and must exist until the step has ended.

        Args:
            ids: input tokens, int32 [n * n_new].
            tokens: output tokens, int32 [n].
            n_new: number of input tokens per sequence.
            n_past: number of tokens per sequence in the KV cache.
            prompt_len: number of prompt tokens per sequence.
            features: image features at positions 1 to queries of each sequence, float32 [n, queries, hidden].
            logits: output, float32 [n, vocab].
        """
        for sequence in self.sequences:
            sequence.n_new, sequence.n_past, sequence.prompt_len = n_new, n_past, prompt_len
        spans = make_spans(features, n_new)
        self._batch.tokens, self._batch.n_spans, self._batch.spans = ids.data_ptr(), len(spans), spans
        self._args.tokens = tokens.data_ptr()
        self._args.logits = None if logits is None else logits.data_ptr()
        self._engine.library.call("qvl_step", self._engine.handle, self._pool.handle, self._args, stream())


def make_spans(features: Any, n_new: int) -> Any:
    count = 0 if features is None else len(features)
    spans = (Span * count)()
    for i, span in enumerate(spans):
        span.start, span.count, span.features = i * n_new + 1, features.shape[1], features[i].data_ptr()
    return spans


def stream() -> int:
    """Handle of PyTorch's current stream, which must not be the default: the engine uses its own stream for NULL."""
    return int(torch.cuda.current_stream().cuda_stream)


class Ours:
    """Engine with random weights."""

    def __init__(self, sizes: Sizes, storage: str) -> None:
        self.sizes = sizes
        library = Library(Path(os.environ["QWENVL_LIBRARY"]))
        weights = RandomWeights(library, sizes, storage)
        torch.cuda.synchronize()  # the engine reads the weights on another stream
        self.engine = Engine(library, config_of(sizes, VISION | LANGUAGE), weights)
        note(self.engine.describe())

    def encode(self, images: Any, features: Any) -> None:
        self.engine.library.call(
            *("qvl_encode_images", self.engine.handle, len(images), images.data_ptr(), features.data_ptr()),
            stream(),
        )

    def features(self, n: int) -> Any:
        """Output for image features, NaN at first, so that missing values are noticed."""
        return torch.full((n, self.sizes.queries, self.sizes.hidden), float("nan"), device=DEVICE)

    def tokens(self, *shape: int) -> Any:
        """Output for tokens, -1 at first, so that missing tokens are noticed."""
        return torch.full(shape, -1, device=DEVICE, dtype=torch.int32)

    def batch(self, pool: Pool, n_blocks: int, n_sequences: int, positions: int) -> Steps:
        """Batch of sequences whose blocks are randomly distributed over the pool's n_blocks blocks."""
        per_sequence = math.ceil(positions / BLOCK)
        blocks = np.random.default_rng(0).permutation(n_blocks)[: n_sequences * per_sequence]
        return Steps(self.engine, pool, blocks.reshape(n_sequences, per_sequence))


# ---- rows ------------------------------------------------------------------------------------------------


def time_vision(column: str, ours: Ours) -> None:
    for n, row in VISION_ROWS.items():
        sets, features = image_sets(n, ours.sizes), ours.features(n)

        def encode(sets: list[Any] = sets, features: Any = features) -> None:
            sets.append(sets.pop(0))  # the next set, no longer in the GPU's cache
            ours.encode(sets[0], features)

        report(column, row, measure(encode))
        if not features.isfinite().all():
            note(f"{row}: features are not finite")


def time_prompts(column: str, ours: Ours, steps: Steps) -> None:
    tokens, features = ours.tokens(1), ours.features(1)
    ours.encode(image_sets(1, ours.sizes)[0], features)
    for n, row in PROMPT_ROWS.items():
        ids = random_ids(n, ours.sizes)
        image_features = features if n == PROMPT else None
        run = functools.partial(
            steps.run, ids, tokens, n_new=n, n_past=0, prompt_len=n, features=image_features
        )
        report(column, row, measure(run, functools.partial(ids.random_, 0, ours.sizes.vocab)))


def time_steps(column: str, ours: Ours, pool: Pool, n_blocks: int) -> None:
    """Time decode steps of sequences whose earlier tokens one step of prompts has written to the pool."""
    for past in sorted({past for _, past in STEPS}):
        batches = [batch for batch, batch_past in STEPS if batch_past == past]
        largest = max(batches)
        prompts = ours.batch(pool, n_blocks, largest, past + 1)
        prompts.run(
            random_ids(largest * past, ours.sizes),
            ours.tokens(largest),
            n_new=past,
            n_past=0,
            prompt_len=past,
        )
        for batch in batches:
            steps = Steps(ours.engine, pool, prompts.tables[:batch])
            tokens = random_ids(batch, ours.sizes)
            run = functools.partial(steps.run, tokens, tokens, n_new=1, n_past=past, prompt_len=past)
            fill = functools.partial(tokens.random_, 0, ours.sizes.vocab)
            report(column, step_row(batch, past), measure(run, fill, group=8))
            if int(tokens.min()) < 0:
                note(f"{step_row(batch, past)}: a row without a token")


def time_answers(column: str, ours: Ours, pool: Pool, n_blocks: int) -> None:
    for n, row in ((1, CAPTION_ROW), (REQUESTS, REQUESTS_ROW)):
        steps = ours.batch(pool, n_blocks, n, PROMPT + NEW_TOKENS)
        images, ids = image_sets(n, ours.sizes)[0], random_ids(n * PROMPT, ours.sizes)
        features, tokens = ours.features(n), ours.tokens(NEW_TOKENS, n)

        # Default arguments bind the values of this iteration.
        def answer(
            steps: Steps = steps,
            images: Any = images,
            ids: Any = ids,
            features: Any = features,
            tokens: Any = tokens,
        ) -> Any:
            # New inputs for each run; as in peers.py, their time is included.
            images.normal_()
            ids.random_(0, ours.sizes.vocab)
            ours.encode(images, features)
            steps.run(ids, tokens[0], n_new=PROMPT, n_past=0, prompt_len=PROMPT, features=features)
            for i in range(1, NEW_TOKENS):
                steps.run(tokens[i - 1], tokens[i], n_new=1, n_past=PROMPT + i - 1, prompt_len=PROMPT)
            return tokens.cpu()

        report(column, row, measure_waiting(answer))
        if int(tokens.min()) < 0:
            note(f"{row}: a step without a token")


def check(ours: Ours, steps: Steps, path: Path) -> None:
    """Compare features and logits with PyTorch's for the same image and prompt, which peers.py --check has saved."""
    reference = torch.load(path)
    features, logits = ours.features(1), torch.full((1, ours.sizes.vocab), float("nan"), device=DEVICE)
    ours.encode(reference["image"], features)
    steps.run(
        reference["ids"],
        ours.tokens(1),
        n_new=PROMPT,
        n_past=0,
        prompt_len=PROMPT,
        features=features,
        logits=logits,
    )
    for name, values in (("features", features), ("logits", logits)):
        error = float((values - reference[name]).norm() / reference[name].norm())
        warning = "" if error < 0.1 else ", NOT THE SAME MODEL"
        note(f"{name} compared with PyTorch: relative error {error:.1e}{warning}")


# ---- opening ---------------------------------------------------------------------------------------------


def write_stage(path: Path, shapes: dict[str, tuple[int, ...]], pattern: bytes) -> None:
    """Write a parameter file of bfloat16 weights (format: paddlemix_qwenvl_plugin/artifact/params_file.py)."""

    def varint(n: int) -> bytes:
        """Protocol buffers' variable-length integer, always in four bytes."""
        return bytes((n & 127 | 128, n >> 7 & 127 | 128, n >> 14 & 127 | 128, n >> 21))

    with path.open("wb") as file:
        for name, shape in sorted(shapes.items()):
            # The message TensorDesc: field 1, the dtype (22 is bfloat16); field 2, each dimension; field 15, metadata.
            message = b"\x08\x16" + b"".join(b"\x10" + varint(n) for n in shape)
            metadata = struct.pack("<4sBBH", b"qvl1", BFLOAT16, len(shape), len(name))
            metadata += struct.pack(f"<{len(shape)}q", *shape) + name.encode()
            # Padding, so that the data begins at a multiple of 64 bytes. The data follows a header of 20 bytes and the
            # message, whose metadata has a prefix of 4 bytes (field number and length).
            metadata += bytes(-(file.tell() + 20 + len(message) + 4 + len(metadata)) % 64)
            metadata_length = varint(len(metadata))[:2] + bytes([len(metadata) >> 14])  # in three bytes
            message += b"\x7a" + metadata_length + metadata
            file.write(struct.pack("<IQIi", 0, 0, 0, len(message)) + message)
            remaining = bytes_of("bf16", shape)
            while remaining > 0:
                remaining -= file.write(memoryview(pattern)[:remaining])


def time_opening(folder: Path, sizes: Sizes) -> None:
    """Time the opening of both stages, each by an engine, in a process that has not used the GPU before."""
    library = Library(Path(os.environ["QWENVL_LIBRARY"]))
    stages = (("vision", VISION, vision_shapes(sizes)), ("language", LANGUAGE, language_shapes(sizes)))
    floats = (np.random.default_rng(0).standard_normal(1 << 24) * 0.02).astype(np.float32)
    pattern = (floats.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bfloat16
    paths = [folder / f"{name}.pdiparams" for name, _, _ in stages]
    try:
        for path, (_, _, shapes) in zip(paths, stages):
            write_stage(path, shapes, pattern)
            with path.open("rb") as file:
                while file.read(1 << 26):  # into the file cache
                    pass
        start = time.perf_counter()
        engines = [
            Engine(library, config_of(sizes, stage), Weights(library, path))
            for path, (_, stage, _) in zip(paths, stages)
        ]
        report("bf16", OPEN_ROW, 1e3 * (time.perf_counter() - start))
        del engines
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def time_rows(storage: str, sizes: Sizes, reference: Path | None) -> None:
    ours = Ours(sizes, storage)
    # (sequences, positions) of the batches; the pool has blocks for the largest.
    batches = [(batch, past + 1) for batch, past in STEPS]
    batches.append((REQUESTS, PROMPT + NEW_TOKENS))
    n_blocks = max(n * math.ceil(positions / BLOCK) for n, positions in batches)
    with ours.engine.pool(n_blocks, BLOCK, BFLOAT16) as pool:
        single = ours.batch(pool, n_blocks, n_sequences=1, positions=max(PROMPT_ROWS))
        if reference and storage == "bf16":
            check(ours, single, reference)
        time_steps(storage, ours, pool, n_blocks)
        time_prompts(storage, ours, single)
        if storage == "bf16":
            time_vision(storage, ours)
        time_answers(storage, ours, pool, n_blocks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--type", choices=STORAGES, default="bf16", help="storage type of the weights")
    parser.add_argument("--check", type=Path, help="peers.py --check's file, to compare with (bf16 only)")
    parser.add_argument("--open", type=Path, metavar="FOLDER", help="only time the opening of a model")
    arguments = parser.parse_args()
    if arguments.open:
        time_opening(arguments.open, Sizes())
        return
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        time_rows(arguments.type, Sizes(), arguments.check)


if __name__ == "__main__":
    main()
