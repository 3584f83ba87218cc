"""Targets of the fuzzer: valid inputs to corrupt, and the `qwenvl` command that reads them."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from folders import split_into_ranks
from PIL import Image
from quantized_folders import Variant, write_quantized
from safetensors.numpy import save, save_file
from torch_files import pickle_of, replace_pickle, write_bin, write_legacy

from paddlemix_qwenvl_plugin.checkpoint.config import parse_config
from paddlemix_qwenvl_plugin.checkpoint.convert import convert
from paddlemix_qwenvl_plugin.export.export import export_language, export_vision
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.tiny.make import random_weights, tiny_config
from paddlemix_qwenvl_plugin.tiny.vocab import write_tiny_vocabulary

# The command for an input that is a part of a model folder, which `lay_out` writes as model/.
CONVERT = ["convert", "model", "out"]
# The command for an input that is a part of an adapter, which `lay_out` writes as adapter/, beside its model in model/.
MERGE = ["export-language", "--model_name_or_path", "model", "--output_path", "out", "--engine", "portable"]
MERGE += ["--lora", "adapter"]

REPO = Path(__file__).resolve().parents[2]

# YAML syntax and keys of recipes, separated by "|"; then words with "|", control characters or a byte order mark, and
# long ones.
YAML_WORDS = (
    *rb"""&a |*a|<<: |- |? |: |> |[|{|}|]|'|"|#|!!binary |!!set |!!omap |!!timestamp x|!!int ''|!!float x|!!bool x|!x |
    !!null |"\0"|"\ud800"|"\x1b[31m"|1e999|.nan|-.inf|2024-13-45|2024-01-01|2024-01-01T00:00:00+99:99|~|null|yes|${|
    ${run_dir}|${x}|~daemon/x|/dev/zero|/dev/stdin|../x|(a+)+$|a{99999999999}|[[a]|B=: x|env: {a: 1}|matches: '|
    equals: |approx: {value: 1, tolerance: 1}|timeout_seconds: |requires: {packages: [x]}|bench: {step: only}""".split(
        b"|"
    ),
    *(
        b"| ",
        b"\t",
        b"%YAML 9.9\n---\n",
        b"---\n",
        b"...\n",
        b"\xef\xbb\xbf",
        b"[" * 2000,
        b"{a: " * 500,
        b"(" * 200,
    ),
    *(b"0x" + b"f" * 40, b"9" * 5000, b"1:" * 9000, b"why: " + b"a" * 70000, b"sha256: " + b"0" * 64),
)

# Opcodes of pickles (the module pickletools lists them), with arguments; names of allowed and of dangerous objects.
PICKLE_WORDS = (
    *(
        b"(",
        b")",
        b"]",
        b"}",
        b"0",
        b"1",
        b"2",
        b"N",
        b".",
        b"t",
        b"a",
        b"e",
        b"s",
        b"u",
        b"b",
        b"R",
        b"Q",
        b"l",
        b"d",
    ),
    *(b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"G\x7f\xf8" + bytes(6), b"\x88"),
    *(b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8b\xff\xff\xff\x7f", b"L" + b"9" * 5000 + b"L\n", b"I01\n"),
    *(b"X\xff\xff\xff\xff", b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b"\x95\xff\xff\xff\xff\0\0\0\0"),
    *(b"h\0", b"h\1", b"j\xff\xff\xff\x7f", b"q\0", b"r\xff\xff\xff\x7f", b"\x94", b"\x93", b"\x81", b"\x92"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ntuple\n", b"ccollections\nOrderedDict\n"),
    *(
        b"cnumpy\nndarray\n",
        b"cnumpy\ndtype\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"c_codecs\nencode\n",
    ),
    *(
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch\nHalfStorage\n",
        b"X\2\0\0\0f4",
    ),
    b"(]" + b"\x86\x86h\0" * 30,
    b"}" * 3000,
    b"(" * 3000,
    b"\x85" * 3000,
)

# Chunk names, markers and headers of image formats.
IMAGE_WORDS = (
    *b"IHDR IDAT IEND PLTE tRNS tEXt zTXt iTXt iCCP eXIf acTL fcTL fdAT GIF89a RIFF WEBPVP8X ALPH %!PS-Adobe".split(),
    *(
        b"\xff\xd8",
        b"\xff\xe1",
        b"\xff\xc0",
        b"\xff\xda",
        b"\xff\xd9",
        b"Exif\0\0",
        b"II*\0",
        b"MM\0*",
        b"\x21\xff",
    ),
    *(b"P6 9999999 9999999 255\n", b"P7\n", b"\0\0\0\x0cjP  ", b"DDS "),
)


@dataclass(frozen=True)
class Target:
    """A kind of input: its valid inputs, and the command that reads them.

    Attributes:
        seeds: the valid inputs.
        lay_out: writes an input into an empty folder (a part of a model or an adapter: also into a missing one), with
            all files it needs, and returns the arguments of `qwenvl`.
        words: tokens of the format for the fuzzer to insert.
        is_json: whether the input is JSON.
    """

    seeds: Sequence[bytes]
    lay_out: Callable[[bytes, Path], list[str]]
    words: Sequence[bytes] = ()
    is_json: bool = False


def make_base(folder: Path) -> None:
    """Create a minimal model as model/ and in shards as sharded/, and its exports vision/v and text/t."""
    model = folder / "model"
    model.mkdir()
    write_tiny_vocabulary(model / "qwen.tiktoken")
    tokenizer = QwenTokenizer.from_folder(model)
    config = tiny_config(tokenizer.n_vocab, tokenizer.img_start_id)
    config.update(hidden_size=128, num_attention_heads=2, intermediate_size=64)
    config["visual"].update(image_size=56, width=16, heads=2, layers=1, output_dim=128, n_queries=64)
    (model / "config.json").write_text(json.dumps(config, indent=1))
    save_file(random_weights(parse_config(config, "base"), seed=1), model / "model.safetensors")
    convert(model, folder / "sharded", max_shard_bytes=300_000)
    export_vision(model, folder / "vision" / "v")
    export_language(model, folder / "text", "t")


def targets(base: Path) -> dict[str, Target]:
    """Create all targets, by name; `base` is the folder that `make_base` filled, to which more files are added."""
    config = (base / "model" / "config.json").read_bytes()
    weights = (base / "model" / "model.safetensors").read_bytes()
    header_end = _header_end(weights)
    (base / "small.png").write_bytes(_encoded("RGB", "PNG"))

    def convert_config(data: bytes, folder: Path) -> list[str]:
        _link(base / "model", folder / "model", leave_out="config.json")
        (folder / "model" / "config.json").write_bytes(data)
        return CONVERT

    def convert_safetensors(data: bytes, folder: Path) -> list[str]:
        """Lay out the model with this safetensors header."""
        _link(base / "model", folder / "model", leave_out="model.safetensors")
        (folder / "model" / "model.safetensors").write_bytes(_with_length(data) + weights[header_end:])
        return CONVERT

    def weight_file(name: str) -> Callable[[bytes, Path], list[str]]:
        """Return a function that lays out the small model with an input as the weight file `name`."""

        def lay_out(data: bytes, folder: Path) -> list[str]:
            _link(base / ("ranks" if ".tp" in name else "small"), folder / "model")
            (folder / "model" / name).write_bytes(_with_zeros(data))
            return CONVERT

        return lay_out

    def bin_table(data: bytes, folder: Path) -> list[str]:
        """Lay out the small model with this pickle in its .bin file."""
        _link(base / "small", folder / "model")
        replace_pickle(small["bin"], folder / "model" / "pytorch_model.bin", data)
        return CONVERT

    def index(data: bytes, folder: Path) -> list[str]:
        _link(base / "sharded", folder / "model", leave_out="model.safetensors.index.json")
        (folder / "model" / "model.safetensors.index.json").write_bytes(data)
        return CONVERT

    def gptq(data: bytes, folder: Path) -> list[str]:
        """Lay out the quantized model; `data` is the JSON text of [config.json, safetensors header].

        Any other text becomes the config.json, beside the valid header.
        """
        _link(base / "gptq", folder / "model", leave_out="config.json")
        try:
            config, header = (json.dumps(value).encode() for value in json.loads(data))
        except (ValueError, TypeError, RecursionError):
            config, header = data, quantized[8:quantized_header_end]
        (folder / "model" / "config.json").write_bytes(config)
        # A hard link: without unlink() the file in base would be overwritten.
        (folder / "model" / "model.safetensors").unlink()
        (folder / "model" / "model.safetensors").write_bytes(
            _with_length(header) + quantized[quantized_header_end:]
        )
        return CONVERT

    def adapter_file(adapter: str, name: str) -> Callable[[bytes, Path], list[str]]:
        """Return a function that lays out the adapter of the folder `adapter` with an input as its file `name`."""

        def lay_out(data: bytes, folder: Path) -> list[str]:
            _link(base / "adapted", folder / "model")
            _link(base / adapter, folder / "adapter", leave_out=name)
            (folder / "adapter" / name).write_bytes(_with_zeros(data))
            return MERGE

        return lay_out

    def peft(data: bytes, folder: Path) -> list[str]:
        """Lay out PEFT's adapter; `data` is JSON, as the seeds that `_small_adapters` returns.

        Any other text becomes the adapter_config.json, beside the weights of the first seed.
        """
        try:
            # At most 1 MiB of values, so that a mutated number does not fill the memory.
            settings, header, n_bytes = json.loads(data)
            config, values = json.dumps(settings).encode(), bytes(min(int(n_bytes), 1 << 20))
        except (ValueError, TypeError, OverflowError, RecursionError):
            _, header, n_bytes = json.loads(peft_seeds[0])
            config, values = data, bytes(n_bytes)
        adapter_file("peft", "adapter_config.json")(config, folder)
        weights = _with_length(json.dumps(header).encode()) + values
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights)
        return MERGE

    def peft_bin(data: bytes, folder: Path) -> list[str]:
        """Lay out PEFT's adapter with this pickle in its .bin file."""
        # Written as an empty file first: `replace_pickle` replaces it.
        adapter_file("peft_bin", "adapter_model.bin")(b"", folder)
        replace_pickle(
            base / "peft_bin" / "adapter_model.bin", folder / "adapter" / "adapter_model.bin", data
        )
        return MERGE

    def manifest(stage: str, prefix: str) -> Callable[[bytes, Path], list[str]]:
        """Return a function that lays out both exported stages with an input as the manifest of `stage`."""

        def lay_out(data: bytes, folder: Path) -> list[str]:
            name = f"{prefix}.manifest.json"
            for exported in ("vision", "text"):
                _link(base / exported, folder / exported, leave_out=name)
            (folder / stage / name).write_bytes(data)
            return _predict(base / "small.png")

        return lay_out

    def image_file(data: bytes, folder: Path) -> list[str]:
        for exported in ("vision", "text"):
            _link(base / exported, folder / exported)
        (folder / "x").write_bytes(data)
        return _predict(Path("x"))

    def recipe(data: bytes, folder: Path) -> list[str]:
        (folder / "fake.yaml").write_bytes(data)
        return ["run", "fake.yaml", "--dry_run"]

    small = _small_weight_files(base)
    write_quantized(base / "gptq", Variant(bits=4, group=32, act_order=True))
    quantized = (base / "gptq" / "model.safetensors").read_bytes()
    quantized_header_end = _header_end(quantized)
    quantized_config = (base / "gptq" / "config.json").read_bytes()
    gptq_seed = b"[%s, %s]" % (quantized_config, quantized[8:quantized_header_end])
    peft_seeds = _small_adapters(base)
    paddlenlp = {path.name: _without_zeros(path) for path in (base / "paddlenlp").iterdir()}
    recipes = [path.read_bytes() for path in sorted((REPO / "recipes").glob("*.yaml"))]
    return {
        "config": Target([config], convert_config, is_json=True),
        "manifest_vision": Target(
            [(base / "vision" / "v.manifest.json").read_bytes()], manifest("vision", "v"), is_json=True
        ),
        "manifest_language": Target(
            [(base / "text" / "t.manifest.json").read_bytes()], manifest("text", "t"), is_json=True
        ),
        "safetensors": Target([weights[8:header_end]], convert_safetensors, is_json=True),
        "index": Target(
            [(base / "sharded" / "model.safetensors.index.json").read_bytes()], index, is_json=True
        ),
        "bin": Target([_without_zeros(small["bin"])], weight_file("pytorch_model.bin"), PICKLE_WORDS),
        "bin_table": Target([pickle_of(small["bin"])], bin_table, PICKLE_WORDS),
        "bin_legacy": Target(
            [_without_zeros(small["legacy"])], weight_file("pytorch_model.bin"), PICKLE_WORDS
        ),
        "pdparams": Target(
            [_without_zeros(small["protocol2"]), _without_zeros(small["protocol4"])],
            weight_file("model_state.pdparams"),
            PICKLE_WORDS,
        ),
        "ranks": Target(
            [_without_zeros(small["rank"])], weight_file("model_state.tp00.pdparams"), PICKLE_WORDS
        ),
        "gptq": Target([gptq_seed], gptq, is_json=True),
        "lora_peft": Target(peft_seeds, peft, is_json=True),
        "lora_peft_bin": Target([pickle_of(base / "peft_bin" / "adapter_model.bin")], peft_bin, PICKLE_WORDS),
        "lora_paddlenlp": Target(
            [paddlenlp["lora_config.json"]], adapter_file("paddlenlp", "lora_config.json"), is_json=True
        ),
        "lora_pdparams": Target(
            [paddlenlp["lora_model_state.pdparams"]],
            adapter_file("paddlenlp", "lora_model_state.pdparams"),
            PICKLE_WORDS,
        ),
        "image": Target(_images(), image_file, IMAGE_WORDS),
        "recipe": Target([*recipes, _RECIPE], recipe, YAML_WORDS),
    }


def _small_weight_files(base: Path) -> dict[str, Path]:
    """Write the weights, all zeros, of a model smaller than make_base's in every pickled form; return the files' paths.

    The folders small/ and ranks/ get the model's config. Of the two files of tensor parallelism, ranks/ gets that of
    rank 1; the input is that of rank 0.
    """
    for name in ("small", "ranks", "files"):
        (base / name).mkdir()
    config = tiny_config(n_vocab=4, image_start_id=1)
    config.update(
        hidden_size=128, num_attention_heads=2, intermediate_size=8, vocab_size=8, num_hidden_layers=1
    )
    config["visual"].update(image_size=56, width=16, heads=2, layers=1, output_dim=128, n_queries=4)
    for name in ("small", "ranks"):
        (base / name / "config.json").write_text(json.dumps(config))
    weights = {
        name: np.zeros(value.shape, np.float16)
        for name, value in random_weights(parse_config(config, "small"), seed=1).items()
    }
    files = {name: base / "files" / name for name in ("bin", "legacy", "protocol2", "protocol4", "rank")}
    write_bin(files["bin"], weights, "float16")
    write_legacy(files["legacy"], weights, "float16")
    for protocol in (2, 4):
        files[f"protocol{protocol}"].write_bytes(pickle.dumps(weights, protocol))
    ranks = split_into_ranks(weights, 2)
    files["rank"].write_bytes(pickle.dumps(ranks[0], 4))
    (base / "ranks" / "model_state.tp01.pdparams").write_bytes(pickle.dumps(ranks[1], 4))
    return files


def _small_adapters(base: Path) -> list[bytes]:
    """Write the model adapted/, with random weights, and two adapters of zeros for it: peft_bin/ and paddlenlp/.

    The folder peft/ stays empty: an input of the target lora_peft stands for both files of its adapter.

    Returns:
        Seeds of PEFT's adapter, JSON texts of [config, safetensors header, number of bytes of values]. The first seed
        has low-rank updates of the language model; the second has an update of the vision tower and complete tensors.
    """
    for name in ("adapted", "peft", "peft_bin", "paddlenlp"):
        (base / name).mkdir()
    config = json.loads((base / "small" / "config.json").read_text())
    (base / "adapted" / "config.json").write_text(json.dumps(config))
    weights = random_weights(parse_config(config, "small"), seed=1)
    save_file(weights, base / "adapted" / "model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "use_dora": False}
    settings.update(init_lora_weights=True, base_model_name_or_path=None)
    language = _update("h.0.attn.c_attn", 128, 384) | _update("h.0.mlp.w1", 128, 4, rank=2)
    patterns = {"rank_pattern": {"h.0.mlp.w1": 2}, "alpha_pattern": {"mlp.w1": 3}}
    vision = _update("visual.transformer.resblocks.0.attn.in_proj", 16, 48)
    vision["base_model.model.transformer.wte.weight"] = np.zeros((8, 128), np.float32)
    vision["base_model.model.transformer.h.0.attn.c_attn.bias"] = np.zeros(384, np.float32)
    seeds = []
    for tensors, extra_settings in ((language, patterns), (vision, {"modules_to_save": ["wte"]})):
        data = save(tensors)
        header_end = _header_end(data)
        seed = [{**settings, **extra_settings}, json.loads(data[8:header_end]), len(data) - header_end]
        seeds.append(json.dumps(seed).encode())
    (base / "peft_bin" / "adapter_config.json").write_text(json.dumps({**settings, **patterns}))
    write_bin(base / "peft_bin" / "adapter_model.bin", language, "float32")
    settings = {"r": 4, "lora_alpha": 8, "rslora": False, "tensor_parallel_degree": 1, "pissa": False}
    (base / "paddlenlp" / "lora_config.json").write_text(json.dumps(settings))
    state = {
        f"transformer.llm.h.0.attn.c_attn.lora_{factor}": np.zeros(shape, np.float32)
        for factor, shape in (("A", (128, 4)), ("B", (4, 384)))
    }
    (base / "paddlenlp" / "lora_model_state.pdparams").write_bytes(pickle.dumps(state, 4))
    return seeds


def _update(module: str, n_in: int, n_out: int, rank: int = 4) -> dict[str, np.ndarray]:
    """PEFT's two tensors of a low-rank update, all zeros."""
    module = f"base_model.model.transformer.{module}"
    return {
        f"{module}.lora_A.weight": np.zeros((rank, n_in), np.float32),
        f"{module}.lora_B.weight": np.zeros((n_out, rank), np.float32),
    }


def _without_zeros(path: Path) -> bytes:
    """The content of a file, with each long run of zeros replaced by its length, as in `<512 zeros>`.

    The values of the tensors are zeros. Without them, most mutations hit the rest of the file, which the readers parse.
    """
    return re.sub(rb"\0{500,}", lambda zeros: b"<%d zeros>" % len(zeros[0]), path.read_bytes())


def _with_zeros(data: bytes) -> bytes:
    """Undo `_without_zeros`; at most six digits, so that a mutated number does not fill the memory."""
    return re.sub(rb"<(\d{3,6}) zeros>", lambda number: bytes(int(number[1])), data)


# A recipe with every top-level key and most of the others.
_RECIPE = b"""\
schema: 1
name: only
why: every key there is
requires: {python: ">=3.9", packages: [numpy>=1], memory_gib: 0.1, disk_gib: 0.1, gpu: false}
pins: {a: b}
assets: [{name: here, path: "${recipe_dir}/fake.yaml", sha256: null, why: x}]
env: {A: "${seed}"}
seed: 7
dtype: float32
steps:
  - {name: only, run: "${python} -c pass ${assets.here}", timeout_seconds: 3}
expect:
  - {file: "${run_dir}/a.json", key: a.0.b, approx: {value: 3.5, tolerance: 0.5}}
  - {file: x, key: a, matches: "^a+$"}
  - {file: x, key: a, equals: [1, {b: null}]}
bench: {step: only, repeat: 2, warmup: 1}
"""


def _header_end(safetensors: bytes) -> int:
    """The end of the header, which starts at byte 8; its length is a uint64 in bytes 0 to 7."""
    return int(8 + struct.unpack("<Q", safetensors[:8])[0])


def _with_length(header: bytes) -> bytes:
    """Prepend its length to a safetensors header; with a wrong length most headers would not be parsed."""
    return struct.pack("<Q", len(header)) + header


def _predict(image: Path) -> list[str]:
    stages = ["--first_model_path", "vision/v", "--second_model_path", "text/t"]
    return ["predict", *stages, "--image", str(image), "--prompt", "a", "--max_new_tokens", "2"]


def _link(source: Path, target: Path, leave_out: str = "") -> None:
    """Create `target` with hard links to the files of `source`, except the file named `leave_out`."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name != leave_out:
            os.link(path, target / path.name)


def _encoded(mode: str, file_format: str, **options: object) -> bytes:
    """A small image in a mode and a file format of Pillow."""
    image = Image.linear_gradient("L").resize((23, 17)).convert(mode)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _images() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: rotated by 90 degrees
    rgb_formats = "PNG JPEG BMP TIFF PPM TGA PCX SGI DDS QOI WEBP JPEG2000 AVIF SPIDER ICO ICNS MPO GIF"
    other_modes = "P:PNG RGBA:PNG LA:PNG 1:PNG I;16:PNG P:GIF P:TIFF CMYK:JPEG CMYK:TIFF RGBA:WEBP RGBA:TIFF"
    other_modes += " 1:XBM F:TIFF"
    modes_and_formats = [("RGB", file_format) for file_format in rgb_formats.split()]
    modes_and_formats += [mode_and_format.split(":") for mode_and_format in other_modes.split()]
    images = []
    for mode, file_format in modes_and_formats:
        try:
            images.append(_encoded(mode, file_format))
        except (KeyError, OSError, ValueError, AttributeError):
            continue  # a format or a mode that this version of Pillow cannot write
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        images.append(_encoded("RGB", "TIFF", compression=compression))
    images += [_encoded("RGB", "JPEG", exif=exif, progressive=True), _encoded("RGB", "PNG", exif=exif)]
    frames = [Image.new("P", (9, 9), i) for i in range(3)]
    for file_format in ("GIF", "PNG", "TIFF", "WEBP"):
        file = io.BytesIO()
        frames[0].save(file, file_format, save_all=True, append_images=frames[1:])
        images.append(file.getvalue())
    return images
