"""Cases of docs/errors.md: for the text in a row's first column, a function that prepares the error.

The function gets a `Bench` in an empty working directory, creates the input there, and returns the arguments of
`qwenvl`. Functions such as `predict(…)` and `recipe(…)` return a case that calls the method of `Bench` of the same name
with the same arguments. The other *_cases.py of this folder add their cases to CASES. test_errors.py runs them; with
QWENVL_TEST_UPDATE_ERRORS=1 it writes the messages into the rows (docs/development.md).
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import shutil
import socket
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import pytest
import yaml
from corrupted import corrupt
from fake_network import FakeNetwork
from PIL import Image
from quantized_folders import CONFIG, Variant, quantized_tensors, write_tensors
from safetensors.numpy import load_file, save_file

from paddlemix_qwenvl_plugin.batch.journal import Journal
from paddlemix_qwenvl_plugin.cli.signals import Terminated
from paddlemix_qwenvl_plugin.export.export import export_language
from paddlemix_qwenvl_plugin.recipes import expect, process
from paddlemix_qwenvl_plugin.tiny.make import make_tiny
from paddlemix_qwenvl_plugin.util import paddle_version
from paddlemix_qwenvl_plugin.util.machine import CudaDriver, Gpu

STREET = Path(__file__).resolve().parents[2] / "recipes" / "images" / "street.png"
# Tensors of the tiny model.
WTE = "transformer.llm.wte.weight"
LM_HEAD = "lm_head.weight"
C_ATTN = "transformer.llm.h.0.attn.c_attn.weight"

_GPTQ = Variant(act_order=True)  # 4 bits, groups of 32
ROW = {"id": "a", "prompt": "What is it?"}  # of an input of `batch`


class Bench:
    """Test bench of a case: creates valid inputs in the working directory, which the case then corrupts.

    Methods whose description begins with a command prepare its inputs and return its arguments. The command runs in the
    test's process, or in a subprocess if a limit or `stdout` is set.
    """

    def __init__(self, tiny_exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._tiny = tiny_exported
        self.monkeypatch = monkeypatch
        # Maximum size of a file, as on a full disk.
        self.max_file_bytes: int | None = None
        # Maximum address space, as with `ulimit -v`.
        self.max_address_bytes: int | None = None
        # Path of the file to which standard output goes.
        self.stdout: str | None = None
        # Content of standard input; None: closed (in a subprocess: empty).
        self.stdin: bytes | None = b""
        # An object that must exist while the command runs, such as a lock.
        self.keep_alive: Any = None

    def model(self) -> Path:
        """Copy the tiny model to model/."""
        return Path(shutil.copytree(self._tiny / "model", "model", dirs_exist_ok=True))

    def config(self, **changes: Any) -> None:
        """Copy the tiny model and change keys of its config.json; None removes a key.

        The keys of `visual_` are changed in the section `visual`.
        """
        path = self.model() / "config.json"
        data = json.loads(path.read_text())
        data["visual"].update(changes.pop("visual_", {}))
        data.update(changes)
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    def weights(self) -> dict[str, np.ndarray]:
        """Copy the tiny model without its weight file, and return its tensors."""
        path = self.model() / "model.safetensors"
        tensors = load_file(path)
        path.unlink()
        return tensors

    def save(self, tensors: dict[str, np.ndarray], name: str = "model.safetensors") -> None:
        """Write tensors to a weight file of model/."""
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, f"model/{name}")

    def quantized(self, *flags: str, **changes: Any) -> list[str]:
        """`export-language` of a quantized model in model/, with changes to its quantization_config."""
        tensors, _ = quantized_tensors(_GPTQ)
        config = {**CONFIG, "quantization_config": {**_GPTQ.config, **changes}}
        write_tensors(Path("model"), tensors, config)
        return ["export-language", "--model_name_or_path", "model", "--output_path", "out", *flags]

    def shards(self) -> dict[str, str]:
        """Split the tiny model into a.safetensors and b.safetensors; return the weight_map, which is not written."""
        tensors = self.weights()
        names = list(tensors)
        half = len(names) // 2
        self.save({name: tensors[name] for name in names[:half]}, "a.safetensors")
        self.save({name: tensors[name] for name in names[half:]}, "b.safetensors")
        return {name: "a.safetensors" if i < half else "b.safetensors" for i, name in enumerate(names)}

    def index(self, weight_map: Any) -> None:
        """Write the index of shards."""
        Path("model/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def export(self, *flags: str) -> list[str]:
        """`export-vision` of model/ to out/vision."""
        return ["export-vision", "--model_name_or_path", "model", "--save_path", "out/vision", *flags]

    def exported(self) -> None:
        """Copy the exported stages of the tiny model to vision/ and text/."""
        shutil.copytree(self._tiny / "vision", "vision")
        shutil.copytree(self._tiny / "text", "text")

    def manifest(self, **changes: Any) -> None:
        """Copy the exported stages and change keys of the language stage's manifest; None removes a key."""
        self.exported()
        path = Path("text/qwen.manifest.json")
        data = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    def predict(self, *flags: str, prompt: str = "What is it?") -> list[str]:
        """`predict` with the exported stages."""
        if not Path("vision").exists():
            self.exported()
        stages = ["--first_model_path", "vision/vision", "--second_model_path", "text/qwen"]
        return ["predict", *stages, "--prompt", prompt, "--max_new_tokens", "2", *flags]

    def stage_flags(self) -> list[str]:
        """The flags of the exported stages and their values; `predict` copies the stages if they are not there."""
        return self.predict()[1:5]

    def chat(self, *lines: str, flags: tuple[str, ...] = ()) -> list[str]:
        """`chat` with lines in its standard input."""
        self.stdin = "".join(f"{line}\n" for line in lines).encode()
        return ["chat", *self.stage_flags(), "--max_new_tokens", "2", *flags]

    def batch(self, *flags: str, rows: Sequence[Any] = (ROW,), out: str = "out.jsonl") -> list[str]:
        """`batch` with these rows in in.jsonl."""
        Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["batch", "in.jsonl", out, *self.stage_flags(), "--max_new_tokens", "2", *flags]

    def predict_image(self, content: bytes | Image.Image, name: str) -> list[str]:
        """`predict` with an image of this content."""
        if isinstance(content, Image.Image):
            content.save(name)
        else:
            Path(name).write_bytes(content)
        return self.predict("--image", name)

    def recipe(self, *arguments: str, **keys: Any) -> list[str]:
        """`run` of a recipe with a step that does nothing; `keys` are added or replaced, None removes a key."""
        data = {
            "schema": 1,
            "name": "fake",
            "why": "a test",
            "steps": [{"name": "only", "run": ["${python}", "-c", ""]}],
            **keys,
        }
        data = {key: value for key, value in data.items() if value is not None}
        return self.recipe_text(yaml.safe_dump(data), *arguments)

    def recipe_text(self, text: str, *arguments: str) -> list[str]:
        """`run` of a recipe with this text."""
        Path("fake.yaml").write_text(text)
        return ["run", "fake.yaml", *arguments]

    def set_demo_model(self, folder: Path) -> None:
        """Let `demo` use this model instead of the one in the package."""
        self.monkeypatch.setattr("paddlemix_qwenvl_plugin.demo.run.MODEL", folder)

    def raise_error(self, error: BaseException) -> list[str]:
        """`make-tiny`, patched to raise `error`."""

        def fail(*_: Any) -> None:
            raise error

        self.monkeypatch.setattr("paddlemix_qwenvl_plugin.tiny.make.make_tiny", fail)
        return ["make-tiny", "model"]


Case = Callable[[Bench], list[str]]
CASES: dict[str, Case] = {}


def case(description: str) -> Callable[[Case], Case]:
    """Decorator: register the case of a row, given the text in its first column."""

    def register(prepare: Case) -> Case:
        assert description not in CASES, description
        CASES[description] = prepare
        return prepare

    return register


def cases(by_description: dict[str, Case]) -> None:
    """Register several cases."""
    for description, prepare in by_description.items():
        case(description)(prepare)


def truncate(path: str, fraction: float) -> None:
    """Truncate a file to a fraction of its size."""
    os.truncate(path, int(Path(path).stat().st_size * fraction))


