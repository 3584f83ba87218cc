"""PaddleNLP's wheels, each in a separate environment; drive_*.py in this folder follow its scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paddle
import pytest
from engines import open_model
from stock_models import SCHEMES, StockModels, answers
from wheel_environment import WheelEnvironment, cached

from paddlemix_qwenvl_plugin.upstream import pins

HERE = Path(__file__).parent
# float16 as in the deployment guide; with bfloat16, rounding changes tokens.
DTYPES = dict(zip(SCHEMES, ("float16", "float32", "float16")))
CLASS = "paddlenlp.experimental.transformers.qwen.modeling.QWenForQWenVLInferenceModel"


@pytest.fixture(scope="module", params=[one.version for one in pins.load().paddlenlp_wheels])
def environment(request: pytest.FixtureRequest, wheel: Callable[[str], WheelEnvironment]) -> WheelEnvironment:
    return wheel(request.param)


@pytest.fixture(scope="module")
def exported(
    environment: WheelEnvironment, stock: StockModels, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder per naming scheme, exported by the script of the wheel's generation."""
    out = tmp_path_factory.mktemp("exported")
    models = [(DTYPES[scheme], stock.folders[scheme], out / scheme) for scheme in SCHEMES]
    script = HERE / f"drive_export_{environment.generation}.py"
    done = environment.run(script, *(one for model in models for one in model), cwd=out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("scheme", SCHEMES)
def test_exported_graph_gives_golden_tokens(exported: Path, stock: StockModels, scheme: str) -> None:
    # The engine rounds activations where weights are float16.
    vl = open_model(stock.golden.vision, exported / scheme / "qwen", "portable")
    features = vl.encode_images(stock.golden.images)
    tokens = vl.generate_ids(stock.golden.input_ids, features, max_new_tokens=24, eos_token_ids=())
    assert tokens == [stock.golden.figures["tokens"].tolist()]
    assert json.loads((exported / scheme / "config.json").read_text())["model_type"] == "qwen"
    assert (exported / scheme / "tokenizer_config.json").is_file()


def test_dynamic_predictor(
    wheel: Callable[[str], WheelEnvironment], stock: StockModels, tmp_path: Path
) -> None:
    """PaddleNLP 3.0.0b4; the predictor of generation 1 is a script that no wheel has (test_paddlenlp.py)."""
    texts = ["a b c", "the"]
    done = wheel("3.0.0b4").run(
        HERE / "drive_predict_2.py", stock.folders["static"], 12, *texts, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == answers(stock, texts, 12)
    assert list(tmp_path.iterdir()) == []  # its reader deletes the token files


@pytest.mark.parametrize("quant_type", ["weight_only_int8", "weight_only_int4"])
def test_quant_type_in_generation_2(
    wheel: Callable[[str], WheelEnvironment], stock: StockModels, tmp_path: Path, quant_type: str
) -> None:
    """The predictor's arguments set quant_type; generation 1's script writes it into the config (test_paddlenlp.py)."""
    done = wheel("3.0.0b4").run(
        HERE / "drive_quant_2.py", stock.folders["static"], quant_type, "out", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "qwen.manifest.json").read_text())["quant_type"] == quant_type


@pytest.fixture(scope="module")
def snapshots(environment: WheelEnvironment, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Contents of the modules with and without the plugin."""
    cwd = tmp_path_factory.mktemp("snapshots")
    made = [environment.run(HERE / "drive_snapshot.py", cwd=cwd, QWENVL_PLUGIN=on) for on in ("1", "0")]
    for done in made:
        assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(done.stdout.splitlines()[-1]) for done in made]


def test_switched_off(snapshots: list[Any], environment: WheelEnvironment) -> None:
    """Upstream behaves as without the plugin: its class in generation 1, an import error without operators in 2."""
    with_it, without = snapshots
    assert with_it["failed"] == ""
    assert bool(without["failed"]) == (environment.generation == 2)
    assert re.search("paddlenlp_ops|fused_moe|^$", without["failed"])
    assert with_it["held"][CLASS].startswith("<class 'paddlemix_qwenvl_plugin.")
    assert without["held"][CLASS] == f"<class '{CLASS}'>"


def test_missing_operator(snapshots: list[Any], environment: WheelEnvironment) -> None:
    ops, fused_moe = snapshots[0]["operators"]
    assert ops.startswith("MissingOperatorError: paddlenlp_ops.rebuild_padding_v2 is missing: ")
    assert "python setup_cuda.py install" in ops
    if environment.generation == 2 and not paddle.__version__.startswith("3.0."):
        assert fused_moe.startswith(
            "MissingOperatorError: paddle.incubate.nn.functional.fused_moe is missing"
        )
        assert "Paddle 3.0" in fused_moe
    else:
        assert "MissingOperatorError" not in fused_moe


def test_nothing_else_is_touched(snapshots: list[Any]) -> None:
    """Every other function and class in PaddleNLP's and Paddle's modules is upstream's own."""
    with_it, without = (one["held"] for one in snapshots)
    changed = {
        name
        for name in with_it.keys() | without.keys()
        if with_it.get(name) != without.get(name)
        and not with_it.get(name, "").startswith("paddlenlp_ops.")  # a stand-in, imported by name
        and f".{CLASS.rpartition('.')[2]}" not in name
        and not name.endswith(".fused_moe")
    }
    assert changed == {"paddlenlp.transformers.qwen.tokenizer.QWenTokenizer.__init__"}
    assert len(with_it) > 10_000


def test_interrupted_build_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENVL_TEST_ENVS", str(tmp_path))

    def interrupted(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    def whole(folder: Path) -> None:
        folder.mkdir()
        (folder / "all").touch()

    with pytest.raises(KeyboardInterrupt):
        cached("one", interrupted)
    folder = cached("one", whole)
    assert [path.name for path in folder.iterdir()] == ["all"]
    assert cached("one", interrupted) == folder
