"""PaddleNLP's wheels, each in a separate environment, used by drive_*.py as PaddleNLP's scripts use them.

pins.yaml lists the wheels and their generations. wheel_environment.py downloads them once; if no package index is
reachable, the tests that need them are skipped.
"""

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
# Naming scheme -> dtype of the export: float16 as in PaddleMIX's deployment guide, and float32. Not bfloat16, whose
# rounding would change tokens.
DTYPES = {"paddlemix": "float16", "static": "float32", "huggingface": "float16"}
MODEL_CLASS = "paddlenlp.experimental.transformers.qwen.modeling.QWenForQWenVLInferenceModel"


@pytest.fixture(scope="module", params=[wheel.version for wheel in pins.load().paddlenlp_wheels])
def environment(request: pytest.FixtureRequest, wheel: Callable[[str], WheelEnvironment]) -> WheelEnvironment:
    return wheel(request.param)


@pytest.fixture(scope="module")
def exported(
    environment: WheelEnvironment, stock: StockModels, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder with an export for each naming scheme, by the script for the wheel's generation."""
    out = tmp_path_factory.mktemp("exported")
    arguments: list[object] = []
    for scheme in SCHEMES:
        arguments += [DTYPES[scheme], stock.folders[scheme], out / scheme]
    script = HERE / f"drive_export_{environment.generation}.py"
    completed = environment.run(script, *arguments, cwd=out)
    assert completed.returncode == 0, completed.stderr[-3000:]
    return out


@pytest.mark.parametrize("scheme", SCHEMES)
def test_exported_graph_gives_golden_tokens(exported: Path, stock: StockModels, scheme: str) -> None:
    # "portable": with float16 weights, the engine rounds activations to bfloat16 on some processors.
    vl = open_model(stock.golden.vision, exported / scheme / "qwen", "portable")
    features = vl.encode_images(stock.golden.images)
    tokens = vl.generate_ids(stock.golden.input_ids, features, max_new_tokens=24, eos_token_ids=())
    assert tokens == [stock.golden.figures["tokens"].tolist()]
    assert json.loads((exported / scheme / "config.json").read_text())["model_type"] == "qwen"
    assert (exported / scheme / "tokenizer_config.json").is_file()


def test_dynamic_predictor(
    wheel: Callable[[str], WheelEnvironment], stock: StockModels, tmp_path: Path
) -> None:
    """Only of 3.0.0b4, which contains the predictor's functions; test_paddlenlp.py runs the predictor of a checkout."""
    texts = ["a b c", "the"]
    completed = wheel("3.0.0b4").run(
        HERE / "drive_predict_2.py", stock.folders["static"], 12, *texts, cwd=tmp_path
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert json.loads(completed.stdout.splitlines()[-1]) == answers(stock, texts, 12)
    assert list(tmp_path.iterdir()) == []  # load_real_time_tokens deletes the token files


@pytest.mark.parametrize("quant_type", ["weight_only_int8", "weight_only_int4"])
def test_quant_type_in_generation_2(
    wheel: Callable[[str], WheelEnvironment], stock: StockModels, tmp_path: Path, quant_type: str
) -> None:
    """In generation 2, an argument of the predictor sets quant_type; test_paddlenlp.py covers generation 1."""
    completed = wheel("3.0.0b4").run(
        HERE / "drive_quant_2.py", stock.folders["static"], quant_type, "out", cwd=tmp_path
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "qwen.manifest.json").read_text())["quant_type"] == quant_type


@pytest.fixture(scope="module")
def snapshots(environment: WheelEnvironment, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Outputs of drive_snapshot.py with and without the plugin."""
    cwd = tmp_path_factory.mktemp("snapshots")
    outputs = []
    for plugin in ("1", "0"):
        completed = environment.run(HERE / "drive_snapshot.py", cwd=cwd, QWENVL_PLUGIN=plugin)
        assert completed.returncode == 0, completed.stderr[-3000:]
        outputs.append(json.loads(completed.stdout.splitlines()[-1]))
    return outputs


def test_qwenvl_plugin_0_disables_the_plugin(snapshots: list[Any], environment: WheelEnvironment) -> None:
    """The model class is upstream's.

    In generation 2 the first import of this class fails without operators; drive_snapshot.py then provides stand-ins
    and imports it again.
    """
    enabled, disabled = snapshots
    assert enabled["failed"] == ""
    assert bool(disabled["failed"]) == (environment.generation == 2)
    assert re.search("paddlenlp_ops|fused_moe|^$", disabled["failed"])
    assert enabled["origins"][MODEL_CLASS].startswith("<class 'paddlemix_qwenvl_plugin.")
    assert disabled["origins"][MODEL_CLASS] == f"<class '{MODEL_CLASS}'>"


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


def test_the_plugin_replaces_nothing_else(snapshots: list[Any]) -> None:
    """In the imported modules only the model class, operators and a tokenizer's __init__ are changed."""
    enabled, disabled = (snapshot["origins"] for snapshot in snapshots)
    changed = {
        name
        for name in enabled.keys() | disabled.keys()
        if enabled.get(name) != disabled.get(name)
        and not enabled.get(name, "").startswith("paddlenlp_ops.")  # an operator's stand-in
        and f".{MODEL_CLASS.rpartition('.')[2]}" not in name
        and not name.endswith(".fused_moe")
    }
    assert changed == {"paddlenlp.transformers.qwen.tokenizer.QWenTokenizer.__init__"}
    assert len(enabled) > 10_000  # the comparison was not of a few names only


def test_interrupted_build_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENVL_TEST_ENVS", str(tmp_path))

    def build_and_interrupt(folder: Path) -> None:
        folder.mkdir()
        (folder / "incomplete").touch()
        raise KeyboardInterrupt

    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "complete").touch()

    with pytest.raises(KeyboardInterrupt):
        cached("name", build_and_interrupt)
    folder = cached("name", build)
    assert [path.name for path in folder.iterdir()] == ["complete"]
    assert cached("name", build_and_interrupt) == folder  # it is not built again
