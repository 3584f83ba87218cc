"""The samplers of the host and of the portable graph, compared with brute force and with each other.

`test_stock_program_and_predictor_agree` also runs on the engine, and compares its operator with its library.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from stock_inputs import stock_feed

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.modeling.generation import sample
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.programs import Stage
from paddlemix_qwenvl_plugin.runtime.sampling import RowSampler

LOGITS = np.array([1.0, 3.0, -1.0, 2.5, 2.9, 0.0, -4.0], np.float32)


def expected_distribution(temperature, top_p=1.0, top_k=7):
    """Probabilities for LOGITS by definition, token by token; a top_k of 7 keeps all tokens."""
    weights = [np.exp(float(logit) / temperature) for logit in LOGITS]
    ranked = sorted(range(len(LOGITS)), key=lambda token: -LOGITS[token])[:top_k]
    total = sum(weights[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    result = np.zeros(len(LOGITS))
    for token in kept:
        result[token] = weights[token] / sum(weights[kept_token] for kept_token in kept)
    return result


def check_frequencies(drawn, expected):
    n = len(drawn)
    frequency = np.bincount(drawn, minlength=len(LOGITS)) / n
    assert (frequency[expected == 0] == 0).all()
    # Within five standard deviations.
    assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-12).all()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_p": 0.7},
        {"temperature": 2.0, "top_k": 3},
        {"top_p": 0.9},
    ],
)
def test_host_sampler_draws_the_distribution(options):
    sampler = RowSampler(GenerationOptions(max_new_tokens=20000, seed=4, **options), [], len(LOGITS))
    drawn = [sampler.pick(LOGITS) for _ in range(20000)]
    arguments = {"temperature": 1.0, **options}
    check_frequencies(drawn, expected_distribution(**arguments))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.7), (2.0, 0.5), (1.0, 0.0)])
def test_graph_sampler_draws_the_distribution(temperature, top_p):
    paddle.seed(11)
    rows = 20000
    drawn = sample(
        paddle.to_tensor(np.tile(LOGITS, [rows, 1])),
        paddle.full([rows, 1], temperature, "float32"),
        paddle.full([rows, 1], top_p, "float32"),
    ).numpy()
    # top_p 0 selects the most likely token, as a tiny top_p does.
    expected = expected_distribution(temperature, top_p or 1e-9)
    check_frequencies(drawn[:, 0], expected)


def test_seeds():
    def sample_tokens(seed):
        sampler = RowSampler(GenerationOptions(temperature=1.0, seed=seed), [], len(LOGITS))
        return [sampler.pick(LOGITS) for _ in range(50)]

    assert sample_tokens(1) == sample_tokens(1)
    assert sample_tokens(1) != sample_tokens(2)


@pytest.mark.parametrize(
    ("min_new", "penalties"),  # repetition, frequency and presence penalty
    [(0, (1.0, 0.0, 0.0)), (9, (1.0, 0.0, 0.0)), (5, (1.7, 0.0, 0.0)), (0, (1.2, 0.6, 0.9))],
)
def test_stock_program_and_predictor_agree(tiny_exported, engine, min_new, penalties):
    """The stock program and QwenVL generate the same tokens, both on the engine or both on the portable graph.

    With penalties, a minimum number of new tokens, stop tokens and prompts of unequal lengths.
    """
    prefix = tiny_exported / "text" / "qwen"
    vl = QwenVL.from_exported(tiny_exported / "vision" / "vision", prefix)
    ids = np.array([[5, 6, 7, 8, 9], [200, 100, 50, 0, 0], [33, 0, 0, 0, 0]])
    lengths = [5, 3, 1]
    without_stop = vl.generate_ids(ids, lengths=lengths, max_new_tokens=12, eos_token_ids=())
    stop_ids = [without_stop[0][3], without_stop[1][5]]
    repetition, frequency, presence = penalties
    expected = vl.generate_ids(
        ids,
        lengths=lengths,
        max_new_tokens=12,
        min_new_tokens=min_new,
        eos_token_ids=stop_ids,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    config = vl.config.model_dump()
    feed = stock_feed(
        config,
        ids,
        np.zeros([1, 256, vl.config.hidden_size], "float32"),
        np.array([[-1, 0, 0]]),
        max_new=12,
        lengths=lengths,
        min_new=min_new,
        stop_ids=stop_ids,
        penalties=penalties,
    )
    tokens = Stage(prefix, "language", "cpu").open()(feed)[-1].numpy()
    assert tokens.shape == (3, 12)
    # The stock program returns -1 after the end of a row.
    for row, expected_row in zip(tokens.tolist(), expected):
        assert row == expected_row + [-1] * (12 - len(expected_row))
