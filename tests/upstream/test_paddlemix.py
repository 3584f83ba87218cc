"""PaddleMIX's deploy/qwen_vl scripts as processes: fake ones, and the real ones unmodified (opt-in)."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pytest
from engines import needs_compiler
from fake_cuda import fake_driver
from safetensors.numpy import load_file, save_file

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.export.export import export_language, export_vision
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.tiny import make as tiny

HERE = Path(__file__).parent
MADE_UP = HERE / "made_up_paddlemix"
MADE_UP_MAX_LEN = 600
IMAGES = HERE.parent / "golden" / "text"
STREET = HERE.parents[1] / "recipes" / "images" / "street.png"

REAL = os.environ.get("QWENVL_PADDLEMIX_DIR")
MISSING = [name for name in ("paddlenlp", "ppdiffusers") if importlib.util.find_spec(name) is None]
real = pytest.param(
    REAL,
    id="real",
    marks=[
        pytest.mark.skipif(
            REAL is None,
            reason="QWENVL_PADDLEMIX_DIR is not set: a checkout of PaddleMIX at 6afaf05 (docs/upstream.md)",
        ),
        pytest.mark.skipif(
            bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: docs/upstream.md has the set"
        ),
    ],
)
both_trees = pytest.mark.parametrize("tree", [pytest.param(MADE_UP, id="made-up"), real])

ONE_IMAGE = [{"image": str(STREET)}, {"text": "Describe the picture:"}]
TWO_IMAGES = [{"image": str(STREET)}, {"image": str(IMAGES / "wide.png")}, {"text": "What differs?"}]


def run(tree: Path, *command: Any, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(tree), **env},
        capture_output=True,
        text=True,
    )


def export_encoder(tree: Path, model: Path, cwd: Path, script: str = "export_image_encoder.py", **env: str):
    return run(
        tree,
        Path(tree, "deploy", "qwen_vl", script),
        *("--model_name_or_path", model, "--save_path", cwd / "vision" / "vision"),
        cwd=cwd,
        **env,
    )


def predict(tree: Path, folder: Path, queries: list[Any], cwd: Path, **env: str) -> list[Any]:
    """Answers of the tree's Predictor on FOLDER/{vision/vision, text/qwen, model}."""
    out = cwd / f"answers-{len(list(cwd.iterdir()))}.json"
    done = run(tree, *predictor_command(tree, folder, queries, out), cwd=cwd, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def predictor_command(tree: Path, folder: Path, queries: list[Any], out: Path) -> list[Any]:
    stages = [folder / "vision" / "vision", folder / "text" / "qwen", folder / "model"]
    return [HERE / "drive_predictor.py", Path(tree, "deploy", "qwen_vl"), *stages, json.dumps(queries), out]


def expected(folder: Path, query: list[Any], n_tokens: int) -> list[int]:
    """Tokens of our predictor: another program of the export, and another loop."""
    vl = QwenVL.from_exported(folder / "vision" / "vision", folder / "text" / "qwen", folder / "model")
    vl.tokenizer.picture_label = "Picture {}:"  # as PaddleMIX writes it
    return vl.generate(query, max_new_tokens=n_tokens).token_ids


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory) -> Path:
    """A random model of 2 layers, exported. With most other seeds the model repeats one token."""
    folder = tmp_path_factory.mktemp("two-layers")
    tiny.make_tiny(folder / "model", seed=6)
    export_vision(folder / "model", folder / "vision" / "vision")
    export_language(folder / "model", folder / "text", "qwen")
    for query in (ONE_IMAGE, TWO_IMAGES):
        assert len(set(expected(folder, query, 8))) >= 4
    return folder


@pytest.fixture(scope="session")
def stock_flow(tmp_path_factory) -> Path:
    """A random model of 32 layers, exported like the stock scripts on a CPU: float32 and float16."""
    folder = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as patch:
        small = tiny.tiny_config
        patch.setattr(tiny, "tiny_config", lambda *args: {**small(*args), "num_hidden_layers": 32})
        tiny.make_tiny(folder / "model", seed=3)
    export_vision(folder / "model", folder / "vision" / "vision")
    export_language(folder / "model", folder / "text", "qwen", "float16")
    return folder


