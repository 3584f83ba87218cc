"""Unusual checkpoints that users have: read as the official loaders read them, or refused with a message."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import paddle
import pytest
from folders import renamed, split_into_ranks, write
from safetensors.numpy import load_file, save_file
from torch_files import write_bin

from paddlemix_qwenvl_plugin import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.config import is_chat_model
from paddlemix_qwenvl_plugin.modeling.weights import load_vision

LM_HEAD = "lm_head.weight"
WTE = "transformer.llm.wte.weight"
TABLE = "visual.vit.positional_embedding"


def read(folder, dtype="float32"):
    checkpoint = Checkpoint(folder)
    return dict(checkpoint.tensors({**checkpoint.language, **checkpoint.vision}, dtype))


def with_config(folder, **changes):
    """Change keys of config.json; the keys in `visual` are changed in the section of this name."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["visual"].update(changes.pop("visual", {}))
    path.write_text(json.dumps({**data, **changes}))
    return folder


@pytest.fixture
def model(golden):
    return golden("b")


@pytest.fixture
def folder_of(model, tmp_path):
    """Function that writes a folder of the golden model's config and the given weights."""

    def make(weights, kind="safetensors", name="model"):
        return write(tmp_path / name, model.folder / "config.json", weights, kind)

    return make


# Shards and their index


def test_an_index_that_omits_tensors_of_its_shards(model, folder_of):
    """All tensors of a shard are read, as in transformers and PaddleNLP."""
    folder = folder_of(model.weights, "sharded-safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    one_name_of_each_file = {file: name for name, file in index["weight_map"].items()}
    index["weight_map"] = {name: file for file, name in one_name_of_each_file.items()}
    path.write_text(json.dumps(index))
    assert len(index["weight_map"]) == 3
    np.testing.assert_array_equal(read(folder)["lm_head.weight"], model.weights[LM_HEAD])


def test_an_index_that_omits_a_shard(model, folder_of):
    folder = folder_of(model.weights, "sharded-safetensors")
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    kept = {name: file for name, file in weight_map.items() if not file.startswith("model-00003")}
    path.write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(
        QwenVLError, match=r"is missing; model-00003-of-00003\.safetensors is not in the index"
    ):
        Checkpoint(folder)


def test_an_index_that_lists_a_tensor_twice(model, folder_of):
    folder = folder_of(model.weights, "sharded-safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(
        path.read_text().replace('"weight_map": {', f'"weight_map": {{"{WTE}": "x.safetensors", ')
    )
    with pytest.raises(QwenVLError, match=rf"index\.json: not valid JSON \({WTE} is listed twice\)"):
        Checkpoint(folder)


def test_shards_without_an_index(model, folder_of):
    folder = folder_of(model.weights, "sharded-safetensors")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        UsageError, match=r"holds shards, such as model-00001-of-00003.*, but not their \.index\.json"
    ):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "model.safetensors.index.json",
            "names model.safetensors.index.json, which is not a .safetensors file",
        ),
        ("..", "the index names a file outside its folder: .."),
        ("a/../config.json", "the index names a file outside its folder"),
        ("..\\other.safetensors", "the index names a file outside its folder"),
        ("/etc/passwd", "the index names a file outside its folder"),
        ("folder.safetensors", "folder.safetensors: missing"),
        (7, "not a weight index"),
        (["a.safetensors"], "not a weight index"),
    ],
)
def test_forbidden_files_of_an_index(model, folder_of, file, message):
    """The index itself, files outside the folder, a folder, values that are not text."""
    folder = folder_of(model.weights, "sharded-safetensors")
    (folder / "folder.safetensors").mkdir()
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": {**weight_map, WTE: file}}))
    with pytest.raises(QwenVLError) as caught:
        Checkpoint(folder)
    assert message in str(caught.value)


# lm_head


def without_lm_head(weights):
    """The weights of a model with tied embeddings: the embedding is stored once, and also used as lm_head."""
    return {name: value for name, value in weights.items() if name != LM_HEAD}


@pytest.mark.parametrize("scheme", ["paddlemix", "huggingface"])
@pytest.mark.parametrize("kind", ["safetensors", "pdparams"])
def test_a_tied_lm_head(model, folder_of, scheme, kind):
    weights = renamed(without_lm_head(model.weights), scheme, transpose=scheme == "huggingface")
    folder = with_config(folder_of(weights, kind), tie_word_embeddings=True)
    np.testing.assert_array_equal(read(folder)["lm_head.weight"], model.weights[WTE].T)
    checkpoint = Checkpoint(folder)
    language = dict(checkpoint.tensors(checkpoint.language, "float32", out_in=True))
    np.testing.assert_array_equal(language["lm_head.weight"], model.weights[WTE])
    np.testing.assert_array_equal(language["wte.weight"], model.weights[WTE])


