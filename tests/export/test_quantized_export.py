"""Exports of GPTQ and AWQ checkpoints: storage types; the engine's logits equal those in float32 and of the tools.

Also adapters, completions, refused exports, progress, and an export by the calls of PaddleNLP's scripts.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from adapter_folders import write_adapter
from engines import needs_compiler
from quantized_folders import CONFIG, Variant, copy_tool_folder, write_quantized, write_tensors
from stock_inputs import stock_feed

from paddlemix_qwenvl_plugin import QwenVL, UsageError, export_language, export_vision
from paddlemix_qwenvl_plugin.artifact.manifest import read_manifest
from paddlemix_qwenvl_plugin.artifact.params_file import read_tensors
from paddlemix_qwenvl_plugin.artifact.verify import verify
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.engine import library as c
from paddlemix_qwenvl_plugin.engine.engine import Adapter, Engine, KvPool, Weights
from paddlemix_qwenvl_plugin.modeling.weights import load_language
from paddlemix_qwenvl_plugin.runtime.adapters import low_rank, open_adapters
from paddlemix_qwenvl_plugin.runtime.programs import Stage
from paddlemix_qwenvl_plugin.upstream.inference_model import QWenForQWenVLInferenceModel

pytestmark = needs_compiler

VARIANTS = [
    Variant(),
    Variant(group=128, sym=True),  # as the published Qwen-VL-Chat-Int4
    Variant(bits=8, group=64),
    Variant(bits=8, group=-1),
    Variant(group=32, act_order=True),
    Variant(bits=8, group=128, act_order=True),
    Variant("awq", group=64),
]
IDS = ["-".join(str(value) for value in variant if value) for variant in VARIANTS]
COMPUTE_FLOAT32 = 1  # QVL_COMPUTE_FLOAT32 in csrc/include/qwenvl.h


class Float32Config(c.Config):
    """Configuration of an engine that computes in float32, for exact comparisons."""

    def __init__(self, **fields):
        super().__init__(compute=COMPUTE_FLOAT32, **fields)


def engine_logits(prefix, tokens, monkeypatch, one_by_one, adapter=None):
    """The engine's logits after each token, float32 [tokens, vocabulary].

    If `one_by_one`, the first step computes a prompt of one token, and each later one is a decode step. Otherwise one
    step computes several prompts: the first token, the first two, and so on. `adapter` is the folder of an adapter.
    """
    monkeypatch.setattr(c, "Config", Float32Config)
    config = read_manifest(prefix).config
    engine = Engine(Weights.open(prefix.with_name(f"{prefix.name}.pdiparams")), config, c.LANGUAGE)
    loaded_adapter = None
    if adapter is not None:
        opened = open_adapters({"adapter": adapter}, config)
        loaded_adapter = Adapter(engine, low_rank(opened["adapter"]))
    n = len(tokens)
    pool = KvPool(engine, n, 32, "float32")
    logits = np.empty([n, config.vocab_size], np.float32)
    if one_by_one:
        for i in range(n):
            run(engine, pool, [(i, 1, 1, 0)], tokens[i : i + 1], logits[i : i + 1], loaded_adapter)
    else:
        run(
            engine,
            pool,
            [(0, i + 1, i + 1, i) for i in range(n)],
            np.concatenate([tokens[: i + 1] for i in range(n)]),
            logits,
            loaded_adapter,
        )
    return logits


def run(engine, pool, sequences, tokens, logits, adapter):
    """Run a step of sequences (n_past, n_new, prompt_len, index of the only block) and write its logits to `logits`."""
    n = len(sequences)
    rows, blocks = (c.SequenceRow * n)(), np.array([block for *_, block in sequences], np.int32)
    for i, (row, (n_past, n_new, prompt_len, _)) in enumerate(zip(rows, sequences)):
        row.n_past, row.n_new, row.prompt_len = n_past, n_new, prompt_len
        row.n_blocks, row.blocks = 1, blocks[i:].ctypes.data
        row.adapter = None if adapter is None else adapter.handle.value
    tokens, picked = tokens.astype(np.int32), np.empty(n, np.int32)
    batch = c.Batch(
        size=ctypes.sizeof(c.Batch),
        sequence_size=ctypes.sizeof(c.SequenceRow),
        span_size=ctypes.sizeof(c.Span),
        n_sequences=n,
        sequences=ctypes.addressof(rows),
        tokens=tokens.ctypes.data,
    )
    sampling = (c.Sampling * n)()
    for parameters in sampling:
        parameters.size = ctypes.sizeof(c.Sampling)
        c.load().qvl_sampling_init(parameters)
    arguments = c.StepArgs(
        size=ctypes.sizeof(c.StepArgs),
        sampling_size=ctypes.sizeof(c.Sampling),
        batch=ctypes.pointer(batch),
        rows=n,
        sampling=ctypes.addressof(sampling),
        tokens=picked.ctypes.data,
        logits=logits.ctypes.data,
    )
    c.call("qvl_step", engine.handle, pool.handle, ctypes.byref(arguments), None)


@paddle.no_grad()
def float_logits(folder, tokens, lora=()):
    """The logits after each token, as `engine_logits`, but by Paddle's dynamic mode in float32; `lora` is merged."""
    model = load_language(Checkpoint(folder, lora))
    embedded = model.embed_tokens(paddle.to_tensor(tokens[None]))
    positions = paddle.arange(len(tokens)).unsqueeze(0)
    lengths = [paddle.to_tensor([[n]]) for n in range(1, len(tokens) + 1)]
    rows = [
        model(embedded[:, :n], positions[:, :n], length, length)[0] for n, length in enumerate(lengths, 1)
    ]
    return np.concatenate([row.numpy() for row in rows])