def png(width: int, height: int, *extra_chunks: tuple[bytes, bytes]) -> bytes:
    """A black PNG of one bit per pixel, with extra chunks (type, content) before the pixels."""
    compressor = zlib.compressobj(1)
    line = bytes(1 + (width + 7) // 8)
    pixels = b"".join([*(compressor.compress(line) for _ in range(height)), compressor.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for chunk_type, content in ((b"IHDR", header), *extra_chunks, (b"IDAT", pixels), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(chunk_type + content))
        data += struct.pack(">I", len(content)) + chunk_type + content + checksum
    return data


# The command line

cases(
    {
        "no command": lambda bench: [],
        "an unknown command": lambda bench: ["explain"],
        "an unknown command of `recipes`": lambda bench: ["recipes", "explain"],
        "an unknown flag": lambda bench: ["predict", "--colour"],
        "a required flag is missing": lambda bench: ["predict", "--prompt", "What is it?"],
        "a required argument is missing": lambda bench: ["make-tiny"],
        "an argument too many": lambda bench: ["make-tiny", "model", "other"],
        "a flag without its value": lambda bench: ["predict", "--prompt"],
        "a word where a number is wanted": lambda bench: bench.predict("--max_new_tokens", "many"),
    }
)

# The model folder: config.json


@case("the model folder is not there")
def _(bench: Bench) -> list[str]:
    return bench.export()


@case("the model folder is a file")
def _(bench: Bench) -> list[str]:
    Path("model").write_text("")
    return bench.export()


@case("no config.json")
def _(bench: Bench) -> list[str]:
    (bench.model() / "config.json").unlink()
    return bench.export()


def config_text(text: str | bytes) -> Case:
    """Export of the tiny model with this text as its config.json."""

    def prepare(bench: Bench) -> list[str]:
        content = text if isinstance(text, bytes) else text.encode()
        (bench.model() / "config.json").write_bytes(content)
        return bench.export()

    return prepare


def config(**changes: Any) -> Case:
    """Export of the tiny model with changed keys of its config.json."""

    def prepare(bench: Bench) -> list[str]:
        bench.config(**changes)
        return bench.export()

    return prepare


cases(
    {
        "config.json is not JSON": config_text('{"hidden_size": 256,'),
        "config.json is not UTF-8": config_text(b'{"a": "\xff"}'),
        "config.json holds a list": config_text("[]"),
        "config.json without `visual`": config(visual=None),
        "config.json without `hidden_size`": config(hidden_size=None),
        "`hidden_size` is a word": config(hidden_size="wide"),
        "two sizes are wrong": config(num_hidden_layers=0, vocab_size=-1),
        "heads and channels do not make `hidden_size`": config(num_attention_heads=3),
        "the image size is not a multiple of the patch size": config(visual_={"patch_size": 15}),
        # 129 patches a side; 128 are allowed.
        "an image of very many patches": config(visual_={"image_size": 14 * 129, "patch_size": 14}),
        "`mlp_ratio` is infinite": config(visual_={"mlp_ratio": float("inf")}),
    }
)

# The model folder: weights


@case("no weight file")
def _(bench: Bench) -> list[str]:
    bench.weights()
    return bench.export()


@case("model.safetensors is another kind of file")
def _(bench: Bench) -> list[str]:
    (bench.model() / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    return bench.export()


@case("model.safetensors is cut off in its header")
def _(bench: Bench) -> list[str]:
    os.truncate(bench.model() / "model.safetensors", 1000)
    return bench.export()


@case("model.safetensors is cut off in its values")
def _(bench: Bench) -> list[str]:
    bench.model()
    truncate("model/model.safetensors", 0.9)
    return bench.export()


@case("model.safetensors has a damaged header")
def _(bench: Bench) -> list[str]:
    with (bench.model() / "model.safetensors").open("r+b") as file:
        file.seek(8)  # after the length of the header
        file.write(b"[")
    return bench.export()


@case("a tensor has other bytes than its shape needs")
def _(bench: Bench) -> list[str]:
    path = bench.model() / "model.safetensors"
    content = path.read_bytes()
    assert b'"shape":[768]' in content
    path.write_bytes(content.replace(b'"shape":[768]', b'"shape":[769]', 1))
    return bench.export()


@case("a tensor of integers")
def _(bench: Bench) -> list[str]:
    tensors = bench.weights()
    bench.save({**tensors, WTE: tensors[WTE].astype(np.int64)})
    return bench.export()


# The model folder: GPTQ and AWQ

W1 = "transformer.h.0.mlp.w1"


def quantized(**changes: Any) -> Case:
    return lambda bench: bench.quantized(**changes)


def quantized_tensors_in_model() -> dict[str, np.ndarray]:
    return load_file("model/model.safetensors")


def quantized_tensor(name: str, change: Callable[[np.ndarray], np.ndarray] | None) -> Case:
    """Export of a GPTQ model in which a tensor is changed, or removed if `change` is None."""

    def prepare(bench: Bench) -> list[str]:
        arguments = bench.quantized()
        tensors = quantized_tensors_in_model()
        values = tensors.pop(name)
        bench.save({**tensors, name: change(values)} if change else tensors)
        return arguments

    return prepare


@case("quantized tensors without a quantization_config")
def _(bench: Bench) -> list[str]:
    arguments = bench.quantized()
    Path("model/config.json").write_text(json.dumps(CONFIG))
    return arguments


@case("one layer is not quantized")
def _(bench: Bench) -> list[str]:
    arguments = bench.quantized()
    tensors = quantized_tensors_in_model()
    other_tensors = {name: value for name, value in tensors.items() if not name.startswith(W1)}
    bench.save({**other_tensors, f"{W1}.weight": np.zeros([192, 256], np.float16)})
    return arguments


@case("a quantized lm_head")
def _(bench: Bench) -> list[str]:
    arguments = bench.quantized()
    bench.save({**quantized_tensors_in_model(), "lm_head.qweight": np.zeros([32, 64], np.int32)})
    return arguments


cases(
    {
        "a quantization_config without quantized tensors": config(quantization_config=_GPTQ.config),
        "quantized by another method": quantized(quant_method="bitsandbytes"),
        "quantized to 3 bits": quantized(bits=3),
        "the number of bits is a word": quantized(bits="four"),
        "AWQ with 8 bits": quantized(quant_method="awq", bits=8),
        "groups of 48": quantized(group_size=48),
        "GPTQ repacked for Marlin": quantized(checkpoint_format="marlin"),
        "AWQ in the gemv format": quantized(quant_method="awq", version="gemv"),
        "quantized tensors of another group size": quantized(group_size=64),
        "no zero points": quantized_tensor(f"{W1}.qzeros", None),
        "quantized weights that are not int32": quantized_tensor(
            f"{W1}.qweight", lambda v: v.astype(np.int64)
        ),
        "scales that float16 cannot hold": quantized_tensor(
            f"{W1}.scales", lambda v: v.astype(np.float32) * 0.3
        ),
        "g_idx describes other groups": quantized_tensor(f"{W1}.g_idx", lambda v: v * 0),
        "a bias that the model lacks": quantized_tensor(f"{W1}.bias", lambda v: v + 1),
        "--quant_type for a quantized folder": lambda bench: bench.quantized(
            "--quant_type", "weight_only_int4"
        ),
        "--engine portable for a quantized folder": lambda bench: bench.quantized("--engine", "portable"),
    }
)

# The model folder: other weight files


@case("model_state.pdparams is cut off")
def _(bench: Bench) -> list[str]:
    import paddle

    paddle.save(
        {key: paddle.to_tensor(v) for key, v in bench.weights().items()}, "model/model_state.pdparams"
    )
    truncate("model/model_state.pdparams", 0.5)
    return bench.export()


def pdparams(content: bytes) -> Case:
    """Export of the tiny model with this content as its weight file, model_state.pdparams."""

    def prepare(bench: Bench) -> list[str]:
        bench.weights()
        Path("model/model_state.pdparams").write_bytes(content)
        return bench.export()

    return prepare


cases(
    {
        "model_state.pdparams is not a pickle": pdparams(b"\x00" * 1000),
        # A string of 255 bytes, of which four are there.
        "model_state.pdparams is a damaged pickle": pdparams(b"\x80\x02}q\x00X\xff\x00\x00\x00name"),
        "model_state.pdparams holds a list": pdparams(pickle.dumps([1, 2], 2)),
        "model_state.pdparams holds a number": pdparams(pickle.dumps({"epoch": 3}, 2)),
    }
)


@case("pytorch_model.bin is cut off")
def _(bench: Bench) -> list[str]:
    bench.weights()
    Path("model/pytorch_model.bin").write_bytes(b"PK\x03\x04")  # the beginning of a ZIP archive
    return bench.export()


@case("the index is not JSON")
def _(bench: Bench) -> list[str]:
    bench.weights()
    Path("model/model.safetensors.index.json").write_text("weights")
    return bench.export()


@case("the index has no `weight_map`")
def _(bench: Bench) -> list[str]:
    bench.weights()
    Path("model/model.safetensors.index.json").write_text("{}")
    return bench.export()


@case("the index is empty")
def _(bench: Bench) -> list[str]:
    bench.weights()
    bench.index({})
    return bench.export()


@case("a file of the index is missing")
def _(bench: Bench) -> list[str]:
    bench.index(bench.shards())
    Path("model/b.safetensors").unlink()
    return bench.export()


@case("the index names a file outside the folder")
def _(bench: Bench) -> list[str]:
    bench.index({**bench.shards(), WTE: "../other.safetensors"})
    return bench.export()


@case("the index names the wrong file for a tensor")
def _(bench: Bench) -> list[str]:
    weight_map = bench.shards()
    assert weight_map[WTE] == "a.safetensors"
    bench.index({**weight_map, WTE: "b.safetensors"})
    return bench.export()


@case("a tensor in two files")
def _(bench: Bench) -> list[str]:
    bench.index(bench.shards())
    tensors = load_file("model/b.safetensors")
    bench.save({**tensors, WTE: load_file("model/a.safetensors")[WTE]}, "b.safetensors")
    return bench.export()


@case("a tensor under two names")
def _(bench: Bench) -> list[str]:
    tensors = bench.weights()
    bench.save({**tensors, "transformer.llm.lm_head.weight": tensors[LM_HEAD]})
    return bench.export()


@case("a tensor is missing")
def _(bench: Bench) -> list[str]:
    tensors = bench.weights()
    del tensors["transformer.llm.h.1.attn.c_attn.bias"]
    bench.save(tensors)
    return bench.export()


@case("a tensor too many")
def _(bench: Bench) -> list[str]:
    bench.save({**bench.weights(), "lora_A.weight": np.zeros([8, 8], np.float32)})
    return bench.export()


@case("a mis-shaped tensor")
def _(bench: Bench) -> list[str]:
    tensors = bench.weights()
    bench.save({**tensors, WTE: tensors[WTE][:-1]})
    return bench.export()


@case("one linear weight is transposed")
def _(bench: Bench) -> list[str]:
    tensors = bench.weights()
    bench.save({**tensors, C_ATTN: tensors[C_ATTN].T})
    return bench.export()


@case("the weights of another kind of model")
def _(bench: Bench) -> list[str]:
    bench.weights()
    bench.save({"bert.embeddings.weight": np.zeros([8, 8], np.float32)})
    return bench.export()


@case("a value too large for float16")
def _(bench: Bench) -> list[str]:
    tensors = bench.weights()
    tensors["visual.vit.ln_pre.weight"][0] = 1e6
    bench.save(tensors)
    return bench.export("--dtype", "float16")


# Export


def with_model(*arguments: str) -> Case:
    """A command with the tiny model in model/."""

    def prepare(bench: Bench) -> list[str]:
        bench.model()
        return list(arguments)

    return prepare


MODEL = ("--model_name_or_path", "model")
cases(
    {
        "`export-vision --dtype int8`": with_model(
            "export-vision", *MODEL, "--save_path", "v", "--dtype", "int8"
        ),
        "`export-vision --save_path .`": with_model("export-vision", *MODEL, "--save_path", "."),
        "`export-vision --save_path` below a file": with_model(
            "export-vision", *MODEL, "--save_path", "model/config.json/v"
        ),
        "`export-language --output_path` below a file": with_model(
            "export-language", *MODEL, "--output_path", "model/config.json/out"
        ),
        "`export-language --model_prefix a/b`": with_model(
            "export-language", *MODEL, "--output_path", "out", "--model_prefix", "a/b"
        ),
        "`export-language --engine fast`": with_model(
            "export-language", *MODEL, "--output_path", "out", "--engine", "fast"
        ),
        "`export-language --quant_type int8`": with_model(
            "export-language", *MODEL, "--output_path", "out", "--quant_type", "int8"
        ),
        "`export-language --quant_type weight_only_int8 --engine portable`": with_model(
            *("export-language", *MODEL, "--output_path", "out", "--quant_type", "weight_only_int8"),
            *("--engine", "portable"),
        ),
    }
)


@case("`QWENVL_ENGINE=fast`")
def _(bench: Bench) -> list[str]:
    bench.model()
    bench.monkeypatch.setenv("QWENVL_ENGINE", "fast")
    return bench.export()


@case("no more room on the disk during an export")
def _(bench: Bench) -> list[str]:
    bench.model()
    bench.max_file_bytes = 1_000_000
    return bench.export()


# convert and make-tiny

cases(
    {
        "`convert` to a folder that exists": with_model("convert", "model", "model"),
        "`convert` from a folder that is not there": lambda bench: ["convert", "model", "new"],
        "`convert` to a folder below a file": with_model("convert", "model", "model/config.json/new"),
        "`convert --dtype float8`": with_model("convert", "model", "new", "--dtype", "float8"),
        "`make-tiny` to a folder that exists": with_model("make-tiny", "model"),
        "`make-tiny` to a folder below a file": with_model("make-tiny", "model/config.json/new"),
        "`make-tiny --seed -1`": lambda bench: ["make-tiny", "model", "--seed", "-1"],
    }
)


@case("no more room on the disk during `convert`")
def _(bench: Bench) -> list[str]:
    bench.model()
    bench.max_file_bytes = 1_000_000
    return ["convert", "model", "new"]


@case("no more room on the disk during `make-tiny`")
def _(bench: Bench) -> list[str]:
    bench.max_file_bytes = 1_000_000
    return ["make-tiny", "model"]


# predict: the exported stages


@case("nothing exported under `--first_model_path`")
def _(bench: Bench) -> list[str]:
    return bench.predict("--first_model_path", "vision/other")


@case("nothing exported under `--second_model_path`")
def _(bench: Bench) -> list[str]:
    return bench.predict("--second_model_path", "text/other")


@case("`--first_model_path .`")
def _(bench: Bench) -> list[str]:
    return bench.predict("--first_model_path", ".")


@case("the two stages are swapped")
def _(bench: Bench) -> list[str]:
    return bench.predict("--first_model_path", "text/qwen", "--second_model_path", "vision/vision")


@case("the stages are of two models")
def _(bench: Bench) -> list[str]:
    bench.manifest(model="0" * 64)
    return bench.predict()


@case("a manifest is not JSON")
def _(bench: Bench) -> list[str]:
    bench.exported()
    truncate("text/qwen.manifest.json", 0.5)
    return bench.predict()


@case("a manifest lacks a key")
def _(bench: Bench) -> list[str]:
    bench.manifest(weights=None)
    return bench.predict()


@case("a manifest of another contract version")
def _(bench: Bench) -> list[str]:
    bench.manifest(contract=99)
    return bench.predict()


@case("`QWENVL_ENGINE=fused` with an export without the engine")
def _(bench: Bench) -> list[str]:
    bench.exported()
    for path in [*Path().glob("*/*.manifest.json")]:
        data = json.loads(path.read_text())
        programs = data["programs"].items()
        data["programs"] = {name: digest for name, digest in programs if ".fused" not in name}
        path.write_text(json.dumps(data))
    bench.monkeypatch.setenv("QWENVL_ENGINE", "fused")
    return bench.predict("--image", str(STREET))


@case("`QWENVL_ENGINE=portable` with quantized weights")
def _(bench: Bench) -> list[str]:
    bench.exported()
    manifest = json.loads(Path("text/qwen.manifest.json").read_text())
    programs = {name: digest for name, digest in manifest["programs"].items() if ".fused" in name}
    shutil.rmtree("vision")  # `manifest` copies both stages again
    shutil.rmtree("text")
    bench.manifest(quant_type="weight_only_int8", programs=programs)
    bench.monkeypatch.setenv("QWENVL_ENGINE", "portable")
    return bench.predict()


@case("a program file was changed")
def _(bench: Bench) -> list[str]:
    bench.exported()
    bench.monkeypatch.setenv("QWENVL_ENGINE", "portable")
    with Path("text/qwen.step.json").open("a") as file:
        file.write(" ")
    return bench.predict()


@case("a program file is missing")
def _(bench: Bench) -> list[str]:
    bench.exported()
    bench.monkeypatch.setenv("QWENVL_ENGINE", "portable")
    for suffix in (".json", ".pdmodel"):  # a stage opens if it has one of the two forms
        Path(f"vision/vision{suffix}").unlink()
    return bench.predict("--image", str(STREET))


@case("a parameter file is missing")
def _(bench: Bench) -> list[str]:
    bench.exported()
    Path("text/qwen.pdiparams").unlink()
    return bench.predict()


@case("a parameter file is cut off")
def _(bench: Bench) -> list[str]:
    bench.exported()
    os.truncate("text/qwen.pdiparams", 5_000_000)
    return bench.predict()


@case("a parameter file of the right size ends in zeros")
def _(bench: Bench) -> list[str]:
    bench.exported()
    size = Path("text/qwen.pdiparams").stat().st_size
    os.truncate("text/qwen.pdiparams", 3_000_000)
    os.truncate("text/qwen.pdiparams", size)
    return bench.predict()


@case("`--model_name_or_path` is not there")
def _(bench: Bench) -> list[str]:
    return bench.predict("--model_name_or_path", "model")


@case("`--model_name_or_path` has another config.json")
def _(bench: Bench) -> list[str]:
    bench.config(seq_length=1024)
    return bench.predict("--model_name_or_path", "model")


@case("no vocabulary")
def _(bench: Bench) -> list[str]:
    bench.exported()
    Path("text/qwen.tiktoken").unlink()
    return bench.predict()


@case("a malformed line in the vocabulary")
def _(bench: Bench) -> list[str]:
    bench.exported()
    path = Path("text/qwen.tiktoken")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:9], "no base64", *lines[10:]]))
    return bench.predict()


