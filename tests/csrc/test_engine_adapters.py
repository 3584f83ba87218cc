"""Adapters in the engine: compared with merged weights, independent of the batch, and errors of invalid adapters.

The tests also run on a GPU (tests/cuda/README.md).
"""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
from engine import (
    BAD_WEIGHT,
    BFLOAT16,
    COMPUTE_FLOAT16,
    COMPUTE_FLOAT32,
    DEVICE_LIBRARY,
    FLOAT32,
    INT4_G64,
    INT32,
    INVALID,
    LANGUAGE,
    UINT4_G128,
    Engine,
    EngineError,
    LowRank,
    OnStep,
    Request,
    Result,
    Sequence_,
    int_pointer,
    make_config,
    pointer,
    store,
)

RANDOM = np.random.default_rng(17)
TARGETS = re.compile(r"attn\.c_attn|attn\.c_proj|mlp\.w1|mlp\.w2|mlp\.c_proj|lm_head")
PROMPT = RANDOM.integers(0, 600, 70).tolist()
# Compute type of run() and test_completions_of_several_adapters. On a GPU it is float16, to which an adapter's matrices
# A and B are rounded.
COMPUTE = COMPUTE_FLOAT16 if DEVICE_LIBRARY else COMPUTE_FLOAT32
TOLERANCE = {"atol": 0.1, "rtol": 0} if DEVICE_LIBRARY else {"atol": 1e-3, "rtol": 0}


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of bfloat16, uint16: the upper halves of float32 values."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def float64(values: np.ndarray) -> np.ndarray:
    """Exact values of an adapter's matrix A or B."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def make_adapter(model, seed=0, dtype="float32", skip=""):
    """Random updates, of different ranks and scales, for all target matrices without `skip` in their name."""
    random = np.random.default_rng(seed)
    updates = {}
    for name, matrix in model.language_weights().items():
        if not TARGETS.search(name) or not name.endswith("weight") or (skip and skip in name):
            continue
        rank = int(random.integers(1, 21))
        a = random.standard_normal((rank, matrix.shape[1])) * 0.1
        b = random.standard_normal((matrix.shape[0], rank)) * 0.1
        a, b = (bfloat16(a), bfloat16(b)) if dtype == "bfloat16" else (a.astype(dtype), b.astype(dtype))
        updates[name] = LowRank(a, b, float(random.uniform(0.3, 2)))
    return updates


def merged(weights, adapter):
    """Weights with an adapter's updates, merged in float64."""
    result = dict(weights)
    for name, (a, b, scale) in adapter.items():
        result[name] = (weights[name] + scale * (float64(b) @ float64(a))).astype(np.float32)
    return result


def run(library, model, weights, adapter=None):
    """Logits [2, vocab] of the prompt's last token and of a decode step after it."""
    config = make_config(model.config, LANGUAGE, compute=COMPUTE)
    with Engine(library, config, weights) as engine, engine.pool(4) as pool:
        created = engine.adapter(adapter) if adapter else None
        table = [0, 1, 2, 3]
        prefill = pool.forward([(PROMPT, 0, 70, table)], adapters=[created])
        decode = pool.forward([([5], 70, 70, table)], adapters=[created])
        if created is not None:
            library.dll.qvl_adapter_free(created.handle)
        return np.concatenate([prefill, decode])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_equals_the_merged_model(library, golden_model, dtype):
    """Within `TOLERANCE` of a model whose weights were merged in float64."""
    model = golden_model("a")
    base, adapter = model.language_weights(), make_adapter(model, dtype=dtype)
    logits = run(library, model, store(library, base, FLOAT32), adapter)
    expected = run(library, model, store(library, merged(base, adapter), FLOAT32))
    without_adapter = run(library, model, store(library, base, FLOAT32))
    assert np.abs(expected - without_adapter).max() > 1
    np.testing.assert_allclose(logits, expected, **TOLERANCE)


