"""The engine on a GPU through its C interface: `python ours.py --type bf16` prints a line of JSON for each row.

Weights, images and tokens are PyTorch tensors on the GPU, passed as pointers; the steps of a caption read the token of
the step before from GPU memory, and no call waits. QWENVL_LIBRARY names libqwenvl.so, with libqwenvl_cuda.so
beside it, QWENVL_CUDA_KERNELS the folder of the kernels.

--open FOLDER writes the two parameter files of the bfloat16 model there (19 GB) and times opening them instead.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import struct
import sys
import time
from collections.abc import Sequence
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
BLOCK = 32
KINDS = {"bf16": BFLOAT16, "int8": DTYPES["int8"], "int4_g64": DTYPES["int4_g64"]}


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
    """Random weight in the layout of qvl_packed_bytes, with the same magnitude as `random`."""
    if kind == "bf16":
        return random(name, shape)
    n_out, n_in = shape
    padded = -(-n_in // 128) * 128
    n_values = n_out * padded // (1 if kind == "int8" else 2)
    made = torch.empty(bytes_of(kind, shape), dtype=torch.uint8, device=DEVICE)
    made[:n_values].random_(0, 256)
    deviation = 73.9 if kind == "int8" else 4.6  # standard deviation of the integers
    scales = made[n_values:].view(torch.float32 if kind == "int8" else torch.bfloat16)
    scales.fill_(0.5 / n_in**0.5 / deviation)
    return made


class MadeWeights(Weights):
    """Random weights in GPU memory."""

    def __init__(self, library: Library, sizes: Sizes, storage: str) -> None:
        shapes = {**language_shapes(sizes), **vision_shapes(sizes)}
        tensors = (Tensor * len(shapes))()
        self._kept = []
        for tensor, (name, shape) in zip(tensors, shapes.items()):
            kind = kind_of(name, shape, storage)
            data = packed(name, shape, kind)
            self._kept.append(data)
            tensor.name, tensor.data, tensor.bytes = name.encode(), data.data_ptr(), data.nbytes
            tensor.dtype, tensor.device, tensor.n_dims = KINDS[kind], GPU, len(shape)
            tensor.shape[: len(shape)] = shape
        self.library, self.handle = library, ctypes.c_void_p()
        library.call(
            "qvl_weights_create", tensors, len(tensors), ctypes.sizeof(Tensor), ctypes.byref(self.handle)
        )


class Steps:
    """A batch of equal sequences for repeated steps; its arrays are created once."""

    def __init__(self, engine: Engine, pool: Pool, tables: np.ndarray) -> None:
        """tables: int32 [sequences, blocks]."""
        self._engine, self._pool, self._tables = engine, pool, np.ascontiguousarray(tables, np.int32)
        self.n = len(tables)
        self._sequences = (Sequence_ * self.n)()
        for sequence, table in zip(self._sequences, self._tables):
            sequence.n_blocks, sequence.blocks = len(table), int_pointer(table)
        self._batch = Batch(ctypes.sizeof(Batch), self.n, self._sequences)
        self._batch.sequence_size, self._batch.span_size = ctypes.sizeof(Sequence_), ctypes.sizeof(Span)
        greedy = (Sampling * self.n)()
        for each in greedy:
            each.size = ctypes.sizeof(Sampling)
            engine.library.dll.qvl_sampling_init(each)
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
        """Enqueue a step.

        ids int32 [n * n_new]; tokens int32 [n]; features float32 [n, queries, hidden] are positions 1 .. queries of
        each sequence; logits float32 [n, vocab]. All in GPU memory; keep them until the step has ended.
        """
        for sequence in self._sequences:
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
    """PyTorch's current stream. Not the default stream, whose handle is NULL, which means the engine's own."""
    return int(torch.cuda.current_stream().cuda_stream)


class Ours:
    def __init__(self, sizes: Sizes, storage: str) -> None:
        self.sizes = sizes
        library = Library(Path(os.environ["QWENVL_LIBRARY"]))
        weights = MadeWeights(library, sizes, storage)
        torch.cuda.synchronize()  # the engine reads them on its own stream
        self.engine = Engine(library, config_of(sizes, VISION | LANGUAGE), weights)
        note(self.engine.describe())

    def encode(self, images: Any, features: Any) -> None:
        self.engine.library.call(
            *("qvl_encode_images", self.engine.handle, len(images), images.data_ptr(), features.data_ptr()),
            stream(),
        )

    def features(self, n: int) -> Any:
        return torch.full((n, self.sizes.queries, self.sizes.hidden), float("nan"), device=DEVICE)

    def tokens(self, *shape: int) -> Any:
        return torch.full(shape, -1, device=DEVICE, dtype=torch.int32)

    def batch(self, pool: Pool, n_blocks: int, sequences: int, positions: int) -> Steps:
        """Batch of sequences with random blocks of the pool."""
        each = -(-positions // BLOCK)
        order = np.random.default_rng(0).permutation(n_blocks)[: sequences * each]
        return Steps(self.engine, pool, order.reshape(sequences, each))


# ---- rows ------------------------------------------------------------------------------------------------


def time_vision(column: str, ours: Ours) -> None:
    for n, row in VISION_ROWS.items():
        sets, features = image_sets(n, ours.sizes), ours.features(n)

        def encode(sets: list[Any] = sets, features: Any = features) -> None:
            sets.append(sets.pop(0))
            ours.encode(sets[0], features)

        report(column, row, measure(encode))
        if not features.isfinite().all():
            note(f"{row}: features are not finite")


def time_prompts(column: str, ours: Ours, steps: Steps) -> None:
    tokens, features = ours.tokens(1), ours.features(1)
    ours.encode(image_sets(1, ours.sizes)[0], features)
    for n, row in PROMPT_ROWS.items():
        ids, seen = random_ids(n, ours.sizes), features if n == PROMPT else None
        run = functools.partial(steps.run, ids, tokens, n, 0, n, seen)
        report(column, row, measure(run, functools.partial(ids.random_, 0, ours.sizes.vocab)))


def time_steps(column: str, ours: Ours, pool: Pool, n_blocks: int) -> None:
    for past in sorted({past for _, past in STEPS}):
        most = max(batch for batch, of in STEPS if of == past)
        prompts = ours.batch(pool, n_blocks, most, past + 1)
        prompts.run(random_ids(most * past, ours.sizes), ours.tokens(most), past, 0, past)
        for batch in (batch for batch, of in STEPS if of == past):
            steps = Steps(ours.engine, pool, prompts._tables[:batch])
            tokens = random_ids(batch, ours.sizes)
            run = functools.partial(steps.run, tokens, tokens, 1, past, past)
            fill = functools.partial(tokens.random_, 0, ours.sizes.vocab)
            report(column, step_row(batch, past), measure(run, fill, group=8))
            if int(tokens.min()) < 0:
                note(f"{step_row(batch, past)}: a row without a token")


def time_answers(column: str, ours: Ours, pool: Pool, n_blocks: int) -> None:
    for n, row in ((1, CAPTION_ROW), (REQUESTS, REQUESTS_ROW)):
        steps = ours.batch(pool, n_blocks, n, PROMPT + NEW_TOKENS)
        images, ids = image_sets(n, ours.sizes)[0], random_ids(n * PROMPT, ours.sizes)
        features, tokens = ours.features(n), ours.tokens(NEW_TOKENS, n)

        def answer(
            steps: Steps = steps,
            images: Any = images,
            ids: Any = ids,
            features: Any = features,
            tokens: Any = tokens,
        ) -> Any:
            images.normal_()
            ids.random_(0, ours.sizes.vocab)
            ours.encode(images, features)
            steps.run(ids, tokens[0], PROMPT, 0, PROMPT, features)
            for i in range(1, NEW_TOKENS):
                steps.run(tokens[i - 1], tokens[i], 1, PROMPT + i - 1, PROMPT)
            return tokens.cpu()

        report(column, row, measure_waiting(answer))
        if int(tokens.min()) < 0:
            note(f"{row}: a step without a token")


def check(ours: Ours, steps: Steps, path: Path) -> None:
    """Compare with PyTorch on the same image and prompt (peers.py --check)."""
    theirs = torch.load(path)
    features, logits = ours.features(1), torch.full((1, ours.sizes.vocab), float("nan"), device=DEVICE)
    ours.encode(theirs["image"], features)
    steps.run(theirs["ids"], ours.tokens(1), PROMPT, 0, PROMPT, features, logits)
    for name, mine in (("features", features), ("logits", logits)):
        error = float((mine - theirs[name]).norm() / theirs[name].norm())
        note(
            f"{name} against PyTorch's: relative error {error:.1e}"
            + ("" if error < 0.1 else ", NOT THE SAME MODEL")
        )


# ---- opening ---------------------------------------------------------------------------------------------


def write_stage(path: Path, shapes: dict[str, tuple[int, ...]], pattern: bytes) -> None:
    """Write a parameter file of bfloat16 weights (format: paddlemix_qwenvl_plugin/artifact/params_file.py)."""

    def varint(n: int) -> bytes:
        return bytes((n & 127 | 128, n >> 7 & 127 | 128, n >> 14 & 127 | 128, n >> 21))

    with path.open("wb") as file:
        for name, shape in sorted(shapes.items()):
            message = b"\x08\x16" + b"".join(b"\x10" + varint(n) for n in shape)
            content = struct.pack("<4sBBH", b"qvl1", BFLOAT16, len(shape), len(name))
            content += struct.pack(f"<{len(shape)}q", *shape) + name.encode()
            content += bytes(-(file.tell() + 20 + len(message) + 4 + len(content)) % 64)
            message += b"\x7a" + varint(len(content))[:2] + bytes([len(content) >> 14]) + content
            file.write(struct.pack("<IQIi", 0, 0, 0, len(message)) + message)
            left = bytes_of("bf16", shape)
            while left > 0:
                left -= file.write(memoryview(pattern)[:left])


def time_opening(folder: Path, sizes: Sizes) -> None:
    """Time the opening of both stages, an engine each, in a process that has not used the GPU yet."""
    library = Library(Path(os.environ["QWENVL_LIBRARY"]))
    stages = (("vision", VISION, vision_shapes(sizes)), ("language", LANGUAGE, language_shapes(sizes)))
    pattern = (np.random.default_rng(0).standard_normal(1 << 24) * 0.02).astype(np.float32).view(
        np.uint32
    ) >> 16
    paths = [folder / f"{name}.pdiparams" for name, _, _ in stages]
    try:
        for path, (_, _, shapes) in zip(paths, stages):
            write_stage(path, shapes, pattern.astype(np.uint16).tobytes())
            with path.open("rb") as file:
                while file.read(1 << 26):
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


def time_rows(storage: str, sizes: Sizes, theirs: Path | None) -> None:
    ours = Ours(sizes, storage)
    most: Sequence[int] = [batch * (-(-(past + 1) // BLOCK)) for batch, past in STEPS]
    n_blocks = max(*most, REQUESTS * (-(-(PROMPT + NEW_TOKENS) // BLOCK)))
    with ours.engine.pool(n_blocks, BLOCK, BFLOAT16) as pool:
        one = ours.batch(pool, n_blocks, 1, max(PROMPT_ROWS))
        if theirs and storage == "bf16":
            check(ours, one, theirs)
        time_steps(storage, ours, pool, n_blocks)
        time_prompts(storage, ours, one)
        if storage == "bf16":
            time_vision(storage, ours)
        time_answers(storage, ours, pool, n_blocks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--type", choices=STORAGES, default="bf16")
    parser.add_argument("--check", type=Path, help="compare with this file of peers.py --check")
    parser.add_argument("--open", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.open:
        time_opening(arguments.open, Sizes())
        return
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        time_rows(arguments.type, Sizes(), arguments.check)


if __name__ == "__main__":
    main()
