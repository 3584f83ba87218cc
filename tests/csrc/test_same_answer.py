"""The same answer in any batch: logits of one sequence alone, compared with those beside other sequences.

Bit for bit: for every storage type, instruction set and number of threads.
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

HIDDEN, LAYERS, MLP, VOCAB = 72, 2, 130, 67  # 3 heads of 24: nothing is a whole number of vectors
PROMPT, NEW = 61, 5
IMAGE = 20, 27  # start and length of the image's span
BLOCK = 16
N_BLOCKS = 8  # of a sequence
CONFIG = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "kv_channels": 24,
    "intermediate_size": 2 * MLP,
    "vocab_size": VOCAB,
    "layer_norm_epsilon": 1e-6,
    "seq_length": 32,  # so that NTK and logn scaling are at work
    "max_position_embeddings": 512,
    "rotary_emb_base": 10000,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "visual": {"image_size": 16, "patch_size": 8, "width": 8, "layers": 1, "heads": 1, "mlp_ratio": 1},
}
POOLS = [FLOAT32, BFLOAT16, FLOAT16, INT8]


def weights(random):
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
def model(request, library):
    random = np.random.default_rng(3)
    return store(library, weights(random), DTYPES[request.param])


class Case:
    """A sequence of a prompt with an image and generated tokens, and its logits when it runs alone."""

    def __init__(self, library, isa, stored):
        random = np.random.default_rng(4)
        self.random = random
        self.tokens = random.integers(0, VOCAB, PROMPT + NEW).tolist()
        self.features = random.standard_normal([IMAGE[1], HIDDEN]).astype(np.float32)
        self.library, self.isa, self.stored = library, isa, stored
        self.table = random.permutation(N_BLOCKS).tolist()
        self.pool_dtype = FLOAT32
        self.reference = {}

    def engine(self, threads, max_tokens=512):
        config = make_config(CONFIG, LANGUAGE, isa=self.isa, n_threads=threads, max_tokens=max_tokens)
        return Engine(self.library, config, self.stored)

    def part(self, start, end, table=None, prompt_len=PROMPT):
        return self.tokens[start:end], start, prompt_len, table or self.table

    def spans(self, start, end, at=0):
        """Spans of tokens start to end, at `at` in a batch: at most a part of the image's."""
        first, last = max(start, IMAGE[0]), min(end, sum(IMAGE))
        if first >= last:
            return []
        return [(at + first - start, self.features[first - IMAGE[0] : last - IMAGE[0]])]

    def alone(self, pool_dtype):
        """Logits [1 + NEW, vocab] of the prompt's last token and of each step."""
        if pool_dtype not in self.reference:
            with self.engine(1) as engine, engine.pool(N_BLOCKS, BLOCK, pool_dtype) as pool:
                rows = [pool.forward([self.part(0, PROMPT)], self.spans(0, PROMPT))[0]]
                for at in range(PROMPT, PROMPT + NEW):
                    rows.append(pool.forward([self.part(at, at + 1)])[0])
            self.reference[pool_dtype] = np.stack(rows)
            assert np.isfinite(self.reference[pool_dtype]).all()
        return self.reference[pool_dtype]

    def others(self, pool, n, first_block):
        """N other sequences in separate blocks: prompts, chunks and, after a first pass, single tokens."""
        parts, warm = [], []
        for i in range(n):
            table = [first_block + i]
            kind, length = self.random.integers(0, 3), int(self.random.integers(1, BLOCK + 1))
            ids = self.random.integers(0, VOCAB, BLOCK).tolist()
            past = 0 if kind == 0 else length - 1
            prompt_len = past if kind == 2 and past else BLOCK
            if past:
                warm.append((ids[:past], 0, prompt_len, table))
            parts.append((ids[past:length], past, prompt_len, table))
        if warm:
            pool.forward(warm, logits=False)
        return parts


@pytest.fixture
def case(library, isa, model):
    return Case(library, isa, model)


def check(got, expected):
    np.testing.assert_array_equal(np.asarray(got).view(np.uint32), expected.view(np.uint32))


def test_cuts_and_others(case):
    """The prompt in random chunks, each pass beside other sequences, on 1 to 3 threads and in passes of any size."""
    random = case.random
    for trial in range(8):
        pool_dtype, threads = POOLS[trial % 4], 1 + trial % 3
        expected = case.alone(pool_dtype)
        n_others = [0, 1, 3, 7, 8, 9, 40, 70][trial]
        cuts = sorted(
            {0, PROMPT, *random.integers(1, PROMPT, random.integers(0, 6)).tolist(), 21, PROMPT - 1}
        )
        steps = [*zip(cuts, cuts[1:]), *((at, at + 1) for at in range(PROMPT, PROMPT + NEW))]
        max_tokens = int(random.choice([7, 33, 512]))
        rows = []
        with (
            case.engine(threads, max_tokens) as engine,
            engine.pool(N_BLOCKS + 70, BLOCK, pool_dtype) as pool,
        ):
            for start, end in steps:
                parts = case.others(pool, n_others, N_BLOCKS)
                mine = int(random.integers(0, n_others + 1))
                at = sum(len(part[0]) for part in parts[:mine])
                parts.insert(mine, case.part(start, end))
                wanted = end >= PROMPT
                flags = [random.choice([0, NO_LOGITS]) for _ in parts]
                flags[mine] = 0 if wanted else NO_LOGITS
                logits = pool.forward(parts, case.spans(start, end, at), flags=flags)
                assert np.isfinite(logits).all()
                if wanted:
                    rows.append(logits[sum(not flag for flag in flags[:mine])])
        check(rows, expected)