@case("a vocabulary with a gap")
def _(bench: Bench) -> list[str]:
    bench.exported()
    path = Path("text/qwen.tiktoken")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:300] + lines[301:]))
    return bench.predict()


@case("another model's vocabulary")
def _(bench: Bench) -> list[str]:
    bench.exported()
    path = Path("text/qwen.tiktoken")
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    return bench.predict()


# predict: flags


def predict(*arguments: str) -> Case:
    return lambda bench: bench.predict(*arguments)


def driver(driver: Optional[CudaDriver], *arguments: str) -> Case:
    """`predict` on a machine with this CUDA driver (None: without one), and a Paddle for CPUs.

    A driver's version 12090 is CUDA 12.9; the number of a GPU is its compute capability times ten.
    """

    def prepare(bench: Bench) -> list[str]:
        import paddle

        bench.monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: False)
        bench.monkeypatch.setattr("paddlemix_qwenvl_plugin.engine.gpu.cuda_driver", lambda: driver)
        bench.monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which a message shows
        return bench.predict(*arguments)

    return prepare


@case("`--device gpu` without NVRTC")
def _(bench: Bench) -> list[str]:
    bench.monkeypatch.setattr("paddlemix_qwenvl_plugin.engine.nvrtc._libraries", lambda: iter(()))
    return driver(CudaDriver(12090, [Gpu("NVIDIA H200", 90)]), "--device", "gpu")(bench)


