"""The same answer in any batch: the logits of a sequence are bit-identical alone and beside other sequences.

This is tested for every storage type and instruction set, and with different numbers of threads. The tests also run on
a GPU (tests/cuda/README.md).
"""

from __future__ import annotations

import numpy as np
import pytest
from engine import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    GENERATED,
    INT8,
    LANGUAGE,
    NO_LOGITS,
    Engine,
    make_config,
    store,
)

# 3 heads of 24 values. Except LAYERS, no size is a multiple of 16, the float32 values of an AVX-512 vector.
HIDDEN, LAYERS, MLP, VOCAB = 72, 2, 130, 67
PROMPT, NEW = 61, 5  # tokens of the prompt, and generated tokens
IMAGE_START, IMAGE_TOKENS = 20, 27
IMAGE_END = IMAGE_START + IMAGE_TOKENS
BLOCK = 16  # tokens of a block
N_BLOCKS = 8  # blocks of the sequence under test
CONFIG = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "kv_channels": 24,
    "intermediate_size": 2 * MLP,
    "vocab_size": VOCAB,
    "layer_norm_epsilon": 1e-6,
    "seq_length": 32,  # less than the prompt: dynamic NTK and logn scaling are active
    "max_position_embeddings": 512,
    "rotary_emb_base": 10000,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "visual": {"image_size": 16, "patch_size": 8, "width": 8, "layers": 1, "heads": 1, "mlp_ratio": 1},
}
POOL_DTYPES = [FLOAT32, BFLOAT16, FLOAT16, INT8]


