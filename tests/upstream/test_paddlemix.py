"""PaddleMIX's deploy/qwen_vl scripts as processes: those of a fake PaddleMIX, and of a checkout if one is given."""

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
FAKE = HERE / "made_up_paddlemix"
FAKE_MAX_LEN = 600  # tokens of prompt and completion at which the fake Predictor ends
IMAGES = HERE.parent / "golden" / "text"
STREET = HERE.parents[1] / "recipes" / "images" / "street.png"

REAL = os.environ.get("QWENVL_PADDLEMIX_DIR")
MISSING = [name for name in ("paddlenlp", "ppdiffusers") if importlib.util.find_spec(name) is None]
# The checkout as a parameter `tree`, with the conditions under which its tests run.
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
fake_and_real_tree = pytest.mark.parametrize("tree", [pytest.param(FAKE, id="fake"), real])

ONE_IMAGE = [{"image": str(STREET)}, {"text": "Describe the picture:"}]
TWO_IMAGES = [{"image": str(STREET)}, {"image": str(IMAGES / "wide.png")}, {"text": "What differs?"}]


def run(tree: Path, *command: Any, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a Python script with a PaddleMIX tree on PYTHONPATH."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(tree), **env},
        capture_output=True,
        text=True,
    )


def export_encoder(tree: Path, model: Path, cwd: Path, script: str = "export_image_encoder.py", **env: str):
    """Export a vision stage to CWD/vision/vision with a script of the tree."""
    return run(
        tree,
        Path(tree, "deploy", "qwen_vl", script),
        *("--model_name_or_path", model, "--save_path", cwd / "vision" / "vision"),
        cwd=cwd,
        **env,
    )


def predict(tree: Path, folder: Path, queries: list[Any], cwd: Path, **env: str) -> list[Any]:
    """Answer queries with the tree's Predictor on FOLDER/vision/vision, FOLDER/text/qwen and FOLDER/model."""
    output = cwd / f"answers-{len(list(cwd.iterdir()))}.json"  # a name for each call
    completed = run(tree, *predictor_command(tree, folder, queries, output), cwd=cwd, **env)
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads(output.read_text())


def predictor_command(tree: Path, folder: Path, queries: list[Any], output: Path) -> list[Any]:
    model = [folder / "vision" / "vision", folder / "text" / "qwen", folder / "model"]
    return [HERE / "drive_predictor.py", Path(tree, "deploy", "qwen_vl"), *model, json.dumps(queries), output]


def expected_tokens(folder: Path, query: list[Any], n_tokens: int) -> list[int]:
    """Generate tokens with QwenVL, which does not run the stock program that PaddleMIX's Predictor runs."""
    vl = QwenVL.from_exported(folder / "vision" / "vision", folder / "text" / "qwen", folder / "model")
    vl.tokenizer.picture_label = "Picture {}:"  # as PaddleMIX writes it
    return vl.generate(query, max_new_tokens=n_tokens).token_ids


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory) -> Path:
    """Random model of 2 layers and its exports."""
    folder = tmp_path_factory.mktemp("two-layers")
    tiny.make_tiny(folder / "model", seed=6)  # with most other seeds, the model repeats one token
    export_vision(folder / "model", folder / "vision" / "vision")
    export_language(folder / "model", folder / "text", "qwen")
    for query in (ONE_IMAGE, TWO_IMAGES):
        assert len(set(expected_tokens(folder, query, 8))) >= 4
    return folder


@pytest.fixture(scope="session")
def stock_flow(tmp_path_factory) -> Path:
    """Random model of 32 layers, exported as by the stock scripts on a CPU: vision in float32, language in float16."""
    folder = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as patch:
        tiny_config = tiny.tiny_config
        patch.setattr(tiny, "tiny_config", lambda *args: {**tiny_config(*args), "num_hidden_layers": 32})
        tiny.make_tiny(folder / "model", seed=3)
    export_vision(folder / "model", folder / "vision" / "vision")
    export_language(folder / "model", folder / "text", "qwen", "float16")
    return folder