@pytest.mark.parametrize("storage", [INT4_G64, UINT4_G128])
def test_an_int4_base_equals_the_merged_dequantized_model(library, golden_model, storage):
    """Within `TOLERANCE`; decode steps of INT4_G64 on a CPU within a tenth of the largest logit.

    Those steps round the activations to 8 bits for the product with the base model's weights, but not for the adapter's
    and the merged model's products. With UINT4_G128 and the compute type float32 no product rounds them. The matrices
    in UINT4_G128 have permuted inputs, as with GPTQ's act-order.
    """
    model = golden_model("a")
    base, adapter = model.language_weights(), make_adapter(model, skip="lm_head")
    quantized = store(library, base, storage, lambda name: FLOAT32 if "lm_head" in name else storage)
    dequantized = dict(quantized)
    for name, (data, dtype, shape) in list(quantized.items()):
        if dtype != storage:
            continue
        order = np.arange(shape[1])
        if storage == UINT4_G128:
            # The seed is the length of the name up to "mlp.w", which is equal for w1 and w2 of a layer: they have the
            # same inputs and need the same order.
            seed = len(name.split("mlp.w")[0])
            order = np.random.default_rng(seed).permutation(shape[1]).astype(np.int32)
            quantized[f"{name}.order"] = order, INT32, order.shape
        values = np.empty(shape)
        values[:, order] = library.unpack(data, dtype, *shape)
        a, b, scale = adapter[name]
        values += scale * (float64(b) @ float64(a))
        dequantized[name] = library.pack(values, FLOAT32), FLOAT32, shape
    prefill, decode = run(library, model, quantized, adapter)
    expected_prefill, expected_decode = run(library, model, dequantized)
    np.testing.assert_allclose(prefill, expected_prefill, **TOLERANCE)
    if storage == UINT4_G128 or DEVICE_LIBRARY:
        np.testing.assert_allclose(decode, expected_decode, **TOLERANCE)
    else:
        assert np.abs(decode - expected_decode).max() < 0.1 * np.abs(expected_decode).max()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, INT4_G64, UINT4_G128])
def test_a_mixed_batch_equals_its_entries_alone(library, golden_model, isa, dtype):
    """Bit for bit: prompts, chunks and decode steps with three adapters and without one, in a random order."""
    model = golden_model("a")
    config = make_config(model.config, LANGUAGE, isa=isa, max_tokens=64)  # a batch takes several passes
    with Engine(library, config, store(library, model.language_weights(), dtype)) as engine:
        adapters = [
            None,
            engine.adapter(make_adapter(model, 1)),
            engine.adapter(make_adapter(model, 2, "bfloat16", skip="attn")),
            engine.adapter(make_adapter(model, 3, "float16", skip="mlp")),
        ]
        random = np.random.default_rng(4)
        entries, entry_adapters = [], []
        with engine.pool(200) as mixed_pool, engine.pool(200) as alone_pool:
            for i in range(16):
                prompt = random.integers(0, 600, random.integers(2, 80)).tolist()
                n_past = len(prompt) if i % 2 else int(random.integers(0, len(prompt)))
                table = list(range(8 * i, 8 * i + 8))
                adapter = adapters[random.integers(0, 4)]
                for pool in (mixed_pool, alone_pool):
                    if n_past:
                        past = prompt[:n_past], 0, len(prompt), table
                        pool.forward([past], logits=False, adapters=[adapter])
                # After a complete prompt, token i in a decode step.
                entries.append((prompt[n_past:] or [i], n_past, len(prompt), table))
                entry_adapters.append(adapter)
            alone = [
                alone_pool.forward([entry], adapters=[adapter])
                for entry, adapter in zip(entries, entry_adapters)
            ]
            order = random.permutation(16)
            mixed = mixed_pool.forward(
                [entries[i] for i in order], adapters=[entry_adapters[i] for i in order]
            )
        for adapter in adapters[1:]:
            library.dll.qvl_adapter_free(adapter.handle)
    np.testing.assert_array_equal(mixed, np.concatenate([alone[i] for i in order]))


