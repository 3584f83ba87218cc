"""The operators in exported programs of both forms, against the goldens."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import inference, static
from paddle.nn.initializer import Constant
from paddle.pir_utils import DygraphOldIrGuard, DygraphPirGuard

from paddlemix_qwenvl_plugin.ops.load import call, load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc"))

from engine import BFLOAT16, FLOAT32, INT8, LANGUAGE, VISION, Library, Stored, make_config, store
from golden_model import GoldenModel

SIZES = (
    *("stages", "device", "device_index", "n_threads", "max_tokens", "hidden", "layers", "heads", "head_dim"),
    *("mlp_width", "vocab", "seq_length", "max_positions", "dynamic_ntk", "logn", "image_size", "patch_size"),
    *("vision_width", "vision_layers", "vision_heads", "vision_mlp_width", "n_queries"),
)
COLUMN = (-1, 1)
GENERATE = {
    "input_ids": ((-1, -1), "int64"),
    "image_features": ((-1, -1, -1), "float32"),
    "img_pos": ((-1, 3), "int64"),
    **dict.fromkeys(("penalty_score", "frequency_score", "presence_score"), (COLUMN, "float32")),
    **dict.fromkeys(("min_length", "max_length"), (COLUMN, "int64")),
    **dict.fromkeys(("temperature", "top_p"), (COLUMN, "float32")),
    "eos_token_id": ((-1,), "int64"),
    **dict.fromkeys(("seq_len_encoder", "seq_len_decoder"), (COLUMN, "int32")),
    "step_idx": (COLUMN, "int64"),
    "stop_flags": (COLUMN, "bool"),
    "tgt_pos": (COLUMN, "int64"),
    "stop_nums": ((1,), "int64"),
}
GENERATED = ("next_tokens", "steps", "stopped", "lengths", "positions", "tokens")
FORWARD = {
    "tokens": ((-1,), "int32"),
    "features": ((-1, -1, -1), "float32"),
    "spans": ((-1, 2), "int32"),
    "sequences": ((-1, 4), "int32"),
    "blocks": ((-1,), "int32"),
    "pool": ((4,), "int64"),
}


@pytest.fixture(scope="module")
def library() -> Library:
    if not shutil.which("c++"):
        pytest.skip("the operators need a C++17 compiler: apt-get install g++")
    return Library(Path(load()._name))


def save(
    operator: str,
    inputs: dict[str, Any],
    outputs: tuple[str, ...],
    config: Any,
    weights: dict[str, Stored],
    form: str,
    prefix: Path,
) -> Any:
    """A program of one operator, saved with its weights and opened in Paddle Inference."""
    names = sorted(weights)
    attributes = {
        "sizes": [int(getattr(config, name)) for name in SIZES],
        "norm_epsilon": config.norm_epsilon,
        "rotary_base": config.rotary_base,
        "names": names,
        "dtypes": [weights[name][1] for name in names],
        "shapes": [n for name in names for n in (*weights[name][2], 0, 0, 0)[:4]],
    }
    with DygraphOldIrGuard() if form == "legacy" else DygraphPirGuard(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paddle.enable_static()
        try:
            main, startup, scope = static.Program(), static.Program(), static.Scope()
            with static.program_guard(main, startup), static.scope_guard(scope):
                declared = {
                    name: static.data(name, list(shape), dtype) for name, (shape, dtype) in inputs.items()
                }
                parameters = [
                    static.create_parameter(
                        [weights[name][0].nbytes], "uint8", name=f"w.{name}", default_initializer=Constant(0)
                    )
                    for name in names
                ]
                for name, parameter in zip(names, parameters):
                    scope.var(parameter.name).get_tensor().set(
                        weights[name][0].view("uint8"), paddle.CPUPlace()
                    )
                made = call(operator, {**declared, "weights": parameters}, attributes, outputs)
                static.save_inference_model(
                    str(prefix), list(declared.values()), made, static.Executor(), program=main
                )
        finally:
            paddle.disable_static()
    chosen = inference.Config(f"{prefix}{'.json' if form == 'pir' else '.pdmodel'}", f"{prefix}.pdiparams")
    chosen.disable_gpu()
    chosen.disable_glog_info()
    getattr(chosen, "disable_onednn", chosen.disable_mkldnn)()
    predictor = inference.create_predictor(chosen)

    def run(**values: Any) -> list[np.ndarray]:
        fed = [paddle.to_tensor(np.asarray(values[name], dtype)) for name, (_, dtype) in inputs.items()]
        return [output.numpy().copy() for output in predictor.run(fed)]

    return run


def language(library: Library, model: GoldenModel, dtype: int, operator: str, form: str, prefix: Path) -> Any:
    inputs, outputs = (GENERATE, GENERATED) if operator == "qwenvl_generate" else (FORWARD, ("logits",))
    weights = store(library, model.language_weights(), dtype)
    return save(operator, inputs, outputs, make_config(model.config, LANGUAGE), weights, form, prefix)


def features_of(library: Library, model: GoldenModel, form: str, prefix: Path) -> np.ndarray:
    vision = {name: values for name, values in model.weights.items() if name.startswith("visual.")}
    inputs = {"images": ((-1, 3, 448, 448), "float32")}
    config, weights = make_config(model.config, VISION), store(library, vision, FLOAT32)
    return save("qwenvl_encode_images", inputs, ("features",), config, weights, form, prefix)(
        images=model.images
    )[0]


def pictures(model: GoldenModel) -> np.ndarray:
    starts = [start - 1 for start, _ in model.spans(model.images)]
    return np.array([[0, start, start + 257] for start in starts] or [[-1, 0, 0]])


def asked(model: GoldenModel, features: np.ndarray, n_rows: int = 1, **changes: Any) -> dict[str, Any]:
    """Inputs of qwenvl_generate for equal rows."""
    ids = np.repeat(model.figures["input_ids"], n_rows, axis=0)
    column = np.ones([n_rows, 1])
    rows = [[i, *place] for i in range(n_rows) for _, *place in pictures(model)]
    return {
        "input_ids": ids,
        "image_features": np.concatenate([features] * n_rows),
        "img_pos": rows,
        "penalty_score": column,
        "frequency_score": 0 * column,
        "presence_score": 0 * column,
        "min_length": 0 * column,
        "max_length": len(model.figures["tokens"]) * column,
        "temperature": column,
        "top_p": 0 * column,
        "eos_token_id": [model.config["vocab_size"]],
        "seq_len_encoder": ids.shape[1] * column,
        "seq_len_decoder": ids.shape[1] * column,
        "step_idx": 0 * column,
        "stop_flags": 0 * column,
        "tgt_pos": ids.shape[1] * column,
        "stop_nums": [n_rows],
        **changes,
    }


@pytest.mark.parametrize("form", ["pir", "legacy"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_golden(library: Library, name: str, form: str, tmp_path: Path) -> None:
    """Features, and the whole generation from them; and the same tokens pass by pass."""
    model = GoldenModel(name)
    features = features_of(library, model, form, tmp_path / "vision")
    expected = model.figures["features_every_16th_query"]
    assert np.abs(features[:, ::16] - expected).max() <= 1e-4 * np.abs(expected).max()

    tokens = model.figures["tokens"].tolist()
    length = len(model.prompt)
    generate = language(library, model, FLOAT32, "qwenvl_generate", form, tmp_path / "generate")
    last, done, stopped, left, position, generated = generate(**asked(model, features))
    assert generated.tolist() == [tokens]
    assert [last.item(), done.item(), stopped.item(), left.item(), position.item()] == [
        *(tokens[-1], len(tokens), 1, 0, length + len(tokens)),
    ]

    forward = language(library, model, FLOAT32, "qwenvl_forward", form, tmp_path / "forward")
    n_blocks = (length + len(tokens)) // 16 + 1
    pool = [1, n_blocks, 16, FLOAT32]
    table = np.random.default_rng(0).permutation(n_blocks)
    spans = [[start + 1, i] for i, (_, start, _) in enumerate(pictures(model).tolist())]
    fed, past, found = model.prompt, 0, []
    for _ in tokens:
        sequences = [[len(fed), past, length, n_blocks]]
        [logits] = forward(
            tokens=fed, features=features, spans=spans, sequences=sequences, blocks=table, pool=pool
        )
        past += len(fed)
        fed, spans = [int(logits[0].argmax())], [[0, -1]]
        found += fed
    assert found == tokens


def test_rows_end_on_their_own(library: Library, tmp_path: Path) -> None:
    """An end token, a row that is stopped from the beginning, a short row, and `stop_nums` rows that suffice."""
    model = GoldenModel("a")
    features = features_of(library, model, "pir", tmp_path / "vision")
    generate = language(library, model, FLOAT32, "qwenvl_generate", "pir", tmp_path / "generate")
    tokens = model.figures["tokens"].tolist()
    # Golden a's fifth token has not come before; as an end token it ends what may go on so long.
    end = tokens[4]
    assert end not in tokens[:4]
    given = asked(
        model, features, 3, eos_token_id=[end], max_length=[[9], [9], [3]], stop_flags=[[0], [1], [0]]
    )
    last, done, stopped, _, position, generated = generate(**given)
    assert [[token for token in row if token >= 0] for row in generated.tolist()] == [
        tokens[:5],
        [],
        tokens[:3],
    ]
    assert done.ravel().tolist() == [5, 0, 3]
    assert stopped.ravel().tolist() == [1, 1, 1]
    assert last.ravel().tolist() == [end, 0, tokens[2]]
    assert (position.ravel() - len(model.prompt)).tolist() == [5, 0, 3]

    *_, stopped, left, _, generated = generate(**{**given, "stop_nums": [2]})
    assert [[token for token in row if token >= 0] for row in generated.tolist()] == [
        tokens[:3],
        [],
        tokens[:3],
    ]
    assert stopped.ravel().tolist() == [0, 1, 1]
    assert left.ravel().tolist() == [len(model.prompt) + 2, 0, 0]

    [*_, generated] = generate(**{**given, "min_length": [[6], [0], [0]]})
    assert end not in generated[0][:6]


def test_a_long_loop_of_programs_leaves_memory(library: Library, tmp_path: Path) -> None:
    """A program that is gone takes its engine with it, and another one at its place has weights of its own."""
    model = GoldenModel("a")
    features = np.zeros([1, 256, model.config["hidden_size"]], np.float32)
    answers = set()
    for number in range(6):
        changed = dict(model.language_weights())
        changed["lm_head.weight"] = np.roll(changed["lm_head.weight"], number, axis=0)
        stored = store(library, changed, BFLOAT16 if number % 2 else INT8)
        config = make_config(model.config, LANGUAGE)
        generate = save("qwenvl_generate", GENERATE, GENERATED, config, stored, "pir", tmp_path / "generate")
        answers.add(tuple(generate(**asked(model, features, max_length=[[8]]))[-1].ravel().tolist()))
        del generate
    assert len(answers) == 6


def test_a_batch_that_cannot_be_is_an_error(library: Library, tmp_path: Path) -> None:
    model = GoldenModel("a")
    forward = language(library, model, FLOAT32, "qwenvl_forward", "pir", tmp_path / "forward")
    features = np.zeros([1, 256, model.config["hidden_size"]], np.float32)
    given = {"features": features, "spans": [[0, -1]], "blocks": [0], "pool": [2, 1, 16, FLOAT32]}
    for tokens, sequences, line in (
        ([1, 2], [[1, 0, 1, 1]], "do not add up to the tokens"),
        ([1], [[1, 0, 1, 2]], "more than the blocks"),
        ([10**6], [[1, 0, 1, 1]], "vocabulary"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=line):
            forward(tokens=tokens, sequences=sequences, **given)
    with pytest.raises((RuntimeError, ValueError), match="a picture that is not there"):
        forward(tokens=[1], sequences=[[1, 0, 1, 1]], **{**given, "spans": [[0, 3]]})