def nvrtc_version(major: int, minor: int, architecture: int, *include_folders: Path) -> Case:
    """`predict --device gpu` for a B200 with an NVRTC of this version, for one architecture, and folders of headers."""

    def prepare(bench: Bench) -> list[str]:
        from paddlemix_qwenvl_plugin.engine import nvrtc

        installed = nvrtc.Nvrtc(f"libnvrtc.so.{major}", (major, minor), frozenset({architecture}))
        bench.monkeypatch.setattr(nvrtc, "_libraries", lambda: iter([installed.library]))
        bench.monkeypatch.setattr(nvrtc, "_opened", lambda library: installed)
        bench.monkeypatch.setattr(nvrtc, "_include", lambda library: include_folders)
        return driver(CudaDriver(12090, [Gpu("NVIDIA B200", 100)]), "--device", "gpu")(bench)

    return prepare


@case("`--device gpu` with `QWENVL_ENGINE=portable` and a Paddle for CPUs")
def _(bench: Bench) -> list[str]:
    bench.monkeypatch.setenv("QWENVL_ENGINE", "portable")
    return driver(None, "--device", "gpu")(bench)


cases(
    {
        "`--device gpu` without a driver": driver(None, "--device", "gpu"),
        "`--device gpu` with a driver that is too old": driver(CudaDriver(11080, []), "--device", "gpu"),
        "`--device gpu` with a driver of unknown version": driver(CudaDriver(0, []), "--device", "gpu"),
        "`--device gpu:1` with one GPU": driver(
            CudaDriver(12090, [Gpu("NVIDIA H200", 90)]), "--device", "gpu:1"
        ),
        "`--device gpu` with a GPU that is too old": driver(
            CudaDriver(12090, [Gpu("NVIDIA P100", 60)]), "--device", "gpu"
        ),
        "`--device gpu` with an NVRTC that does not know the GPU": nvrtc_version(12, 4, 90, Path("include")),
        "`--device gpu` with an NVRTC that is newer than the driver": nvrtc_version(
            13, 0, 100, Path("include")
        ),
        "`--device gpu` without CUDA's headers": nvrtc_version(12, 9, 100),
        "`--gpu_memory 0`": predict("--gpu_memory", "0"),
        "`--device tpu`": predict("--device", "tpu"),
        "`--device cpu:`": predict("--device", "cpu:"),
        "`--max_new_tokens 0`": predict("--max_new_tokens", "0"),
        "`--min_new_tokens -1`": predict("--min_new_tokens", "-1"),
        "`--min_new_tokens` over `--max_new_tokens`": predict("--min_new_tokens", "3"),
        "`--temperature -1`": predict("--temperature", "-1"),
        "`--top_p 1.5`": predict("--top_p", "1.5"),
        "`--top_p nan`": predict("--top_p", "nan"),
        "`--top_k 0`": predict("--top_k", "0"),
        "`--repetition_penalty 0`": predict("--repetition_penalty", "0"),
        "`--frequency_penalty 101`": predict("--frequency_penalty", "101"),
        "`--presence_penalty inf`": predict("--presence_penalty", "inf"),
        "`--seed -1`": predict("--seed", "-1"),
        "neither `--prompt` nor `--image`": lambda bench: bench.predict(prompt=""),
        "`--prompt -` and `--image -`": lambda bench: bench.predict("--image", "-", prompt="-"),
        "`--draw` without `--image`": predict("--draw", "drawn.png"),
        "`--draw` to an unknown image format": predict("--image", str(STREET), "--draw", "drawn.txt"),
        "`--draw` to a folder that is not there": predict("--image", str(STREET), "--draw", "out/drawn.png"),
        "`--output` to a folder that is not there": predict("--output", "out/answer.json"),
        "`--output` to a folder": predict("--output", "text"),
        "`--output` onto another file": predict("--output", "text/config.json"),
        "`--output` and `--draw` to one file": predict(
            "--image", str(STREET), "--output", "drawn.png", "--draw", "drawn.png"
        ),
        "`--real_time_save` to a folder that is not there": predict("--real_time_save", "out"),
    }
)


@case("`--draw` onto the image of the prompt")
def _(bench: Bench) -> list[str]:
    shutil.copyfile(STREET, "dog.png")
    return bench.predict("--image", "dog.png", "--draw", "dog.png")


@case("`--draw` onto another image")
def _(bench: Bench) -> list[str]:
    shutil.copyfile(STREET, "cat.png")
    return bench.predict("--image", str(STREET), "--draw", "cat.png")