def test_an_adapter_of_zeros_changes_no_bit(library, golden_model):
    model = golden_model("a")
    adapter = {
        name: LowRank(a, np.zeros_like(b), scale) for name, (a, b, scale) in make_adapter(model).items()
    }
    weights = store(library, model.language_weights(), FLOAT32)
    np.testing.assert_array_equal(run(library, model, weights, adapter), run(library, model, weights))


def low_rank(n_out, n_in, rank=2, **changes):
    """An update of ones for a matrix [n_out, n_in]; `changes` replace its fields."""
    update = LowRank(np.ones([rank, n_in], np.float32), np.ones([n_out, rank], np.float32))
    return update._replace(**changes)


NAME = "h.0.mlp.w1.weight"


# m is the width of the MLP, h the hidden size: the matrix NAME is [m, h].
@pytest.mark.parametrize(
    ("make_updates", "message"),
    [
        (
            lambda m, h: {"h.0.mlp.w3.weight": low_rank(m, h)},
            "h.0.mlp.w3.weight: no such matrix; an adapter changes attn.c_attn, attn.c_proj, mlp.w1, mlp.w2 and "
            "mlp.c_proj of a layer, and lm_head",
        ),
        (lambda m, h: {"wte.weight": low_rank(m, h)}, "wte.weight: no such matrix"),
        (
            lambda m, h: {NAME: low_rank(m, h + 1)},
            "h.0.mlp.w1.weight: B A is [{m}, {h1}]; the matrix is [{m}, {h}]",
        ),
        (lambda m, h: {NAME: low_rank(m, h, rank=0)}, "h.0.mlp.w1.weight: rank is 0; it must be at least 1"),
        (lambda m, h: {NAME: low_rank(m, h, scale=np.inf)}, "h.0.mlp.w1.weight: its scale is not finite"),
        (
            lambda m, h: {NAME: low_rank(m, h, a=np.full([2, h], np.nan, np.float32))},
            "h.0.mlp.w1.weight: A has a value that is not finite",
        ),
        (
            lambda m, h: {NAME: low_rank(m, h, b=np.full([m, 2], np.inf, np.float32))},
            "h.0.mlp.w1.weight: B has a value that is not finite",
        ),
    ],
)
def test_errors_of_matrices(library, golden_model, make_updates, message):
    model = golden_model("a")
    config = make_config(model.config, LANGUAGE)
    h, m = config.hidden, config.mlp_width
    with Engine(library, config, store(library, model.language_weights(), FLOAT32)) as engine:
        with pytest.raises(EngineError) as error:
            engine.adapter(make_updates(m, h))
        assert error.value.status == BAD_WEIGHT
        assert str(error.value).startswith(message.format(m=m, h=h, h1=h + 1))
        # startswith() does not compare the end of a message.
        assert not str(error.value).endswith(" ")


def forward(engine, adapters):
    with engine.pool(4) as pool:
        pool.forward([([1], 0, 1, [0]), ([1], 0, 1, [1])], adapters=adapters)


def generate(engine, adapters):
    engine.generate([[1], [2]], 1, adapters=adapters)


@pytest.mark.parametrize(("compute", "subject"), [(forward, "sequence 1"), (generate, r"requests\[1\]")])
def test_an_adapter_of_another_engine(library, golden_model, compute, subject):
    model = golden_model("a")
    config = make_config(model.config, LANGUAGE)
    weights = store(library, model.language_weights(), FLOAT32)
    with (
        Engine(library, config, weights) as first,
        Engine(library, config, weights) as second,
        first.adapter({NAME: low_rank(config.mlp_width, config.hidden)}) as adapter,
        pytest.raises(EngineError, match=f"{subject}: adapter: belongs to another engine") as error,
    ):
        compute(second, [None, adapter])
    assert error.value.status == INVALID