def test_a_stored_lm_head_in_a_model_with_tied_embeddings(model, folder_of):
    """The embedding is used, as in transformers."""
    folder = with_config(folder_of(model.weights), tie_word_embeddings=True)
    np.testing.assert_array_equal(read(folder)["lm_head.weight"], model.weights[WTE].T)


def test_an_absent_lm_head(model, folder_of):
    folder = folder_of(without_lm_head(model.weights))
    with pytest.raises(
        QwenVLError, match=r"lm_head\.weight is missing; .* set tie_word_embeddings to true in config"
    ):
        Checkpoint(folder)


def test_the_storage_of_lm_head_does_not_change_the_fingerprint(model, folder_of):
    folder = with_config(folder_of(model.weights), tie_word_embeddings=True)
    assert Checkpoint(folder).fingerprint() == Checkpoint(model.folder).fingerprint()


# Sizes


@pytest.mark.parametrize("transpose", [False, True])
def test_a_vocabulary_padded_to_another_size(model, folder_of, transpose):
    """Refused, as in transformers and PaddleNLP, unless vocab_size in config.json is the padded size."""
    rows = ((0, 64), (0, 0))
    weights = {
        **model.weights,
        WTE: np.pad(model.weights[WTE], rows),
        LM_HEAD: np.pad(model.weights[LM_HEAD].T, rows).T,
    }
    folder = folder_of(renamed(weights, "huggingface", transpose))
    size = len(weights[WTE])
    with pytest.raises(
        QwenVLError, match=rf"wte\.weight has shape .*; if the weights are right, set vocab_size to {size}"
    ):
        Checkpoint(folder)
    with_config(folder, vocab_size=size)
    np.testing.assert_array_equal(read(folder)["wte.weight"], weights[WTE])


def test_fewer_rows_than_the_tokenizer_needs(model, folder_of):
    start = model.config["visual"]["image_start_id"]
    with pytest.raises(
        QwenVLError, match=r"image_start_id \+ 2 \(the image padding token\) must be below vocab_size"
    ):
        Checkpoint(with_config(folder_of(model.weights), vocab_size=start + 2))


def test_another_number_of_queries(model, folder_of):
    weights = dict(model.weights)
    for name in ("visual.attn_pool.query", "visual.attn_pool.pos_embed"):
        weights[name] = np.ascontiguousarray(weights[name][:64])
    folder = folder_of(weights)
    with pytest.raises(QwenVLError, match="if the weights are right, set n_queries of visual to 64"):
        Checkpoint(folder)
    with_config(folder, visual={"n_queries": 64})
    assert read(folder)["visual.attn_pool.query"].shape[0] == 64


def features(folder, image_size):
    images = np.random.RandomState(3).randn(1, 3, image_size, image_size).astype("float32")
    with paddle.no_grad():
        return load_vision(Checkpoint(folder))(paddle.to_tensor(images)).numpy()


@pytest.mark.parametrize("image_size", [224, 448])
def test_a_position_table_of_another_size(model, folder_of, image_size):
    """The official class resizes its 16 x 16 table in every pass; a table stored resized gives the same features."""
    folder = with_config(folder_of(model.weights), visual={"image_size": image_size})
    grid = image_size // model.config["visual"]["patch_size"]
    table = paddle.to_tensor(model.weights[TABLE].T.reshape(1, -1, 16, 16))
    resized = paddle.nn.functional.interpolate(table, (grid, grid), mode="bicubic", align_corners=False)
    weights = {**model.weights, TABLE: np.ascontiguousarray(resized.numpy().reshape(-1, grid * grid).T)}
    stored = with_config(folder_of(weights, name="stored"), visual={"image_size": image_size})
    np.testing.assert_allclose(features(stored, image_size), features(folder, image_size), atol=1e-5)


def test_a_position_table_that_is_not_square(model, folder_of):
    weights = {**model.weights, TABLE: np.ascontiguousarray(model.weights[TABLE][:200])}
    with pytest.raises(QwenVLError, match=r"positional_embedding has shape \[200, "):
        Checkpoint(folder_of(weights))


# Dtypes


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "bool"])
@pytest.mark.parametrize("kind", ["safetensors", "pdparams"])
def test_integers_in_a_float_model(model, folder_of, dtype, kind):
    folder = folder_of({**model.weights, LM_HEAD: np.ones_like(model.weights[LM_HEAD], dtype)}, kind)
    message = f"lm_head.weight has dtype {dtype}, a weight must be float32, float16, bfloat16 or float64"
    with pytest.raises(QwenVLError, match=rf"model(_state)?\.{kind}: {message}"):
        Checkpoint(folder)


def test_float8_in_a_float_model(model, folder_of):
    folder = folder_of(model.weights)
    path = folder / "model.safetensors"
    # NumPy has no float8: write uint8, then change the dtype in the header and the header's length (first 8 bytes).
    tensors = {**load_file(path), "visual.ln_post.bias": np.zeros(256, np.uint8)}
    save_file(tensors, path)
    content = path.read_bytes()
    data = bytearray(content.replace(b'"dtype":"U8"', b'"dtype":"F8_E4M3"', 1))
    data[:8] = (int.from_bytes(data[:8], "little") + len("F8_E4M3") - len("U8")).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(QwenVLError, match=r"visual\.ln_post\.bias has dtype float8_e4m3fn, a weight must be"):
        Checkpoint(folder)