TOKENS = np.random.default_rng(3).integers(0, 30, 20)  # text tokens: the image tags begin at 30
STEPS = pytest.mark.parametrize("one_by_one", [False, True], ids=["prompts", "decode-steps"])


@pytest.fixture(scope="module", params=VARIANTS, ids=IDS)
def exported(request, tmp_path_factory):
    """A variant of a quantized folder, the prefix of its export, and the logits of the same weights in float32."""
    folder = tmp_path_factory.mktemp("quantized")
    write_tensors(folder / "float", write_quantized(folder / "model", request.param), CONFIG)
    export_language(folder / "model", folder / "text", "qwen")
    return request.param, folder / "text" / "qwen", float_logits(folder / "float", TOKENS)


@STEPS
def test_logits_equal_those_of_the_weights_in_float32(exported, monkeypatch, one_by_one):
    _, prefix, expected = exported
    logits = engine_logits(prefix, TOKENS, monkeypatch, one_by_one)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=0)


def test_storage_types_of_the_export(exported):
    variant, prefix, _ = exported
    group = variant.group if variant.group in (32, 64) else 128  # the engine's largest group
    order = "_order" if variant.act_order else ""
    manifest = verify(prefix)
    assert manifest.quant_type == f"{variant.method}_int{variant.bits}_g{group}{order}"
    dtypes = {entry.name: entry.dtype for entry in read_tensors(prefix.with_name("qwen.pdiparams"), manifest)}
    quantized = f"uint{variant.bits}_g{group}"
    assert dtypes["h.0.attn.c_attn.weight"] == dtypes["h.0.mlp.c_proj.weight"] == quantized
    assert (dtypes["lm_head.weight"], dtypes["wte.weight"]) == ("float32", "float32")
    assert dtypes.get("h.0.mlp.w1.weight.order") == ("int32" if variant.act_order else None)
    assert set(manifest.programs) == {"qwen.fused.json", "qwen.fused.pdmodel"}


