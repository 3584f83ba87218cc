"""Adapters that requests choose at run time: compared with a merged export, in mixed batches, in the prefix cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from adapter_folders import write_adapter
from engines import needs_compiler
from executors import without_cache
from safetensors.numpy import load_file

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL, export_language, export_vision
from paddlemix_qwenvl_plugin.checkpoint.config import load_config
from paddlemix_qwenvl_plugin.demo.run import MODEL
from paddlemix_qwenvl_plugin.runtime.adapters import low_rank, open_adapters
from paddlemix_qwenvl_plugin.runtime.blocks import BlockPool
from paddlemix_qwenvl_plugin.runtime.loop import Loop
from paddlemix_qwenvl_plugin.runtime.request import Request
from paddlemix_qwenvl_plugin.util.errors import UsageError

pytestmark = needs_compiler

PROMPT = "Where is the red circle? " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters "one" and "two" of the demo model, and its stages; "merged" is the language stage with "one" merged."""
    folder = tmp_path_factory.mktemp("adapters")
    config = load_config(MODEL)
    for seed, (name, dtype) in enumerate({"one": "float32", "two": "bfloat16"}.items()):
        write_adapter(folder / name, config, seed, dtype=dtype)
    # Portable exports suffice: the engine reads only their weights. There is no portable graph with int4 weights.
    export_vision(MODEL, folder / "vision", engine="portable")
    export_language(MODEL, folder, "plain", engine="portable")
    export_language(MODEL, folder, "merged", engine="portable", lora=folder / "one")
    export_language(MODEL, folder, "int4", engine="fused", quant_type="weight_only_int4")
    return folder


def opened(folder: Path, name: str, *adapters: str) -> QwenVL:
    return QwenVL.from_exported(
        folder / "vision", folder / name, MODEL, adapters={adapter: folder / adapter for adapter in adapters}
    )


def logprobs(model: QwenVL, adapter: str | None) -> list[dict[int, float]]:
    """For each token of a completion of PROMPT, the 20 most likely tokens and their log probabilities."""
    ids = model.tokenizer.encode(PROMPT)
    options = GenerationOptions(max_new_tokens=6)
    generation = model.generation(ids, [], [], options, n_logprobs=20, adapter=adapter)
    model._loop.submit(generation)
    while model._loop.step():
        pass
    return [dict(token.top) for token in generation.logprobs]


def test_equals_the_merged_export(folder):
    with_adapter = logprobs(opened(folder, "plain", "one"), "one")
    merged = logprobs(opened(folder, "merged"), None)
    for found, expected in zip(with_adapter, merged):
        assert found.keys() == expected.keys()
        np.testing.assert_allclose([found[token] for token in expected], list(expected.values()), atol=1e-3)
    assert with_adapter != logprobs(opened(folder, "plain", "one"), None)


def ask(model: QwenVL, question: str, adapter: str | None, n: int = 12) -> list[int]:
    options = GenerationOptions(max_new_tokens=n, min_new_tokens=n)
    return model.ask(Request(question, options, chat=False, adapter=adapter)).finish().token_ids


def test_a_mixed_batch_equals_requests_alone(folder):
    """Requests without an adapter and with each of two, on a quantized model, with prompts that share prefixes."""
    model = opened(folder, "int4", "one", "two")
    plain = opened(folder, "int4")
    cases = [(PROMPT * (1 + i % 3) + str(i), (None, "one", "two")[i % 3]) for i in range(18)]
    alone = []
    for question, adapter in cases:
        without_cache(model)
        alone.append(ask(model, question, adapter))
        if adapter is None:
            assert alone[-1] == ask(plain, question, None)
    without_cache(model)
    options = GenerationOptions(max_new_tokens=12, min_new_tokens=12)
    requests = [Request(question, options, chat=False, adapter=adapter) for question, adapter in cases]
    assert [answer.token_ids for answer in model.generate_batch(requests)] == alone


def test_the_prefix_cache_does_not_mix_adapters(folder):
    model = opened(folder, "plain", "one", "two")
    expected = {}
    for adapter in (None, "one", "two"):
        without_cache(model)
        expected[adapter] = ask(model, PROMPT, adapter)
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    loop = without_cache(model)
    for adapter in (None, "one", "two"):
        assert ask(model, PROMPT, adapter) == expected[adapter]
    assert loop.statistics.cached_tokens == 0
    for adapter in ("two", None, "one"):
        assert ask(model, PROMPT, adapter) == expected[adapter]
    assert loop.statistics.cached_tokens > 0


def test_a_preempted_request_keeps_its_adapter(folder):
    model = opened(folder, "plain", "one", "two")
    cases = [(PROMPT + str(i), ("one", "two")[i % 2]) for i in range(6)]
    expected = [ask(model, *case, n=40) for case in cases]
    loop = model._loop = Loop(model._loop._executor)
    # Blocks for two requests, which need three each, and for the beginning of a third.
    loop._scheduler.pool = BlockPool(8)
    options = GenerationOptions(max_new_tokens=40, min_new_tokens=40)
    requests = [Request(question, options, chat=False, adapter=adapter) for question, adapter in cases]
    assert [answer.token_ids for answer in model.generate_batch(requests)] == expected
    assert loop.statistics.preempted > 0


def test_a_conversation_has_an_adapter(folder):
    model = opened(folder, "plain", "one")
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    chats = [model.chat(adapter="one"), model.chat()]
    completions = [chat.ask("What is this?", **options).finish().token_ids for chat in chats]
    expected = [
        model.generate("What is this?", chat=True, adapter=adapter, **options).token_ids
        for adapter in ("one", None)
    ]
    assert completions == expected
    assert completions[0] != completions[1]


def test_an_unknown_adapter(folder):
    model = opened(folder, "plain", "one", "two")
    message = "adapter: 'three' is not an adapter of this model; it has: one, two"
    with pytest.raises(UsageError, match=message):
        model.generate("Hello", adapter="three")
    with pytest.raises(UsageError, match="it has: none"):
        opened(folder, "plain").generate_ids([[1]], adapter="one")


def test_the_portable_graph_refuses_adapters(folder, monkeypatch):
    monkeypatch.setenv("QWENVL_ENGINE", "portable")
    with pytest.raises(
        UsageError, match="adapters need the engine, and this model runs on the portable graph"
    ):
        opened(folder, "plain", "one").generate("Hello", adapter="one")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_storage_type_of_an_opened_adapter(tmp_path, dtype):
    """An adapter is stored in the narrowest type that represents every value, so that a step reads few bytes."""
    config = load_config(MODEL)
    write_adapter(tmp_path / "a", config, 0, dtype=dtype)
    [adapter] = open_adapters({"a": tmp_path / "a"}, config).values()
    updates = list(low_rank(adapter))
    assert len(updates) == 5 * config.num_hidden_layers  # five matrices a layer
    for update in updates:
        assert update.dtype == dtype
        saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
        module = f"base_model.model.transformer.{update.name[: -len('.weight')]}"
        for factor, found in (("A", update.a), ("B", update.b)):
            expected = saved[f"{module}.lora_{factor}.weight"]
            if dtype == "bfloat16":  # as uint16: the upper halves of float32 numbers
                found = (found.astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_array_equal(found, expected)