def test_boolean_masks_in_older_checkpoints_are_ignored(model, folder_of):
    weights = {**model.weights, "transformer.llm.h.0.attn.bias": np.ones([1, 1, 4, 4], bool)}
    assert set(read(folder_of(weights))) == set(read(model.folder))


# Base or chat model


def test_detection_of_a_chat_model(model, folder_of):
    """Base and chat model have the same sizes: only generation_config.json tells which of the two it is."""
    folder = folder_of(model.weights)
    assert not is_chat_model(folder)
    (folder / "generation_config.json").write_text('{"chat_format": "chatml"}')
    assert is_chat_model(folder)
    assert Checkpoint(folder).fingerprint() == Checkpoint(model.folder).fingerprint()


# Tensor-parallel ranks


def write_ranks(folder, config, ranks):
    folder.mkdir()
    shutil.copyfile(config, folder / "config.json")
    for number, rank in enumerate(ranks):
        paddle.save(
            {name: paddle.to_tensor(value) for name, value in rank.items()},
            str(folder / f"model_state.tp{number:02}.pdparams"),
        )
    return with_config(folder, tensor_parallel_degree=len(ranks))


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["paddlemix", "static"])
def test_ranks_are_joined(model, tmp_path, n_ranks, scheme):
    ranks = [renamed(rank, scheme, transpose=False) for rank in split_into_ranks(model.weights, n_ranks)]
    folder = write_ranks(tmp_path / "ranks", model.folder / "config.json", ranks)
    joined, expected = read(folder), read(model.folder)
    assert joined.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(joined[name], value, err_msg=name)
    assert Checkpoint(folder).fingerprint() == Checkpoint(model.folder).fingerprint()


def remove_rank(folder):
    (folder / "model_state.tp01.pdparams").unlink()


def add_pipeline_stage(folder):
    (folder / "model_state.tp01.pdparams").rename(folder / "model_state.tp01_pp00.pdparams")


def change_norm(folder):
    path = str(folder / "model_state.tp01.pdparams")
    tensors = paddle.load(path)
    tensors["transformer.llm.ln_f.weight"] += 1
    paddle.save(tensors, path)


def remove_tensor(folder):
    path = str(folder / "model_state.tp01.pdparams")
    tensors = paddle.load(path)
    del tensors["transformer.llm.ln_f.weight"]
    paddle.save(tensors, path)


def change_shape(folder):
    path = str(folder / "model_state.tp01.pdparams")
    tensors = paddle.load(path)
    tensors[LM_HEAD] = tensors[LM_HEAD][:, 1:]
    paddle.save(tensors, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_rank, r"holds the tensor-parallel ranks tp00 of 2; copy all ranks, each once"),
        (
            add_pipeline_stage,
            r"tp01_pp00\.pdparams: the model is split by more than tensor parallelism \(pp00\)",
        ),
        (change_norm, r"ln_f\.weight differs between the tensor-parallel ranks"),
        (
            remove_tensor,
            r"tp01\.pdparams: its tensors are not those of .*tp00\.pdparams, such as .*ln_f\.weight",
        ),
        (change_shape, r"tp01\.pdparams: lm_head\.weight is float32 \[.*\], but float32 \[.*\] in .*tp00"),
    ],
)
def test_ranks_that_do_not_fit(model, tmp_path, damage, message):
    folder = write_ranks(tmp_path / "ranks", model.folder / "config.json", split_into_ranks(model.weights, 2))
    damage(folder)
    with pytest.raises(QwenVLError, match=message):
        read(folder)


# Other file formats


def test_a_file_of_pytorch_with_shared_storage(model, tmp_path):
    """A .bin file of a model with tied embeddings: two names of one array."""
    shutil.copyfile(model.folder / "config.json", tmp_path / "config.json")
    weights = renamed(without_lm_head(model.weights), "huggingface", transpose=True)
    weights[LM_HEAD] = weights["transformer.wte.weight"]
    write_bin(tmp_path / "pytorch_model.bin", weights, "float32")
    np.testing.assert_array_equal(read(tmp_path)["lm_head.weight"], model.weights[WTE].T)


def test_pickles_of_numpy(model, tmp_path):
    """A .pdparams file of older PaddleNLP versions: NumPy arrays, in each pickle protocol that paddle.save has used."""
    shutil.copyfile(model.folder / "config.json", tmp_path / "config.json")
    for protocol in (2, 3, 4):
        (tmp_path / "model_state.pdparams").write_bytes(pickle.dumps(model.weights, protocol))
        np.testing.assert_array_equal(read(tmp_path)["lm_head.weight"], model.weights[LM_HEAD])
