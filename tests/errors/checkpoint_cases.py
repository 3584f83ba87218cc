"""Cases of docs/errors.md: checkpoints with mistakes that occur in practice, malicious weight files, `convert --to`.

error_cases.py explains what a case is.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from error_cases import LM_HEAD, WTE, Bench, Call, case, cases, header, pdparams, with_model
from folders import split_into_ranks

N_PADDED_TOKENS = 64


def pad_vocabulary(bench: Bench) -> list[str]:
    tensors = bench.weights()
    wte = np.pad(tensors[WTE], ((0, N_PADDED_TOKENS), (0, 0)))
    lm_head = np.pad(tensors[LM_HEAD], ((0, 0), (0, N_PADDED_TOKENS)))
    bench.save({**tensors, WTE: wte, LM_HEAD: lm_head})
    return bench.export()


def split_model_into_ranks(bench: Bench) -> list[Path]:
    """Split the weights of model/ into two tensor-parallel ranks; return the paths of their files."""
    paths = [Path(f"model/model_state.tp0{i}.pdparams") for i in range(2)]
    for path, rank in zip(paths, split_into_ranks(bench.weights(), 2)):
        path.write_bytes(pickle.dumps(rank, 4))
    return paths


def index_with_duplicate(weight_map: dict[str, str]) -> str:
    """The text of an index in which the first tensor is repeated at the end."""
    text = json.dumps({"weight_map": weight_map})
    return text.replace("}}", f', "{next(iter(weight_map))}": "b.safetensors"}}}}')


def archive(bench: Bench, *members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> list[str]:
    """Export of a model whose weight file, pytorch_model.bin, is a ZIP archive with these members (name, content)."""
    bench.weights()
    with zipfile.ZipFile("model/pytorch_model.bin", "w", compression) as file:
        for name, content in members:
            file.writestr(zipfile.ZipInfo(name), content, compression)
    return bench.export()


def header_with_duplicate(bench: Bench) -> list[str]:
    path = bench.model() / "model.safetensors"
    content = path.read_bytes()
    [length] = struct.unpack("<Q", content[:8])
    header_text = content[8 : 8 + length].rstrip()
    duplicated = header_text[:-1] + b', "' + WTE.encode() + b'": {}}'
    path.write_bytes(struct.pack("<Q", len(duplicated)) + duplicated + content[8 + length :])
    return bench.export()


@case("the index lists a tensor twice")
def _(bench: Bench) -> list[str]:
    Path("model/model.safetensors.index.json").write_text(index_with_duplicate(bench.shards()))
    return bench.export()


@case("the index names itself")
def _(bench: Bench) -> list[str]:
    bench.index({**bench.shards(), WTE: "model.safetensors.index.json"})
    return bench.export()


@case("the index omits a shard")
def _(bench: Bench) -> list[str]:
    weight_map = bench.shards()
    Path("model/b.safetensors").rename("model/model-00002-of-00002.safetensors")
    bench.index({name: file for name, file in weight_map.items() if file == "a.safetensors"})
    return bench.export()


@case("shards without their index")
def _(bench: Bench) -> list[str]:
    bench.shards()
    for i, name in enumerate("ab", start=1):
        Path(f"model/{name}.safetensors").rename(f"model/model-0000{i}-of-00002.safetensors")
    return bench.export()


@case("no lm_head, and `tie_word_embeddings` is not set")
def _(bench: Bench) -> list[str]:
    bench.save({name: value for name, value in bench.weights().items() if name != LM_HEAD})
    return bench.export()


@case("another `n_queries` than in config.json")
def _(bench: Bench) -> list[str]:
    bench.config(visual_={"n_queries": 64})
    return bench.export()


@case("a tensor of float8")
def _(bench: Bench) -> list[str]:
    tensors = bench.weights()
    bench.save({**tensors, WTE: np.zeros(tensors[WTE].shape, np.uint8)})
    path = Path("model/model.safetensors")
    content = path.read_bytes()
    [length] = struct.unpack("<Q", content[:8])
    changed_header = content[8 : 8 + length].replace(b'"U8"', b'"F8_E4M3"')
    path.write_bytes(struct.pack("<Q", len(changed_header)) + changed_header + content[8 + length :])
    return bench.export()


@case("a tensor-parallel rank is missing")
def _(bench: Bench) -> list[str]:
    split_model_into_ranks(bench)[0].unlink()
    return bench.export()


@case("a rank of pipeline parallelism")
def _(bench: Bench) -> list[str]:
    split_model_into_ranks(bench)[1].rename("model/model_state.tp01_pp00.pdparams")
    return bench.export()


@case("tensor-parallel ranks of different steps")
def _(bench: Bench) -> list[str]:
    path = split_model_into_ranks(bench)[1]
    tensors: dict[str, Any] = pickle.loads(path.read_bytes())
    tensors["visual.ln_post.bias"] = tensors["visual.ln_post.bias"] + 1
    path.write_bytes(pickle.dumps(tensors, 4))
    return bench.export()


@case("model.safetensors has a header of 2 GB")
def _(bench: Bench) -> list[str]:
    with (bench.model() / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 1 << 31))
        file.truncate(3 << 30)  # sparse
    return bench.export()


@case("config.json of gigabytes")
def _(bench: Bench) -> list[str]:
    with (bench.model() / "config.json").open("r+b") as file:
        file.truncate(3 << 30)  # sparse
    return bench.export()


cases(
    {
        "the vocabulary is padded, but not in config.json": pad_vocabulary,
        "a size in model.safetensors is not a number": header(
            lambda entries: entries[WTE].update(shape=[float("nan")])
        ),
        "a tensor twice in the header of model.safetensors": header_with_duplicate,
        # The key is a tuple of two equal tuples, nested 40 levels deep: a walk through it takes 2**40 steps.
        "model_state.pdparams has a table with other keys than text": pdparams(
            b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 40 + b"Ns."
        ),
        # N pushes None, 0 removes it.
        "model_state.pdparams has operations without end": pdparams(b"\x80\x02" + b"N0" * 200_000 + b"."),
        "model_state.pdparams has an operation that no table needs": pdparams(b"\x80\x02L7L\n."),
        "pytorch_model.bin brings code": lambda bench: archive(
            bench, ("a/data.pkl", pickle.dumps({WTE: Call()}, 2))
        ),
        "pytorch_model.bin is compressed": lambda bench: archive(
            bench, ("a/data.pkl", bytes(1 << 24)), compression=zipfile.ZIP_DEFLATED
        ),
        "pytorch_model.bin has a member twice": lambda bench: archive(
            bench, ("a/data.pkl", b"\x80\x02}."), ("a/data/../data.pkl", b""), ("a/data/../data.pkl", b"")
        ),
        "`convert --to` another scheme": with_model("convert", "model", "new", "--to", "pytorch"),
    }
)