def test_completions_of_several_adapters(library, golden_model):
    """qvl_generate: a request gets the same tokens as from a model into which its adapter was merged."""
    model = golden_model("a")
    base, config = model.language_weights(), make_config(model.config, LANGUAGE, compute=COMPUTE)
    adapters = [make_adapter(model, 1), None, make_adapter(model, 2)]
    prompts = [PROMPT[:5], PROMPT[:40], PROMPT]
    with Engine(library, config, store(library, base, FLOAT32)) as engine:
        created = [engine.adapter(adapter) if adapter else None for adapter in adapters]
        tokens, _ = engine.generate(prompts, 6, adapters=created)
        without_adapters, _ = engine.generate(prompts, 6)
        for adapter in filter(None, created):
            library.dll.qvl_adapter_free(adapter.handle)
    for i, (adapter, prompt) in enumerate(zip(adapters, prompts)):
        weights = store(library, merged(base, adapter or {}), FLOAT32)
        with Engine(library, config, weights) as engine:
            assert tokens[i : i + 1] == engine.generate([prompt], 6)[0], i
        assert (tokens[i] == without_adapters[i]) == (adapter is None)


class RequestWithoutAdapter(ctypes.Structure):
    """qvl_request of an earlier header, without `adapter`."""

    _fields_ = Request._fields_[:-1]


def test_a_request_without_the_adapter_field(library, golden_model):
    """A caller passes the struct size of an earlier header: the engine reads no adapter.

    In this caller's array, the next request begins at the offset of the field `adapter`.
    """
    model = golden_model("a")
    config = make_config(model.config, LANGUAGE)
    with Engine(library, config, store(library, model.language_weights(), FLOAT32)) as engine:
        expected, _ = engine.generate([PROMPT[:4], PROMPT[4:9]], 3)
        prompts = [np.asarray(prompt, np.int32) for prompt in (PROMPT[:4], PROMPT[4:9])]
        requests = (RequestWithoutAdapter * 2)()
        for request, ids in zip(requests, prompts):
            request.n_tokens, request.tokens, request.max_new = len(ids), int_pointer(ids), 3
        tokens, results = np.empty([2, 3], np.int32), (Result * 2)()
        library.call(
            "qvl_generate",
            *(engine.handle, None, 2, ctypes.cast(requests, ctypes.POINTER(Request))),
            ctypes.sizeof(RequestWithoutAdapter),
            *(0, None, OnStep(), None, 3, pointer(tokens), results, None),
        )
    assert tokens.tolist() == expected


class SequenceWithoutAdapter(ctypes.Structure):
    """qvl_sequence of an earlier header, without `adapter`."""

    _fields_ = Sequence_._fields_[:-1]


def test_a_sequence_without_the_adapter_field(library, golden_model):
    """A caller passes the struct size of an earlier header: the engine does not read the bytes after the structs."""
    model = golden_model("a")
    config = make_config(model.config, LANGUAGE)
    with (
        Engine(library, config, store(library, model.language_weights(), FLOAT32)) as engine,
        engine.pool(4) as pool,
    ):
        entries = [([1, 2], 0, 2, [0]), ([3], 0, 1, [1])]
        expected = pool.forward(entries)
        batch = pool.batch(entries)
        # In this array the second struct begins at the offset of the first one's field `adapter`.
        old_sequences = (SequenceWithoutAdapter * 2)()
        for old_sequence, sequence in zip(old_sequences, batch.sequences[:2]):
            for name, _ in SequenceWithoutAdapter._fields_:
                setattr(old_sequence, name, getattr(sequence, name))
        batch.sequences = ctypes.cast(old_sequences, ctypes.POINTER(Sequence_))
        batch.sequence_size = ctypes.sizeof(SequenceWithoutAdapter)
        logits = np.empty_like(expected)
        library.call("qvl_forward", engine.handle, pool.handle, batch, pointer(logits), None)
    np.testing.assert_array_equal(logits, expected)