def test_decode_steps_of_many(case):
    """70 sequences in one step, all of them with the same tokens: the same logits 70 times."""
    expected = case.alone(FLOAT32)
    with case.engine(2) as engine, engine.pool(70 * 5, BLOCK) as pool:
        tables = [list(range(5 * i, 5 * i + 5)) for i in range(70)]
        for table in tables:
            pool.forward([case.part(0, PROMPT, table)], case.spans(0, PROMPT), logits=False)
        for i in range(NEW):
            logits = pool.forward([case.part(PROMPT + i, PROMPT + i + 1, table) for table in tables])
            check(logits, np.repeat(expected[1 + i : 2 + i], 70, axis=0))


def test_shared_blocks(case):
    """A second sequence that finds the first three blocks of the first in the pool, also after moving them."""
    expected = case.alone(BFLOAT16)
    shared = 3 * BLOCK
    with case.engine(3) as engine, engine.pool(2 * N_BLOCKS, BLOCK, BFLOAT16) as pool:
        pool.forward([case.part(0, PROMPT)], case.spans(0, PROMPT), logits=False)
        table = case.table[:3] + list(range(N_BLOCKS, N_BLOCKS + 5))
        rows = [pool.forward([case.part(shared, PROMPT, table)], case.spans(shared, PROMPT))[0]]
        for at in range(PROMPT, PROMPT + NEW):
            rows.append(pool.forward([case.part(at, at + 1, table)])[0])
        check(rows, expected)


@pytest.mark.parametrize("flag", [0, GENERATED])
def test_generated_tokens_again(case, flag):
    """After a preemption: prompt and generated tokens in one pass, in one entry or two.

    Generated tokens are recognised by their positions or, with another rotary base kept by prompt_len, by the flag.
    """
    expected = case.alone(INT8)
    end = PROMPT + NEW
    for threads in (1, 3):
        with case.engine(threads) as engine, engine.pool(N_BLOCKS, BLOCK, INT8) as pool:
            if flag == 0:
                logits = pool.forward([case.part(0, end)], case.spans(0, end))
                check(logits, expected[-1:])
            parts = [case.part(0, PROMPT), case.part(PROMPT, end - 1), case.part(end - 1, end)]
            flags = [0, flag, flag]
            check(
                pool.forward(parts, case.spans(0, end), flags=flags),
                expected[[0, NEW - 1, NEW]],
            )


def test_generated_within_a_longer_prompt(case):
    """The second turn of a chat: tokens below prompt_len that were generated keep a decode step's numerics."""
    turn = PROMPT + NEW
    with case.engine(1) as engine, engine.pool(N_BLOCKS, BLOCK) as pool:
        pool.forward([case.part(0, PROMPT, prompt_len=turn)], case.spans(0, PROMPT), logits=False)
        one_by_one = [
            pool.forward([case.part(at, at + 1, prompt_len=turn)], flags=[GENERATED])[0]
            for at in range(PROMPT, turn)
        ]
        as_prompt = pool.forward([case.part(PROMPT, turn, prompt_len=turn)])[0]
    with case.engine(3) as engine, engine.pool(N_BLOCKS, BLOCK) as pool:
        pool.forward([case.part(0, PROMPT, prompt_len=turn)], case.spans(0, PROMPT), logits=False)
        together = pool.forward([case.part(PROMPT, turn, prompt_len=turn)], flags=[GENERATED])[0]
    check(together, one_by_one[-1])
    if case.stored["lm_head.weight"][1] != FLOAT32:
        assert (as_prompt != together).any()


def test_long_contexts(library, isa):
    """Contexts of several chunks of keys, with more threads than heads have work for."""
    stored = store(library, weights(np.random.default_rng(3)), BFLOAT16)
    tokens = np.random.default_rng(5).integers(0, VOCAB, 512).tolist()
    rows = []
    for threads in (1, 2, 3, 16):
        config = make_config(CONFIG, LANGUAGE, isa=isa, n_threads=threads)
        with Engine(library, config, stored) as engine, engine.pool(16, 32) as pool:
            table = list(range(16))
            pool.forward([(tokens[:508], 0, 508, table)], logits=False)
            rows.append(pool.forward([(tokens[508:511], 508, 508, table)])[0])
            rows.append(pool.forward([(tokens[508:509], 508, 508, table)])[0])
            rows.append(pool.forward([(tokens[509:511], 509, 508, table)])[0])
    for i in range(3, len(rows), 3):
        check(rows[i : i + 3], np.stack(rows[:3]))
    check(rows[0], rows[2])