def random_weights(random):
    shapes = {"wte.weight": (VOCAB, HIDDEN), "ln_f.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        shapes[f"h.{i}.ln_1.weight"] = shapes[f"h.{i}.ln_2.weight"] = (HIDDEN,)
        shapes[f"h.{i}.attn.c_attn.weight"] = (3 * HIDDEN, HIDDEN)
        shapes[f"h.{i}.attn.c_attn.bias"] = (3 * HIDDEN,)
        shapes[f"h.{i}.attn.c_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"h.{i}.mlp.w1.weight"] = shapes[f"h.{i}.mlp.w2.weight"] = (MLP, HIDDEN)
        shapes[f"h.{i}.mlp.c_proj.weight"] = (HIDDEN, MLP)
    return {name: (random.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(params=DTYPES)
def stored(request, library):
    """Random weights, parametrized over all storage types."""
    return store(library, random_weights(np.random.default_rng(3)), DTYPES[request.param])


class Case:
    """The sequence under test (a prompt with an image, then generated tokens), and its logits when it runs alone."""

    def __init__(self, library, isa, stored):
        random = np.random.default_rng(4)
        self.random = random
        self.tokens = random.integers(0, VOCAB, PROMPT + NEW).tolist()
        self.features = random.standard_normal([IMAGE_TOKENS, HIDDEN]).astype(np.float32)
        self.library, self.isa, self.stored = library, isa, stored
        self.table = random.permutation(N_BLOCKS).tolist()
        self.logits_alone = {}  # by the dtype of the pool

    def engine(self, threads, max_tokens=512):
        config = make_config(CONFIG, LANGUAGE, isa=self.isa, n_threads=threads, max_tokens=max_tokens)
        return Engine(self.library, config, self.stored)

    def entry(self, start, end, table=None, prompt_len=PROMPT):
        """The tokens from start to end as the entry of a batch."""
        return self.tokens[start:end], start, prompt_len, table or self.table

    def spans(self, start, end, offset=0):
        """The spans of `entry(start, end)`, if the entry's first token is token `offset` of the batch."""
        first, last = max(start, IMAGE_START), min(end, IMAGE_END)
        if first >= last:
            return []
        return [(offset + first - start, self.features[first - IMAGE_START : last - IMAGE_START])]

    def expected(self, pool_dtype):
        """Logits [1 + NEW, vocab] of the prompt's last token and of the generated tokens, computed alone."""
        if pool_dtype not in self.logits_alone:
            with self.engine(1) as engine, engine.pool(N_BLOCKS, BLOCK, pool_dtype) as pool:
                rows = [pool.forward([self.entry(0, PROMPT)], self.spans(0, PROMPT))[0]]
                for position in range(PROMPT, PROMPT + NEW):
                    rows.append(pool.forward([self.entry(position, position + 1)])[0])
            self.logits_alone[pool_dtype] = np.stack(rows)
            assert np.isfinite(self.logits_alone[pool_dtype]).all()
        return self.logits_alone[pool_dtype]

    def other_entries(self, pool, n, first_block):
        """Entries of n other sequences, each with one block, the first with block first_block.

        They are first chunks of prompts, single tokens of prompts, and decode steps. This method also computes the
        tokens before them.
        """
        entries, earlier_entries = [], []
        for i in range(n):
            table = [first_block + i]
            kind, length = self.random.integers(0, 3), int(self.random.integers(1, BLOCK + 1))
            ids = self.random.integers(0, VOCAB, BLOCK).tolist()
            n_past = 0 if kind == 0 else length - 1
            prompt_len = n_past if kind == 2 and n_past else BLOCK
            if n_past:
                earlier_entries.append((ids[:n_past], 0, prompt_len, table))
            entries.append((ids[n_past:length], n_past, prompt_len, table))
        if earlier_entries:
            pool.forward(earlier_entries, logits=False)
        return entries


@pytest.fixture
def case(library, isa, stored):
    return Case(library, isa, stored)


def assert_same_bits(logits, expected):
    np.testing.assert_array_equal(np.asarray(logits).view(np.uint32), expected.view(np.uint32))


def test_chunks_beside_other_sequences(case):
    """The prompt in random chunks, then decode steps, each beside up to 70 other sequences.

    On 1 to 3 threads, in passes of different sizes.
    """
    random = case.random
    for trial in range(8):
        pool_dtype, threads = POOL_DTYPES[trial % 4], 1 + trial % 3
        expected = case.expected(pool_dtype)
        n_others = [0, 1, 3, 7, 8, 9, 40, 70][trial]
        random_bounds = random.integers(1, PROMPT, random.integers(0, 6)).tolist()
        bounds = sorted({0, 21, PROMPT - 1, PROMPT, *random_bounds})  # 21: after the image's first token
        chunks = [*zip(bounds, bounds[1:])]
        decode_steps = [(position, position + 1) for position in range(PROMPT, PROMPT + NEW)]
        max_tokens = int(random.choice([7, 33, 512]))
        rows = []
        with (
            case.engine(threads, max_tokens) as engine,
            engine.pool(N_BLOCKS + 70, BLOCK, pool_dtype) as pool,
        ):
            for start, end in [*chunks, *decode_steps]:
                entries = case.other_entries(pool, n_others, N_BLOCKS)
                index = int(random.integers(0, n_others + 1))  # of the sequence under test in the batch
                offset = sum(len(tokens) for tokens, _, _, _ in entries[:index])
                entries.insert(index, case.entry(start, end))
                has_logits = end >= PROMPT
                flags = [random.choice([0, NO_LOGITS]) for _ in entries]
                flags[index] = 0 if has_logits else NO_LOGITS
                logits = pool.forward(entries, case.spans(start, end, offset), flags=flags)
                assert np.isfinite(logits).all()
                if has_logits:
                    rows.append(logits[sum(not flag for flag in flags[:index])])
        assert_same_bits(rows, expected)


def test_decode_steps_of_many_sequences(case):
    """70 sequences with the same tokens in a batch: the same logits 70 times."""
    expected = case.expected(FLOAT32)
    with case.engine(2) as engine, engine.pool(70 * 5, BLOCK) as pool:
        tables = [list(range(5 * i, 5 * i + 5)) for i in range(70)]
        for table in tables:
            pool.forward([case.entry(0, PROMPT, table)], case.spans(0, PROMPT), logits=False)
        for i in range(NEW):
            logits = pool.forward([case.entry(PROMPT + i, PROMPT + i + 1, table) for table in tables])
            assert_same_bits(logits, np.repeat(expected[1 + i : 2 + i], 70, axis=0))


def test_shared_blocks(case):
    """A second sequence shares the first three blocks of another, and computes its remaining blocks itself."""
    expected = case.expected(BFLOAT16)
    n_shared = 3 * BLOCK
    with case.engine(3) as engine, engine.pool(2 * N_BLOCKS, BLOCK, BFLOAT16) as pool:
        pool.forward([case.entry(0, PROMPT)], case.spans(0, PROMPT), logits=False)
        table = case.table[:3] + list(range(N_BLOCKS, N_BLOCKS + 5))
        rows = [pool.forward([case.entry(n_shared, PROMPT, table)], case.spans(n_shared, PROMPT))[0]]
        for position in range(PROMPT, PROMPT + NEW):
            rows.append(pool.forward([case.entry(position, position + 1, table)])[0])
        assert_same_bits(rows, expected)


@pytest.mark.parametrize("flag", [0, GENERATED])
def test_recomputation_after_a_preemption(case, flag):
    """Prompt and generated tokens in one pass: in three entries, and without the flag also in one entry.

    The engine recognises generated tokens by positions from prompt_len on, or by the flag GENERATED of an entry, which
    holds for all tokens of the entry.
    """
    expected = case.expected(INT8)
    end = PROMPT + NEW
    for threads in (1, 3):
        with case.engine(threads) as engine, engine.pool(N_BLOCKS, BLOCK, INT8) as pool:
            if flag == 0:
                logits = pool.forward([case.entry(0, end)], case.spans(0, end))
                assert_same_bits(logits, expected[-1:])
            entries = [case.entry(0, PROMPT), case.entry(PROMPT, end - 1), case.entry(end - 1, end)]
            logits = pool.forward(entries, case.spans(0, end), flags=[0, flag, flag])
            assert_same_bits(logits, expected[[0, NEW - 1, NEW]])


def test_generated_tokens_of_an_earlier_turn(case):
    """Tokens with the flag GENERATED are computed as in decode steps, also at positions below prompt_len."""
    prompt_len = PROMPT + NEW  # of the second turn of a chat
    prompt = case.entry(0, PROMPT, prompt_len=prompt_len)
    generated = case.entry(PROMPT, prompt_len, prompt_len=prompt_len)
    with case.engine(1) as engine, engine.pool(N_BLOCKS, BLOCK) as pool:
        pool.forward([prompt], case.spans(0, PROMPT), logits=False)
        for position in range(PROMPT, prompt_len):
            entry = case.entry(position, position + 1, prompt_len=prompt_len)
            decode_step = pool.forward([entry], flags=[GENERATED])[0]
        without_flag = pool.forward([generated])[0]
    with case.engine(3) as engine, engine.pool(N_BLOCKS, BLOCK) as pool:
        pool.forward([prompt], case.spans(0, PROMPT), logits=False)
        with_flag = pool.forward([generated], flags=[GENERATED])[0]
    assert_same_bits(with_flag, decode_step)
    assert (without_flag != with_flag).any()


def test_long_contexts(library, isa):
    """Decode steps over 509 to 511 keys, on 1 to 16 threads.

    On a CPU the engine divides the keys into chunks of at most 256, and the work into 3 heads x 2 chunks for each
    token; 16 threads are more than a step of one token has work for.
    """
    stored = store(library, random_weights(np.random.default_rng(3)), BFLOAT16)
    tokens = np.random.default_rng(5).integers(0, VOCAB, 512).tolist()
    rows = []
    for threads in (1, 2, 3, 16):
        config = make_config(CONFIG, LANGUAGE, isa=isa, n_threads=threads)
        with Engine(library, config, stored) as engine, engine.pool(16, 32) as pool:
            table = list(range(16))
            pool.forward([(tokens[:508], 0, 508, table)], logits=False)
            together = pool.forward([(tokens[508:511], 508, 508, table)])[0]
            first = pool.forward([(tokens[508:509], 508, 508, table)])[0]
            last = pool.forward([(tokens[509:511], 509, 508, table)])[0]
            rows.append(np.stack([together, first, last]))
            assert_same_bits(together, last)
    for row in rows[1:]:
        assert_same_bits(row, rows[0])
