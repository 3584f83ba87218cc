"""Rows of a batch do not affect each other; stop tokens, the order of images, and a full context."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from engines import ENGINES, open_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin import QwenVL, UsageError, export_language, export_vision


@pytest.fixture(scope="module", params=ENGINES)
def vl(tiny_exported, request):
    return open_model(tiny_exported / "vision" / "vision", tiny_exported / "text" / "qwen", request.param)


def prompt_with_images(vl, n_images, text_ids):
    config = vl.config.visual
    # The special tokens <img>, </img> and <imgpad> have consecutive ids.
    image = [
        config.image_start_id,
        *[config.image_start_id + 2] * config.n_queries,
        config.image_start_id + 1,
    ]
    return image * n_images + text_ids


# Rows of a batch: (number of images, token ids of the text).
rows = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 255), min_size=1, max_size=12)),
    min_size=1,
    max_size=4,
)
options = st.sampled_from(
    [
        {},
        {"temperature": 1.5, "seed": 3},
        {"top_p": 0.8, "seed": 9, "repetition_penalty": 1.3},
        {"top_k": 5, "seed": 1},
    ]
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows, options=options, padding=st.integers(0, 600), seed=st.integers(0, 1000))
def test_a_row_of_a_batch_generates_the_same_tokens_alone(vl, rows, options, padding, seed):
    shape = (sum(n_images for n_images, _ in rows), vl.config.visual.n_queries, vl.config.hidden_size)
    features = np.random.default_rng(seed).standard_normal(shape).astype("float32")
    prompts = [prompt_with_images(vl, n_images, text_ids) for n_images, text_ids in rows]
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths) + padding % 3  # the longest prompt has 0 to 2 padding tokens, with the id `padding`
    ids = np.array([prompt + [padding] * (width - len(prompt)) for prompt in prompts])
    arguments = {"max_new_tokens": 6, "eos_token_ids": [7, 77], **options}

    together = vl.generate_ids(ids, features, lengths=lengths, **arguments)

    first_image = 0
    for (n_images, _), prompt, tokens in zip(rows, prompts, together):
        alone = vl.generate_ids([prompt], features[first_image : first_image + n_images], **arguments)
        first_image += n_images
        assert [tokens] == alone


def test_rows_end_independently(vl):
    """A row ends at its stop token while the others continue."""
    prompts = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    without_stop = vl.generate_ids(prompts, max_new_tokens=8, eos_token_ids=())
    stop = without_stop[0][2]
    with_stop = vl.generate_ids(prompts, max_new_tokens=8, eos_token_ids=[stop])
    for row, tokens in zip(without_stop, with_stop):
        assert tokens == (row[: row.index(stop) + 1] if stop in row else row)
    assert len(with_stop[0]) <= 3


def test_min_new_tokens_delays_the_stop_token(vl):
    prompt = [[10, 20, 30]]
    stop = vl.generate_ids(prompt, max_new_tokens=1, eos_token_ids=())[0][0]
    assert vl.generate_ids(prompt, max_new_tokens=6, eos_token_ids=[stop]) == [[stop]]
    longer = vl.generate_ids(prompt, max_new_tokens=6, min_new_tokens=4, eos_token_ids=[stop])[0]
    assert len(longer) >= 4
    assert stop not in longer[:4]


def test_the_order_of_images_changes_the_completion(vl):
    features = np.random.default_rng(0).standard_normal((2, 256, vl.config.hidden_size)).astype("float32")
    prompt = [prompt_with_images(vl, 2, [65, 66])]
    arguments = {"max_new_tokens": 8, "eos_token_ids": ()}
    in_order = vl.generate_ids(prompt, features, **arguments)
    assert in_order != vl.generate_ids(prompt, features[::-1], **arguments)


def test_a_full_context_ends_the_completion(tiny_exported, tmp_path):
    shutil.copytree(tiny_exported / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.update(seq_length=32, max_position_embeddings=64)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    export_vision(tmp_path / "model", tmp_path / "vision")
    export_language(tmp_path / "model", tmp_path, "qwen")
    short = QwenVL.from_exported(tmp_path / "vision", tmp_path / "qwen")
    assert len(short.generate_ids(np.full([1, 62], 65), max_new_tokens=9, eos_token_ids=())[0]) == 2
    with pytest.raises(UsageError, match="no room in the context of 64"):
        short.generate_ids(np.full([1, 64], 65), max_new_tokens=1, eos_token_ids=())