@pytest.mark.parametrize(
    ("tree", "scheme"),
    [
        pytest.param(FAKE, "huggingface", id="fake"),
        *(pytest.param(REAL, scheme, marks=real.marks) for scheme in ("paddlemix", "static", "huggingface")),
    ],
)
def test_export_of_the_encoder(tree, scheme, golden, tmp_path):
    model = golden("a")
    weights = folders.renamed(model.weights, scheme, transpose=scheme == "huggingface")
    folder = folders.write(tmp_path / "model", model.folder / "config.json", weights, "safetensors")
    completed = export_encoder(tree, folder, tmp_path)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert "exported as float32 in place of float16" in completed.stderr
    features = QwenVL.from_exported(tmp_path / "vision" / "vision", model.language).encode_images(
        model.images
    )
    expected = model.figures["features_every_16th_query"]
    assert np.abs(features[:, ::16] - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("tree", [real])
def test_export_of_a_community_model(tree, golden, tmp_path):
    """The model is given by a community name, and PaddleNLP downloads it, here from a test server."""
    name = "qwen-vl/qwen-vl-7b-static"
    served = tmp_path / "served" / "models" / "community" / name
    weights = folders.renamed(golden("a").weights, "static", transpose=False)
    folders.write(served, golden("a").folder / "config.json", weights, "sharded-pdparams")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = {"PPNLP_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        completed = export_encoder(tree, Path(name), tmp_path, PPNLP_ENDPOINT=endpoint, **home)
        server.shutdown()
    assert completed.returncode == 0, completed.stderr[-3000:]
    exported = json.loads((tmp_path / "vision" / "vision.manifest.json").read_text())
    assert exported["model"] == Checkpoint(served).fingerprint()


@fake_and_real_tree
def test_export_without_the_plugin(tree, golden, tmp_path):
    completed = export_encoder(tree, golden("a").folder, tmp_path, QWENVL_PLUGIN="0")
    assert "qwenvl" not in completed.stderr
    assert not (tmp_path / "vision" / "vision.manifest.json").exists()


def test_export_by_a_script_of_another_name(golden, tmp_path):
    """The plugin exports any saved `visual` of a Qwen-VL model, independent of the script's name."""
    tree = tmp_path / "tree"
    shutil.copytree(FAKE, tree)
    scripts = tree / "deploy" / "qwen_vl"
    (scripts / "export_image_encoder.py").rename(scripts / "my_exporter.py")
    completed = export_encoder(tree, golden("a").folder, tmp_path, script="my_exporter.py")
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert "upstream loads" not in completed.stdout
    assert (tmp_path / "vision" / "vision.manifest.json").is_file()


def test_upstream_runs_other_scripts_and_other_models(golden, tmp_path):
    # A script that runs the encoder. It prints the shape of its output, its number of parameters and its training mode.
    folder = golden("a").folder
    completed = export_encoder(FAKE, folder, tmp_path, script="another_script.py")
    assert completed.stdout.splitlines() == [
        f"upstream loads {folder} as float16",
        "sizes [1, 3, 2, 3] 2 False",
    ]
    assert (tmp_path / "vision" / "vision.pdiparams").is_file()
    assert not (tmp_path / "vision" / "vision.manifest.json").exists()
    # A model without an image encoder.
    other = tmp_path / "language-model"
    other.mkdir()
    config = {**golden("a").config}
    del config["visual"]
    (other / "config.json").write_text(json.dumps(config))
    completed = export_encoder(FAKE, other, tmp_path)
    assert f"upstream loads {other} as float16" in completed.stdout
    assert not (tmp_path / "vision" / "vision.manifest.json").exists()


@pytest.mark.parametrize("tree", [real])
def test_a_model_that_is_run_is_upstreams(tree, golden, tmp_path):
    """drive_model.py, which uses the model as PaddleMIX's other scripts do, gets an instance of PaddleMIX's class."""
    model = golden("a")
    weights = folders.renamed(model.weights, "paddlemix", transpose=False)
    folder = folders.write(tmp_path / "model", model.folder / "config.json", weights, "pdparams")
    # Upstream's class reads the language model's config from llm_pretrained_model_name_or_path.
    config = {**model.config, "llm_pretrained_model_name_or_path": str(tmp_path / "llm")}
    (folder / "config.json").write_text(json.dumps(config))
    del config["visual"]
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text(json.dumps({**config, "architectures": ["QWenModel"]}))
    np.save(tmp_path / "images.npy", model.images)
    completed = run(
        tree,
        HERE / "drive_model.py",
        folder,
        tmp_path / "images.npy",
        tmp_path / "features.npy",
        cwd=tmp_path,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    expected = model.figures["features_every_16th_query"]
    features = np.load(tmp_path / "features.npy")
    assert np.abs(features[:, ::16] - expected).max() < 1e-4 * np.abs(expected).max()


def test_predictor_of_two_layers(two_layers, tmp_path):
    """PaddleMIX's Predictor has constants for 32 layers; the plugin runs models of other sizes as well."""
    answers = predict(FAKE, two_layers, [ONE_IMAGE, TWO_IMAGES], tmp_path)
    for query, answer in zip([ONE_IMAGE, TWO_IMAGES], answers):
        [tokens], [ids] = answer["tokens"], answer["input_ids"]
        assert len(tokens) == FAKE_MAX_LEN - len(ids)
        assert tokens[:24] == expected_tokens(two_layers, query, 24)


@needs_compiler
def test_a_missing_gpu(two_layers, tmp_path):
    """The script's default, a GPU, has the CPU as fallback; a value of QWENVL_DEVICE has none, be it gpu or invalid."""
    fake_driver(tmp_path)
    driver = {"LD_LIBRARY_PATH": str(tmp_path), "FAKE_CUDA": "12090", "FAKE_GPUS": "0"}
    command = predictor_command(FAKE, two_layers, [ONE_IMAGE], tmp_path / "out.json")
    completed = run(FAKE, *command, cwd=tmp_path, **driver)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert "qwenvl: --device gpu: no GPU found, running on the CPU" in completed.stderr.splitlines()
    completed = run(FAKE, *command, cwd=tmp_path, QWENVL_DEVICE="gpu", **driver)
    assert completed.returncode == 1
    assert "--device gpu:0: the NVIDIA driver shows 0 GPU(s) here" in completed.stderr.splitlines()[-1]
    completed = run(FAKE, *command, cwd=tmp_path, QWENVL_DEVICE="tpu", **driver)
    assert completed.stderr.splitlines()[-1].endswith("QWENVL_DEVICE tpu: must be cpu, gpu or gpu:N")


@pytest.mark.parametrize("tree", [real])
def test_predictor_of_32_layers(tree, stock_flow, tmp_path):
    answers = predict(tree, stock_flow, [ONE_IMAGE, TWO_IMAGES], tmp_path)
    for query, answer in zip([ONE_IMAGE, TWO_IMAGES], answers):
        assert answer["tokens"][0][:24] == expected_tokens(stock_flow, query, 24)


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
    completed = run(tree, HERE / "drive_stock_main.py", script, STREET, *stages, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr[-3000:]
    [line] = [line for line in completed.stdout.splitlines() if line.startswith("Outputs:")]
    [text] = ast.literal_eval(line.removeprefix("Outputs:").strip())
    query = [{"image": str(STREET)}, {"text": "Generate the caption in English with grounding:"}]
    vl = QwenVL.from_exported(
        stock_flow / "vision" / "vision", stock_flow / "text" / "qwen", stock_flow / "model"
    )
    assert text.startswith(vl.generate(query, max_new_tokens=8).text)


def test_two_processes_in_the_same_working_directory(two_layers, tmp_path):
    """Token files, which upstream writes to the working directory, go to a temporary folder of each process."""
    temporary, work = tmp_path / "temporary", tmp_path / "work"
    temporary.mkdir()
    work.mkdir()
    env = {**os.environ, "PYTHONPATH": str(FAKE), "TMPDIR": str(temporary)}
    outputs = [tmp_path / "0.json", tmp_path / "1.json"]
    queries = [ONE_IMAGE, TWO_IMAGES]
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, predictor_command(FAKE, two_layers, [query], output))],
            cwd=work,
            env=env,
            stderr=subprocess.DEVNULL,
        )
        for query, output in zip(queries, outputs)
    ]
    assert [process.wait(300) for process in processes] == [0, 0]
    for query, output in zip(queries, outputs):
        [answer] = json.loads(output.read_text())
        assert answer["tokens"][0][:24] == expected_tokens(two_layers, query, 24)
    assert list(work.iterdir()) == []
    assert not list(temporary.glob("qwenvl*"))