@pytest.mark.parametrize(
    ("tree", "scheme"),
    [
        pytest.param(MADE_UP, "huggingface", id="made-up"),
        *(pytest.param(REAL, scheme, marks=real.marks) for scheme in ("paddlemix", "static", "huggingface")),
    ],
)
def test_encoder_exporter(tree, scheme, golden, tmp_path):
    model = golden("a")
    weights = folders.renamed(model.weights, scheme, transpose=scheme == "huggingface")
    folder = folders.write(tmp_path / "model", model.folder / "config.json", weights, "safetensors")
    done = export_encoder(tree, folder, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exported as float32 in place of float16" in done.stderr
    features = QwenVL.from_exported(tmp_path / "vision" / "vision", model.language).encode_images(
        model.images
    )
    want = model.figures["features_every_16th_query"]
    assert np.abs(features[:, ::16] - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("tree", [real])
def test_community_name(tree, golden, tmp_path):
    """The guide's command with a community name, which PaddleNLP downloads, here from a test server."""
    name = "qwen-vl/qwen-vl-7b-static"
    served = tmp_path / "served" / "models" / "community" / name
    weights = folders.renamed(golden("a").weights, "static", transpose=False)
    folders.write(served, golden("a").folder / "config.json", weights, "sharded-pdparams")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = {"PPNLP_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        done = export_encoder(tree, Path(name), tmp_path, PPNLP_ENDPOINT=endpoint, **home)
        server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    exported = json.loads((tmp_path / "vision" / "vision.manifest.json").read_text())
    assert exported["model"] == Checkpoint(served).fingerprint()


@both_trees
def test_exporter_without_the_plugin(tree, golden, tmp_path):
    done = export_encoder(tree, golden("a").folder, tmp_path, QWENVL_PLUGIN="0")
    assert "qwenvl" not in done.stderr
    assert not (tmp_path / "vision" / "vision.manifest.json").exists()


def test_exporter_of_another_name(golden, tmp_path):
    """The saved object decides, not the script's name."""
    tree = tmp_path / "tree"
    shutil.copytree(MADE_UP, tree)
    scripts = tree / "deploy" / "qwen_vl"
    (scripts / "export_image_encoder.py").rename(scripts / "my_exporter.py")
    done = export_encoder(tree, golden("a").folder, tmp_path, script="my_exporter.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "upstream loads" not in done.stdout
    assert (tmp_path / "vision" / "vision.manifest.json").is_file()


def test_other_scripts_and_other_models_get_upstream_s(golden, tmp_path):
    folder = golden("a").folder
    done = export_encoder(MADE_UP, folder, tmp_path, script="another_script.py")
    assert done.stdout.splitlines() == [f"upstream loads {folder} as float16", "sizes [1, 3, 2, 3] 2 False"]
    assert (tmp_path / "vision" / "vision.pdiparams").is_file()
    assert not (tmp_path / "vision" / "vision.manifest.json").exists()
    other = tmp_path / "qwen-without-eyes"
    other.mkdir()
    config = {**golden("a").config}
    del config["visual"]
    (other / "config.json").write_text(json.dumps(config))
    done = export_encoder(MADE_UP, other, tmp_path)
    assert f"upstream loads {other} as float16" in done.stdout
    assert not (tmp_path / "vision" / "vision.manifest.json").exists()


@pytest.mark.parametrize("tree", [real])
def test_model_that_is_run_is_upstream_s(tree, golden, tmp_path):
    """PaddleMIX's class despite the hook, used like in its scripts."""
    model = golden("a")
    weights = folders.renamed(model.weights, "paddlemix", transpose=False)
    folder = folders.write(tmp_path / "model", model.folder / "config.json", weights, "pdparams")
    # Upstream's class reads the language model's config from the folder named here.
    config = {**model.config, "llm_pretrained_model_name_or_path": str(tmp_path / "llm")}
    (folder / "config.json").write_text(json.dumps(config))
    del config["visual"]
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text(json.dumps({**config, "architectures": ["QWenModel"]}))
    np.save(tmp_path / "images.npy", model.images)
    done = run(
        tree,
        HERE / "drive_model.py",
        folder,
        tmp_path / "images.npy",
        tmp_path / "features.npy",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    want = model.figures["features_every_16th_query"]
    features = np.load(tmp_path / "features.npy")
    assert np.abs(features[:, ::16] - want).max() < 1e-4 * np.abs(want).max()


def test_predictor_of_other_size(two_layers, tmp_path):
    answers = predict(MADE_UP, two_layers, [ONE_IMAGE, TWO_IMAGES], tmp_path)
    for query, answer in zip([ONE_IMAGE, TWO_IMAGES], answers):
        [tokens], [ids] = answer["tokens"], answer["input_ids"]
        assert len(tokens) == MADE_UP_MAX_LEN - len(ids)
        assert tokens[:24] == expected(two_layers, query, 24)


@needs_compiler
def test_a_missing_gpu(two_layers, tmp_path):
    """The script defaults to a GPU, with the CPU as fallback; QWENVL_DEVICE has none."""
    fake_driver(tmp_path)
    driver = {"LD_LIBRARY_PATH": str(tmp_path), "FAKE_CUDA": "12090", "FAKE_GPUS": "0"}
    command = predictor_command(MADE_UP, two_layers, [ONE_IMAGE], tmp_path / "out.json")
    done = run(MADE_UP, *command, cwd=tmp_path, **driver)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "qwenvl: --device gpu: no GPU found, running on the CPU" in done.stderr.splitlines()
    done = run(MADE_UP, *command, cwd=tmp_path, QWENVL_DEVICE="gpu", **driver)
    assert done.returncode == 1
    assert "--device gpu:0: the NVIDIA driver shows 0 GPU(s) here" in done.stderr.splitlines()[-1]
    done = run(MADE_UP, *command, cwd=tmp_path, QWENVL_DEVICE="tpu", **driver)
    assert done.stderr.splitlines()[-1].endswith("QWENVL_DEVICE tpu: must be cpu, gpu or gpu:N")


@pytest.mark.parametrize("tree", [real])
def test_predictor_of_32_layers(tree, stock_flow, tmp_path):
    answers = predict(tree, stock_flow, [ONE_IMAGE, TWO_IMAGES], tmp_path)
    for query, answer in zip([ONE_IMAGE, TWO_IMAGES], answers):
        assert answer["tokens"][0][:24] == expected(stock_flow, query, 24)


@pytest.mark.parametrize("tree", [real])
def test_stock_script_as_a_program(tree, stock_flow, tmp_path):
    stages = ["--first_model_path", stock_flow / "vision" / "vision"]
    stages += [
        "--second_model_path",
        stock_flow / "text" / "qwen",
        "--model_name_or_path",
        stock_flow / "model",
    ]
    script = Path(tree, "deploy", "qwen_vl", "run_static_predict.py")
    done = run(tree, HERE / "drive_stock_main.py", script, STREET, *stages, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("Outputs:")]
    [text] = ast.literal_eval(line.removeprefix("Outputs:").strip())
    query = [{"image": str(STREET)}, {"text": "Generate the caption in English with grounding:"}]
    vl = QwenVL.from_exported(
        stock_flow / "vision" / "vision", stock_flow / "text" / "qwen", stock_flow / "model"
    )
    assert text.startswith(vl.generate(query, max_new_tokens=8).text)


def test_two_at_once_in_one_folder(two_layers, tmp_path):
    temporary, work = tmp_path / "temporary", tmp_path / "work"
    temporary.mkdir()
    work.mkdir()
    env = {**os.environ, "PYTHONPATH": str(MADE_UP), "TMPDIR": str(temporary)}
    outs = [tmp_path / "0.json", tmp_path / "1.json"]
    queries = [ONE_IMAGE, TWO_IMAGES]
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, predictor_command(MADE_UP, two_layers, [query], out))],
            cwd=work,
            env=env,
            stderr=subprocess.DEVNULL,
        )
        for query, out in zip(queries, outs)
    ]
    assert [process.wait(300) for process in running] == [0, 0]
    for query, out in zip(queries, outs):
        assert json.loads(out.read_text())[0]["tokens"][0][:24] == expected(two_layers, query, 24)
    assert list(work.iterdir()) == []
    assert not list(temporary.glob("qwenvl*"))


def test_folder_for_tokens(two_layers, tmp_path):
    predict(MADE_UP, two_layers, [ONE_IMAGE], tmp_path, QWENVL_REAL_TIME_SAVE_DIR="here")
    assert (tmp_path / "here").is_dir()
    assert list((tmp_path / "here").iterdir()) == []


@pytest.fixture(scope="session")
def ends_its_turn(two_layers, tmp_path_factory) -> tuple[Path, int]:
    """Change the tiny model to generate <|im_end|> in place of a token; return its position."""
    folder = tmp_path_factory.mktemp("chat")
    said = expected(two_layers, ONE_IMAGE, 64)
    place = next(i for i, token in enumerate(said) if i > 1 and token not in said[:i])
    shutil.copytree(two_layers / "model", folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    turn_end = QwenTokenizer.from_folder(folder / "model").im_end_id
    swapped = [turn_end, said[place]]
    weights["lm_head.weight"][:, swapped] = weights["lm_head.weight"][:, swapped[::-1]]
    save_file(weights, folder / "model" / "model.safetensors")
    export_vision(folder / "model", folder / "vision" / "vision")
    export_language(folder / "model", folder / "text", "qwen")
    return folder, place + 1


@pytest.mark.parametrize("is_chat_model", [True, False])
def test_chat_model_stops_at_the_end_of_its_turn(ends_its_turn, is_chat_model, tmp_path):
    folder, n_tokens = ends_its_turn
    settings = folder / "model" / "generation_config.json"
    settings.write_text(json.dumps({"chat_format": "chatml" if is_chat_model else "raw"}))
    [answer] = predict(MADE_UP, folder, [ONE_IMAGE], tmp_path)
    assert (len(answer["tokens"][0]) == n_tokens) == is_chat_model


@pytest.mark.parametrize("form", ["json", "pdmodel"])
def test_one_form_alone(form, two_layers, tmp_path):
    for stage in ("vision", "text", "model"):
        shutil.copytree(two_layers / stage, tmp_path / stage)
    for stage in ("vision/vision", "text/qwen"):
        (tmp_path / f"{stage}.{'pdmodel' if form == 'json' else 'json'}").unlink()
    [answer] = predict(MADE_UP, tmp_path, [ONE_IMAGE], tmp_path)
    assert answer["tokens"][0][:24] == expected(two_layers, ONE_IMAGE, 24)


def test_exports_of_others_are_upstream_s(two_layers, tmp_path):
    shutil.copytree(two_layers / "model", tmp_path / "model")
    out = tmp_path / "answers.json"
    done = run(MADE_UP, *predictor_command(MADE_UP, tmp_path, [ONE_IMAGE], out), cwd=tmp_path)
    assert f"upstream finds no {tmp_path / 'vision' / 'vision'}.pdmodel" in done.stderr