@case("`export-language --output_path` of another model")
def _(bench: Bench) -> list[str]:
    shutil.copytree(bench.model(), "other")
    Path("other/config.json").write_text("{}")
    return ["export-language", "--model_name_or_path", "model", "--output_path", "other"]


@case("`--prompt -` of what is not text")
def _(bench: Bench) -> list[str]:
    bench.stdin = b"What is \xff?\n"
    return bench.predict(prompt="-")


@case("generation_config.json is not JSON")
def _(bench: Bench) -> list[str]:
    arguments = bench.predict()
    Path("text/generation_config.json").write_text("chatml")
    return arguments


@case("`ulimit -v 800000` where Paddle is needed")
def _(bench: Bench) -> list[str]:
    bench.max_address_bytes = 800000 << 10
    bench.monkeypatch.setenv("QWENVL_ENGINE", "portable")
    return bench.predict()


@case("`ulimit -v 150000`")
def _(bench: Bench) -> list[str]:
    bench.max_address_bytes = 150000 << 10
    return bench.predict()


@case("Paddle is there and cannot be imported")
def _(bench: Bench) -> list[str]:
    def fail(name: str) -> None:
        print("Compile with WITH_GPU", file=sys.stderr)  # as Paddle's own hints, which qwenvl hides
        raise ImportError("libcublas.so.11: cannot open shared object file\nSee the FAQ")

    bench.monkeypatch.setattr(paddle_version, "import_module", fail)
    bench.monkeypatch.setenv("QWENVL_ENGINE", "portable")
    return bench.predict()


@case("no more room on the disk for `--output`")
def _(bench: Bench) -> list[str]:
    bench.max_file_bytes = 16
    return bench.predict("--output", "answer.json")


# Images


def street(file_format: str) -> bytes:
    """The image STREET in a file format of Pillow."""
    encoded = io.BytesIO()
    with Image.open(STREET) as image:
        image.convert("RGB").save(encoded, file_format)
    return encoded.getvalue()


@case("the image is not there")
def _(bench: Bench) -> list[str]:
    return bench.predict("--image", "dog.png")


@case("the image is a folder")
def _(bench: Bench) -> list[str]:
    Path("dog.png").mkdir()
    return bench.predict("--image", "dog.png")


@case("the image is a pipe")
def _(bench: Bench) -> list[str]:
    os.mkfifo("dog.png")
    return bench.predict("--image", "dog.png")


@case("the image is larger than 50 MiB")
def _(bench: Bench) -> list[str]:
    arguments = bench.predict_image(street("PNG"), "dog.png")
    os.truncate("dog.png", 50 * 2**20 + 1)
    return arguments


@case("an image from the web that cannot be had")
def _(bench: Bench) -> list[str]:
    net = FakeNetwork(bench.monkeypatch, {"images.example": [["93.184.215.14"]]})
    net.refusing_addresses = {"93.184.215.14"}
    return bench.predict("--image", "http://images.example/dog.png", "--allow_http")


def predict_image(content: Callable[[], bytes | Image.Image], name: str = "dog.png") -> Case:
    """`predict` with an image, whose content is created when the case runs."""
    return lambda bench: bench.predict_image(content(), name)


# The type and the content of a zTXt chunk: keyword, 0, compression method 0, compressed text.
TEXT_BOMB = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 * 2**20)))

cases(
    {
        "the image is an empty file": predict_image(lambda: b""),
        "the image is text": predict_image(lambda: b"a dog on a beach\n"),
        "a PNG that is cut off": predict_image(lambda: street("PNG")[:5000]),
        "a JPEG that is cut off": predict_image(lambda: street("JPEG")[:5000], "dog.jpg"),
        "a PNG of only a header": predict_image(lambda: street("PNG")[:20]),
        "an EPS drawing": predict_image(lambda: street("EPS"), "dog.eps"),
        "an image of 20000 x 20000": predict_image(lambda: png(20000, 20000)),
        "a decompression bomb: a PNG of 81 million pixels in 44 kB": predict_image(lambda: png(9000, 9000)),
        "a decompression bomb in a PNG's text": predict_image(lambda: png(8, 8, TEXT_BOMB)),
        "an image of 1 x 1": predict_image(lambda: Image.new("RGB", (1, 1))),
        "a web address without `--allow_http`": predict("--image", "http://127.0.0.1/dog.png"),
        "a web address without a host": predict("--image", "http:///dog.png", "--allow_http"),
        "an address of another kind": predict("--image", "ftp://127.0.0.1/dog.png"),
        "a file URL with a host": predict("--image", "file://elsewhere/dog.png"),
        "a data URL without a comma": predict("--image", "data:image/png;base64"),
        "a data URL of bad base64": predict("--image", "data:image/png;base64,a*b"),
        "a data URL of no image": predict(
            "--image", "data:image/png;base64," + base64.b64encode(b"a dog").decode()
        ),
    }
)

# Prompts


@case("an image's path is longer than the model's slots")
def _(bench: Bench) -> list[str]:
    folder = Path("a" * 150, "b" * 150)
    folder.mkdir(parents=True)
    return bench.predict_image(Image.new("RGB", (8, 8)), str(folder / "dog.png"))


cases(
    {
        "a prompt beyond the context": lambda bench: bench.predict(prompt="% " * 8192),
        "a `<img>` in the prompt that is not closed": lambda bench: bench.predict(prompt="<img>dog.png"),
        "an image in the prompt's text": lambda bench: bench.predict(prompt="<img>dog.png</img>What is it?"),
        "an image in the text of a chat": lambda bench: bench.predict("--chat", prompt="<img>d.png</img>"),
        "a `</img>` in an image's name": predict("--image", "a</img>b.png"),
    }
)

# batch


def batch(*flags: str, rows: Sequence[Any] = (ROW,), out: str = "out.jsonl") -> Case:
    return lambda bench: bench.batch(*flags, rows=rows, out=out)


@case("the input is not there")
def _(bench: Bench) -> list[str]:
    command = bench.batch()
    Path("in.jsonl").unlink()
    return command


@case("the input is a folder")
def _(bench: Bench) -> list[str]:
    command = bench.batch()
    Path("in.jsonl").unlink()
    Path("in.jsonl").mkdir()
    return command


cases(
    {
        "two rows of one id": batch(rows=[ROW, {**ROW, "id": "b"}, ROW]),
        "the output is in a folder that is not there": batch(out="out/out.jsonl"),
        "the output is a folder": batch(out="text"),
        "the output is the input": batch(out="in.jsonl"),
    }
)


@case("the output is another file")
def _(bench: Bench) -> list[str]:
    Path("out.jsonl").write_text("my notes\n")
    return bench.batch()


cases(
    {
        "`--batch_size 0`": batch("--batch_size", "0"),
        "a generation option out of range": batch("--top_p", "2"),
    }
)


@case("a row failed")
def _(bench: Bench) -> list[str]:
    Path("out.jsonl").write_text('{"id": "a", "text": "A dog."}\n{"id": "b", "error": "no"}\n')
    return bench.batch(rows=[ROW, {**ROW, "id": "b"}])