@pytest.mark.parametrize("tool", ["auto_gptq", "auto_awq", "act_order"])
@STEPS
def test_logits_equal_those_of_the_tool(tmp_path, monkeypatch, tool, one_by_one):
    figures = copy_tool_folder(tool, tmp_path / "model")
    export_language(tmp_path / "model", tmp_path / "text", "qwen")
    logits = engine_logits(tmp_path / "text" / "qwen", figures["tokens"], monkeypatch, one_by_one)
    np.testing.assert_allclose(logits, figures["logits"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("variant", [Variant(), Variant("awq", group=64)], ids=["gptq", "awq"])
@STEPS
def test_an_adapter_of_quantized_weights_equals_a_merged_one(tmp_path, monkeypatch, variant, one_by_one):
    write_tensors(tmp_path / "float", write_quantized(tmp_path / "model", variant), CONFIG)
    export_language(tmp_path / "model", tmp_path / "text", "qwen")
    config = read_manifest(tmp_path / "text" / "qwen").config
    adapter = write_adapter(tmp_path / "adapter", config, seed=5)
    expected = float_logits(tmp_path / "float", TOKENS, [adapter])
    assert np.abs(expected - float_logits(tmp_path / "float", TOKENS)).max() > 0.1
    logits = engine_logits(tmp_path / "text" / "qwen", TOKENS, monkeypatch, one_by_one, adapter)
    np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("variant", [Variant(), Variant(act_order=True)], ids=["in-order", "act-order"])
def test_the_stock_program_and_the_predictor_generate_the_same(tmp_path, variant):
    """Both run on the exports of a quantized folder, whose vision stage is exported in floating point."""
    write_quantized(tmp_path / "model", variant)
    export_vision(tmp_path / "model", tmp_path / "vision" / "vision", "float16")
    export_language(tmp_path / "model", tmp_path / "text", "qwen", "float16")
    vl = QwenVL.from_exported(tmp_path / "vision" / "vision", tmp_path / "text" / "qwen")
    pixels = np.random.default_rng(0).standard_normal((1, 3, 56, 56)).astype("float32")
    features = vl.encode_images(pixels)
    ids = np.array([[1, 30, *[32] * 16, 31, 5, 9]])
    tokens = vl.generate_ids(ids, features, max_new_tokens=8, eos_token_ids=())
    for form in ("json", "pdmodel"):
        stock = Stage(f"{tmp_path}/text/qwen.{form}", "language", "cpu").open()
        *_, generated = stock(stock_feed(CONFIG, ids, features, np.array([[0, 1, 18]]), max_new=8))
        assert generated.numpy().tolist() == tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"quant_type": "weight_only_int8"},
            "its weights are quantized (gptq_int4_g32) and exported unchanged; omit --quant_type weight_only_int8",
        ),
        (
            {"engine": "portable"},
            "its weights are quantized (gptq_int4_g32); only the engine computes on them, not --engine portable",
        ),
    ],
)
def test_refused_exports(tmp_path, arguments, message):
    write_quantized(tmp_path / "model", Variant())
    with pytest.raises(UsageError) as caught:
        export_language(tmp_path / "model", tmp_path / "text", "qwen", **arguments)
    assert str(caught.value) == f"{tmp_path}/model: {message}"
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize("act_order", [False, True])
def test_progress_ends_at_its_total(tmp_path, monkeypatch, act_order):
    calls = []

    def record(items, label, total):
        items = list(items)
        calls.append((label, len(items), total))
        return iter(items)

    monkeypatch.setattr("paddlemix_qwenvl_plugin.modeling.weights.track", record)
    write_quantized(tmp_path / "model", Variant(act_order=act_order))
    export_language(tmp_path / "model", tmp_path / "out", "qwen")
    [(label, n, total)] = calls
    assert (label, n) == ("language weights", total)


def test_paddlenlps_scripts_export_a_quantized_folder(tmp_path):
    """Their calls of the model class, which is the plugin's: from_pretrained and to_static; generate is refused."""
    write_quantized(tmp_path / "model", Variant("awq"))
    model = QWenForQWenVLInferenceModel.from_pretrained(str(tmp_path / "model"), SimpleNamespace(), "float16")
    model.to_static(str(tmp_path / "text" / "qwen"), {})
    assert read_manifest(tmp_path / "text" / "qwen").quant_type == "awq_int4_g32"
    with pytest.raises(
        UsageError,
        match=r"its weights are quantized \(awq_int4_g32\); only export-language and convert read them",
    ):
        model.generate(input_ids=np.array([[1, 2]]))