def test_configured_folder_for_token_files(two_layers, tmp_path):
    predict(FAKE, two_layers, [ONE_IMAGE], tmp_path, QWENVL_REAL_TIME_SAVE_DIR="here")
    assert (tmp_path / "here").is_dir()
    assert list((tmp_path / "here").iterdir()) == []


@pytest.fixture(scope="session")
def model_with_turn_end(two_layers, tmp_path_factory) -> tuple[Path, int]:
    """Folder with a model whose answer to ONE_IMAGE has a <|im_end|>, and the number of tokens up to and including it.

    The columns of <|im_end|> and of a generated token are swapped in lm_head.
    """
    folder = tmp_path_factory.mktemp("chat")
    tokens = expected_tokens(two_layers, ONE_IMAGE, 64)
    # The first token, from the third on, that differs from all tokens before it.
    index = next(i for i, token in enumerate(tokens) if i > 1 and token not in tokens[:i])
    shutil.copytree(two_layers / "model", folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    im_end = QwenTokenizer.from_folder(folder / "model").im_end_id
    swapped = [im_end, tokens[index]]
    weights["lm_head.weight"][:, swapped] = weights["lm_head.weight"][:, swapped[::-1]]
    save_file(weights, folder / "model" / "model.safetensors")
    export_vision(folder / "model", folder / "vision" / "vision")
    export_language(folder / "model", folder / "text", "qwen")
    return folder, index + 1


@pytest.mark.parametrize("is_chat_model", [True, False])
def test_im_end_is_a_stop_token_of_chat_models_only(model_with_turn_end, is_chat_model, tmp_path):
    folder, n_tokens = model_with_turn_end
    generation_config = folder / "model" / "generation_config.json"
    generation_config.write_text(json.dumps({"chat_format": "chatml" if is_chat_model else "raw"}))
    [answer] = predict(FAKE, folder, [ONE_IMAGE], tmp_path)
    assert (len(answer["tokens"][0]) == n_tokens) == is_chat_model


@pytest.mark.parametrize("removed", ["pdmodel", "json"])
def test_programs_in_only_one_form(removed, two_layers, tmp_path):
    """An export has its programs as PIR (.json) and in the legacy form (.pdmodel); either one suffices."""
    for stage in ("vision", "text", "model"):
        shutil.copytree(two_layers / stage, tmp_path / stage)
    for prefix in ("vision/vision", "text/qwen"):
        (tmp_path / f"{prefix}.{removed}").unlink()
    [answer] = predict(FAKE, tmp_path, [ONE_IMAGE], tmp_path)
    assert answer["tokens"][0][:24] == expected_tokens(two_layers, ONE_IMAGE, 24)


def test_upstream_opens_paths_without_an_export(two_layers, tmp_path):
    shutil.copytree(two_layers / "model", tmp_path / "model")
    out = tmp_path / "answers.json"
    completed = run(FAKE, *predictor_command(FAKE, tmp_path, [ONE_IMAGE], out), cwd=tmp_path)
    assert f"upstream finds no {tmp_path / 'vision' / 'vision'}.pdmodel" in completed.stderr