@case("the partial file of another job")
def _(bench: Bench) -> list[str]:
    """An earlier job, with other options, was stopped before it wrote its output."""
    from paddlemix_qwenvl_plugin.batch.job import run
    from paddlemix_qwenvl_plugin.batch.source import Source
    from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

    command = bench.batch()
    model = QwenVL.from_exported("vision/vision", "text/qwen")
    options = GenerationOptions(max_new_tokens=1)
    with bench.monkeypatch.context() as patch:
        patch.setattr("paddlemix_qwenvl_plugin.batch.job.write_beside", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(Source(Path("in.jsonl"), options), Path("out.jsonl"), model, window=8)
    assert Path("out.jsonl.partial").is_file()
    return command


@case("something else of the partial file's name")
def _(bench: Bench) -> list[str]:
    Path("out.jsonl.partial").write_text("my notes\n")
    return bench.batch()


@case("another process writes the same output")
def _(bench: Bench) -> list[str]:
    command = bench.batch()
    bench.keep_alive = Journal(Path("out.jsonl.partial"), {}, [])
    return command


@case("the input changes during the job")
def _(bench: Bench) -> list[str]:
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

    command, from_exported = bench.batch(), QwenVL.from_exported

    def change_input_and_open(*arguments: Any) -> QwenVL:
        Path("in.jsonl").write_text('{"id": "a", "prompt": "Which is it?"}\n')
        return from_exported(*arguments)

    bench.monkeypatch.setattr(QwenVL, "from_exported", change_input_and_open)
    return command


@case("no more room on the disk for the results")
def _(bench: Bench) -> list[str]:
    command = bench.batch()
    bench.max_file_bytes = 16
    return command


# chat

cases(
    {
        "`chat` with an option out of range": lambda bench: bench.chat("Hello", flags=("--top_k", "0")),
        "`chat --image` of an image that is not there": lambda bench: bench.chat(
            flags=("--image", "dog.png")
        ),
    }
)


@case("`chat` with stages that lack the vocabulary")
def _(bench: Bench) -> list[str]:
    arguments = bench.chat()
    Path("text/qwen.tiktoken").unlink()
    return arguments


cases(
    {
        "an unknown command of a chat": lambda bench: bench.chat("/explain", "Hello"),
        "a word after `/clear`": lambda bench: bench.chat("/clear all"),
        "`/image` of an image that is not there": lambda bench: bench.chat("/image dog.png"),
    }
)


@case("`/image` of a damaged image")
def _(bench: Bench) -> list[str]:
    Path("dog.png").write_bytes(STREET.read_bytes()[:5000])
    return bench.chat("/image dog.png")


cases(
    {
        "`/image` without a path, and no image to drop": lambda bench: bench.chat("/image"),
        "`/save` without a name": lambda bench: bench.chat("Hello", "/save"),
        "`/save` to another kind of file": lambda bench: bench.chat("Hello", "/save talk.txt"),
        "`/save` before the first answer": lambda bench: bench.chat("/save talk.md"),
    }
)


@case("`/save` to a file that exists")
def _(bench: Bench) -> list[str]:
    Path("talk.md").write_text("mine")
    return bench.chat("Hello", "/save talk.md")


@case("`/save` to a folder that is not there")
def _(bench: Bench) -> list[str]:
    return bench.chat("Hello", "/save out/talk.md")


@case("no more room on the disk for `/save`")
def _(bench: Bench) -> list[str]:
    bench.max_file_bytes = 16
    return bench.chat("Hello", "/save talk.json")


@case("`chat <&-`")
def _(bench: Bench) -> list[str]:
    arguments = bench.chat()
    bench.stdin = None
    return arguments


@case("a line without end")
def _(bench: Bench) -> list[str]:
    return bench.chat("a" * (1 << 20))


@case("lines that are not text")
def _(bench: Bench) -> list[str]:
    arguments = bench.chat()
    bench.stdin = b"What is \xff?\n"
    return arguments


# The demo


@case("`demo` to a folder that is a file")
def _(bench: Bench) -> list[str]:
    bench.set_demo_model(bench.model())
    Path("qwenvl-demo").write_text("")
    return ["demo"]


@case("`demo` to a folder with other files")
def _(bench: Bench) -> list[str]:
    bench.set_demo_model(bench.model())
    Path("site").mkdir()
    Path("site/index.html").write_text("my page")
    return ["demo", "site"]


@case("the demo model's weights are missing")
def _(bench: Bench) -> list[str]:
    bench.weights()
    bench.set_demo_model(Path("model"))
    return ["demo"]


@case("the demo's answers are wrong")
def _(bench: Bench) -> list[str]:
    demo_run = SimpleNamespace(right=6, results=[None] * 8)
    bench.monkeypatch.setattr("paddlemix_qwenvl_plugin.demo.run.run_demo", lambda out, say: demo_run)
    return ["demo"]


# eval


QUESTION = {
    "image": str(STREET),
    "question_id": 1,
    "question": "What is it?",
    "answers": ["a dog", "a dog", "a cat", "a dog"],
}


def write_jsonl(name: str, *rows: Any) -> None:
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def vqa(*flags: str, rows: Sequence[Any] = (QUESTION,)) -> list[str]:
    """`eval vqa` with these flags, and with these rows in data.jsonl."""
    write_jsonl("data.jsonl", *rows)
    return ["eval", "vqa", "data.jsonl", *flags]


def vqa_predictions(*predictions: Any) -> list[str]:
    """`eval vqa` with a file of predictions."""
    write_jsonl("answers.jsonl", *predictions)
    return vqa("--predictions", "answers.jsonl")


def vqa_stages(bench: Bench, *flags: str, **changes: Any) -> list[str]:
    """`eval vqa` of QUESTION with changed keys, answered by the exported stages."""
    bench.exported()
    stages = ["--first_model_path", "vision/vision", "--second_model_path", "text/qwen"]
    return vqa(*stages, *flags, rows=[{**QUESTION, **changes}])


def vqa_folder(bench: Bench) -> list[str]:
    bench.exported()
    return ["eval", "vqa", "vision"]


def vqa_not_json(bench: Bench) -> list[str]:
    Path("data.jsonl").write_text(json.dumps(QUESTION) + "\n{\n")
    return ["eval", "vqa", "data.jsonl"]


def grounding_box(bench: Bench) -> list[str]:
    row = {"image": "dog.png", "sent": "it", "bbox": [150, 20, 100, 50], "width": 200, "height": 100}
    write_jsonl("data.jsonl", row)
    return ["eval", "grounding", "data.jsonl"]


def vqa_full_disk(bench: Bench) -> list[str]:
    rows = [{**QUESTION, "question_id": number} for number in range(100)]
    write_jsonl("predictions.jsonl", *({"id": number, "text": "a dog"} for number in range(100)))
    bench.max_file_bytes = 1000
    return vqa("--predictions", "predictions.jsonl", "--output", "answers.jsonl", rows=rows)


def block_import(bench: Bench, library: str) -> None:
    """Make the import of a library fail, whether it is installed or not."""
    for module in [name for name in sys.modules if name.split(".")[0] == library]:
        bench.monkeypatch.delitem(sys.modules, module)
    bench.monkeypatch.setitem(sys.modules, library, None)


def captions_without_library(bench: Bench) -> list[str]:
    block_import(bench, "pycocoevalcap")
    write_jsonl("data.jsonl", {"image": "dog.png", "image_id": 1, "captions": ["A dog."]})
    return ["eval", "captions", "data.jsonl"]


def anls_without_library(bench: Bench) -> list[str]:
    block_import(bench, "rapidfuzz")
    return vqa("--metric", "anls")


cases(
    {
        "`eval` of a data set that is not there": lambda bench: ["eval", "vqa", "data.jsonl"],
        "`eval` of a folder": vqa_folder,
        "`eval` of an empty file": lambda bench: vqa(rows=[]),
        "a line of the data set is not JSON": vqa_not_json,
        "a line of the data set is a list": lambda bench: vqa(rows=[[1]]),
        "a row lacks a key": lambda bench: vqa(rows=[{"image": "dog.png", "question_id": 1, "answers": []}]),
        "a row's box is invalid": grounding_box,
        "two rows of a data set have one id": lambda bench: vqa(rows=[QUESTION, QUESTION]),
        "a row's image is not there": lambda bench: vqa_stages(bench, image="dog.png"),
        "VQA accuracy of a row with one answer": lambda bench: vqa_stages(bench, answers=["a dog"]),
        "`--metric bleu`": lambda bench: vqa("--metric", "bleu"),
        "`eval vqa --max_new_tokens 0`": lambda bench: vqa_stages(bench, "--max_new_tokens", "0"),
        "neither exported stages nor `--predictions`": lambda bench: vqa(),
        "exported stages and `--predictions`": lambda bench: vqa_stages(bench, "--predictions", "data.jsonl"),
        "predictions without an answer to a row": lambda bench: vqa_predictions({"id": "1", "text": "a dog"}),
        "predictions with an answer to another row": lambda bench: vqa_predictions(
            {"id": 2, "text": "a cat"}, {"id": 1, "text": "a dog"}
        ),
        "predictions without a text": lambda bench: vqa_predictions({"id": 1, "error": "no such image"}),
        "`eval --output` to a folder that is not there": lambda bench: vqa_stages(
            bench, "--output", "out/answers.jsonl"
        ),
        "`eval --output` to a folder": lambda bench: vqa_stages(bench, "--output", "vision"),
        "`eval --output` onto the data set": lambda bench: vqa_stages(bench, "--output", "data.jsonl"),
        "no more room on the disk for `eval --output`": vqa_full_disk,
        "`eval captions` without its libraries": captions_without_library,
        "`--metric anls` without its library": anls_without_library,
        "`eval demo --n 0`": lambda bench: ["eval", "demo", "--n", "0"],
        "`eval demo --dtype int8`": lambda bench: ["eval", "demo", "--dtype", "int8"],
        "`eval demo --dtype` with exported stages": lambda bench: [
            *("eval", "demo", "--dtype", "float32", "--first_model_path", "vision/vision")
        ],
    }
)

# build-engine


def build_engine(bench: Bench, compiler: str, cache: str = "cache") -> list[str]:
    bench.monkeypatch.setenv("CXX", compiler)
    bench.monkeypatch.setenv("QWENVL_CACHE_DIR", cache)
    return ["build-engine"]


@case("`build-engine` where the cache folder cannot be made")
def _(bench: Bench) -> list[str]:
    Path("cache").write_text("")
    return build_engine(bench, "true")


cases(
    {
        "`build-engine` without a compiler": lambda bench: build_engine(bench, "no-such-compiler"),
        "`build-engine` with a compiler that fails": lambda bench: build_engine(bench, "false"),
    }
)

# Recipes


def recipe(*arguments: str, **keys: Any) -> Case:
    return lambda bench: bench.recipe(*arguments, **keys)


def python_step(code: str, **keys: Any) -> list[dict[str, Any]]:
    """The `steps` of a recipe: one step, which runs Python code."""
    return [{"name": "only", "run": ["${python}", "-c", code], **keys}]


@case("`recipes validate` of a recipe that is not valid")
def _(bench: Bench) -> list[str]:
    bench.recipe(speed=1, steps=None)
    return ["recipes", "validate", "tiny-cpu", "fake.yaml"]


@case("`run --output` to a file")
def _(bench: Bench) -> list[str]:
    Path("file").write_text("")
    return bench.recipe("--output", "file")


def earlier_run(damage: Callable[[Path], Any]) -> Case:
    """`run --from_step` after an earlier run; `damage` gets the folder of that run's records."""

    def prepare(bench: Bench) -> list[str]:
        command = bench.recipe("--from_step", "only")
        folder = Path("runs/20240101-000000-fake")
        folder.mkdir(parents=True)
        shutil.copyfile("fake.yaml", folder / "recipe.resolved.yaml")
        result = {"name": "only", "status": "ok", "seconds": 1.0, "exit_code": 0}
        (folder / "results.json").write_text(json.dumps({"steps": [result], "bench": None}))
        damage(folder)
        return command

    return prepare


cases(
    {
        "an unknown recipe": lambda bench: ["run", "huge-gpu"],
        "a recipe file that is not there": lambda bench: ["run", "fake.yaml"],
        "`recipes show` of an unknown recipe": lambda bench: ["recipes", "show", "huge-gpu"],
        "a recipe that is not YAML": lambda bench: bench.recipe_text("steps: [\n"),
        "a recipe with a date that is none": lambda bench: bench.recipe_text("why: 2024-13-45\n"),
        "a recipe that is nested without end": lambda bench: bench.recipe_text(f"why: {'[' * 2000}\n"),
        "a recipe with an alias": lambda bench: bench.recipe_text("why: &a x\nname: *a\n"),
        "a recipe of more than 64 KiB": lambda bench: bench.recipe_text(f"why: {'x' * 70000}\n"),
        "a recipe with a NUL": recipe(steps=python_step("\0")),
        "a recipe with a date": recipe(expect=[{"file": "x", "key": "a", "equals": date(2024, 1, 1)}]),
        "a recipe with a number of a thousand bits": recipe(seed=1 << 1000),
        "a recipe that is a list": lambda bench: bench.recipe_text("- steps\n"),
        "a key given twice": lambda bench: bench.recipe_text("schema: 1\nschema: 1\n"),
        "an unknown key": recipe(speed=1),
        "an unknown key in a step": recipe(steps=[{"name": "only", "run": "true", "retries": 2}]),
        "a recipe of another schema": recipe(schema=2),
        "a recipe without steps": recipe(steps=None),
        "two steps of one name": recipe(steps=[*python_step(""), *python_step("")]),
        "an unknown `${name}`": recipe(env={"HERE": "${folder}"}),
        "a variable in `env` of another kind of name": recipe(env={"B=": "x"}),
        "a number where text is wanted": recipe(name=7),
        "an override without `=`": recipe("seed"),
        "an override of an unknown key": recipe("speed=1"),
        "an override of an unknown step": recipe("steps.other.timeout_seconds=1"),
        "an override that is not YAML": recipe("seed=["),
        "an override of the wrong type": recipe("seed=soon"),
        "`--from_step` with an unknown step": recipe("--from_step", "other"),
        "`--from_step` without an earlier run": recipe("--from_step", "only"),
        "`--from_step` with a damaged results.json": earlier_run(
            lambda folder: truncate(str(folder / "results.json"), 0.5)
        ),
        "`--from_step` with a damaged recipe.resolved.yaml": earlier_run(
            lambda folder: (folder / "recipe.resolved.yaml").write_text("")
        ),
        "`--from_step` with another recipe": earlier_run(
            lambda folder: (folder / "recipe.resolved.yaml").write_text("name: other\n")
        ),
        "an asset is missing": recipe(assets=[{"name": "dog", "path": "dog.png", "why": "to ask about"}]),
        "an asset that never ends": recipe(assets=[{"name": "dog", "path": "/dev/zero", "sha256": "0" * 64}]),
        "too little memory": recipe(requires={"memory_gib": 1e6}),
        "a step fails": recipe(steps=python_step("raise SystemExit(3)")),
        "a step takes too long": recipe(steps=python_step("import time; time.sleep(9)", timeout_seconds=0.3)),
        "a step's program is not there": recipe(steps=[{"name": "only", "run": "no-such-program"}]),
        "an expectation is missed": recipe(expect=[{"file": "${run_dir}/answer.json"}]),
    }
)


@case("`--output` is a broken link")
def _(bench: Bench) -> list[str]:
    Path("runs").symlink_to("nowhere")
    return bench.recipe("--output", "runs")


@case("a step writes without end")
def _(bench: Bench) -> list[str]:
    bench.monkeypatch.setattr(process, "LOG_MIB", 1)
    return bench.recipe(steps=python_step("while True: print('x' * 1000)"))


@case("an expected expression never ends")
def _(bench: Bench) -> list[str]:
    bench.monkeypatch.setattr(expect, "_SEARCH_SECONDS", 0.5)
    write_json = 'import sys; open(sys.argv[1], "w").write(\'{"a": "\' + "a" * 40 + \'!"}\')'
    steps = [{"name": "only", "run": ["${python}", "-c", write_json, "${run_dir}/a.json"]}]
    # On a text of 40 letters and a "!", this expression backtracks for hours: each letter doubles the time.
    return bench.recipe(steps=steps, expect=[{"file": "${run_dir}/a.json", "key": "a", "matches": "(a+)+$"}])


# Doctor


@case("`doctor` of a model folder that is not there")
def _(bench: Bench) -> list[str]:
    return ["doctor", "--model_name_or_path", "model"]


@case("`doctor` of a folder without weights")
def _(bench: Bench) -> list[str]:
    bench.weights()
    return ["doctor", "--model_name_or_path", "model"]


@case("a problem that `doctor` finds")
def _(bench: Bench) -> list[str]:
    os.truncate(bench.model() / "model.safetensors", 1000)
    return ["doctor", "--model_name_or_path", "model"]


# Every command
@case("the output goes to a full disk")
def _(bench: Bench) -> list[str]:
    bench.stdout = "/dev/full"
    return ["recipes", "list"]


cases(
    {
        "Ctrl-C": lambda bench: bench.raise_error(KeyboardInterrupt()),
        "SIGTERM": lambda bench: bench.raise_error(Terminated(143)),
        "the memory is used up": lambda bench: bench.raise_error(MemoryError()),
        "a defect of qwenvl": lambda bench: bench.raise_error(RuntimeError("no such thing\nat all")),
    }
)

# Picture labels, malicious inputs, exported files, the engine


def tokenizer_config(text: str) -> Case:
    """`predict` with this text as the tokenizer_config.json beside the language stage."""

    def prepare(bench: Bench) -> list[str]:
        command = bench.predict()
        Path("text/tokenizer_config.json").write_text(text)
        return command

    return prepare


class Call:
    """An object whose pickle is a function call, which an unrestricted unpickler executes."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def header(change: Callable[[dict[str, Any]], None], extra_bytes: bytes = b"") -> Case:
    """Export of the tiny model with a changed safetensors header, and extra bytes at the end of the file."""

    def prepare(bench: Bench) -> list[str]:
        path = bench.model() / "model.safetensors"
        content = path.read_bytes()
        [length] = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode().ljust(length)
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :] + extra_bytes)
        return bench.export()

    return prepare


def overlap(entries: dict[str, Any]) -> None:
    """Give a tensor the offsets of another tensor of the same size."""
    first, second = (f"transformer.llm.h.{i}.ln_1.weight" for i in range(2))
    entries[second]["data_offsets"] = entries[first]["data_offsets"]


def verify(bench: Bench, prefix: str = "text/qwen") -> list[str]:
    bench.exported()
    return ["verify", prefix]


def compiler(bench: Bench, command: str) -> list[str]:
    """`build-engine` with a compiler that runs a shell command."""
    Path("cxx").write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{command}\n')
    Path("cxx").chmod(0o755)
    return build_engine(bench, "./cxx")


@case("`verify` where nothing was exported")
def _(bench: Bench) -> list[str]:
    return verify(bench, "text/other")


@case("`verify` of weights in which a bit was flipped")
def _(bench: Bench) -> list[str]:
    arguments = verify(bench)
    path = Path("text/qwen.pdiparams")
    data = bytearray(path.read_bytes())
    data[3_000_000] ^= 1
    path.write_bytes(data)
    return arguments


@case("`verify` of weights that are not numbers, as an earlier version exported them")
def _(bench: Bench) -> list[str]:
    arguments = verify(bench)
    corrupt(Path("text/qwen"), "h.0.attn.c_attn.weight", np.nan)
    return arguments


@case("a parameter file of up to 64 MiB has a flipped bit")
def _(bench: Bench) -> list[str]:
    arguments = bench.predict()
    path = Path("text/qwen.pdiparams")
    data = bytearray(path.read_bytes())
    # Between the second and the third of the 64 samples whose digest is in the manifest: only the digest of the whole
    # file differs.
    data[len(data) // 63 * 2 - 20_000] ^= 1
    path.write_bytes(data)
    return arguments


@case("a parameter file of the right size is another model's")
def _(bench: Bench) -> list[str]:
    arguments = bench.predict()
    make_tiny(Path("model"), seed=2)
    export_language(Path("model"), Path("other"), "qwen", engine="portable")
    Path("other/qwen.pdiparams").replace("text/qwen.pdiparams")
    return arguments


@case("logits that are not finite")
def _(bench: Bench) -> list[str]:
    arguments = bench.predict()
    corrupt(Path("text/qwen"), "ln_f.weight", 3e38, n=256)  # the whole vector
    return arguments


@case("`verify` without one of the programs")
def _(bench: Bench) -> list[str]:
    arguments = verify(bench)
    Path("text/qwen.step.json").unlink()
    return arguments


@case("`export-vision --save_path model/config`")
def _(bench: Bench) -> list[str]:
    return ["export-vision", "--model_name_or_path", str(bench.model()), "--save_path", "model/config"]


@case("`export-language --model_prefix config`")
def _(bench: Bench) -> list[str]:
    model = ["--model_name_or_path", str(bench.model())]
    return ["export-language", *model, "--output_path", "out", "--model_prefix", "config"]


@case("a weight that is not a number")
def _(bench: Bench) -> list[str]:
    tensors = bench.weights()
    name = next(name for name in tensors if name.endswith("ln_post.bias"))
    tensors[name] = tensors[name].copy()
    tensors[name][1] = np.nan
    bench.save(tensors)
    return bench.export("--engine", "portable")


cases(
    {
        "`--picture_label` without a place for the number": predict("--picture_label", "Picture: "),
        "`--picture_label` with an image's tag": predict("--picture_label", "<img>{}"),
        "tokenizer_config.json is not JSON": tokenizer_config("{"),
        "tokenizer_config.json with a `picture_label` that is none": tokenizer_config('{"picture_label": 1}'),
        "`--allow_private_http` alone": predict("--allow_private_http"),
        "`seq_length` is beyond reason": config(seq_length=10**18),
        "`max_position_embeddings` is beyond reason": config(max_position_embeddings=10**12),
        "`num_hidden_layers` is beyond reason": config(num_hidden_layers=10**9),
        "config.json is nested without end": config_text("[" * 100_000),
        "two tensors overlap": header(overlap),
        "a tensor of a hundred thousand dimensions": header(
            lambda entries: entries[WTE].update(shape=[1 << 62] * 100000)
        ),
        "bytes after the last tensor": header(lambda entries: None, b"1234"),
        "a web address on this machine or its network": predict(
            "--image", "http://169.254.169.254/dog.png", "--allow_http"
        ),
        "model_state.pdparams brings code": pdparams(pickle.dumps({WTE: Call()}, 2)),
        "`build-engine` with a compiler that is killed": lambda bench: compiler(bench, "kill -KILL $$"),
        "`CXX` with arguments, of which the first is not a command": lambda bench: build_engine(
            bench, "no-such-launcher g++"
        ),
        "`build-engine` on a full disk": lambda bench: compiler(
            bench, 'echo "cannot write a.o: No space left on device" >&2; exit 1'
        ),
    }
)


# serve


def serve(*flags: str) -> Case:
    return lambda bench: ["serve", *flags]


@case("`serve` with stages that are not there")
def _(bench: Bench) -> list[str]:
    bench.stdout = os.devnull  # in a subprocess, because `serve` sets up logging before it fails
    stages = ["--first_model_path", "vision/vision", "--second_model_path", "text/qwen"]
    return ["serve", "--port", "0", *stages]


@case("a file of keys that is not there")
def _(bench: Bench) -> list[str]:
    bench.stdout = os.devnull
    return ["serve", "--port", "0", *bench.stage_flags(), "--api_key_file", "keys"]


@case("a variable that is not a setting")
def _(bench: Bench) -> list[str]:
    bench.monkeypatch.setenv("QWENVL_SERVE_MAX_WAITNG", "1")
    return ["serve", "--demo"]


@case("a key of the file that is not a setting")
def _(bench: Bench) -> list[str]:
    Path("serve.yaml").write_text("max_waitng: 1")
    return ["serve", "--demo", "--config", "serve.yaml"]


@case("a port that is in use")
def _(bench: Bench) -> list[str]:
    bench.keep_alive = socket.create_server(("127.0.0.1", 0))
    return ["serve", "--demo", "--port", str(bench.keep_alive.getsockname()[1])]


cases(
    {
        "`serve` without stages": serve(),
        "`serve --demo` with stages": serve("--demo", "--first_model_path", "vision/vision"),
        "`serve` with a number out of range": serve("--demo", "--port", "70000"),
        "`serve` with a word where a number is wanted": serve("--demo", "--max_running", "many"),
        "a file of settings that is not there": serve("--demo", "--config", "serve.yaml"),
        "an address of other machines, without keys": serve("--demo", "--port", "0", "--host", "0.0.0.0"),
        "an address that is none": serve("--demo", "--host", "no.such.host.invalid"),
        "`serve --ray` with any free port": serve("--demo", "--ray", "--port", "0"),
        "`serve --ray` with a maximum below the minimum": serve(
            "--demo", "--ray", "--min_replicas", "3", "--max_replicas", "2"
        ),
        "`serve --ray` for other machines, without keys": serve("--demo", "--ray", "--host", "0.0.0.0"),
    }
)
