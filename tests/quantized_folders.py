"""Model folders with quantized weights, packed bit by bit from the definitions of the formats or written by tools."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from folders import renamed
from safetensors.numpy import save_file
from torch_files import write_bin

from paddlemix_qwenvl_plugin.checkpoint import safetensors_file, torch_file
from paddlemix_qwenvl_plugin.checkpoint.config import parse_config
from paddlemix_qwenvl_plugin.tiny.make import random_weights

# Checkpoints that quantization tools wrote; golden/quantized/make.py runs the tools.
BY_TOOLS = Path(__file__).parent / "golden" / "quantized"

# The MLP has 192 units, half of intermediate_size: with group size 128, the last group of mlp.c_proj is shorter.
CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "kv_channels": 128,
    "intermediate_size": 384,
    "vocab_size": 64,
    "seq_length": 512,
    "max_position_embeddings": 1024,
    "visual": {
        "image_size": 56,
        "patch_size": 14,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 256,
        "n_queries": 16,
        "image_start_id": 30,
    },
}
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
# AWQ packs the 4-bit integers of eight outputs into an int32 word; their order in the word, from the low bits up.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Variant(NamedTuple):
    """How a folder is quantized.

    With a `group` of -1, all weights of a row are one group; with `act_order` (GPTQ's desc_act), the inputs of a group
    are not consecutive. `form` is the config's checkpoint_format, `quantizer` the entry in its `meta`, name and version
    of the tool that quantized: GPTQModel or none.
    """

    method: str = "gptq"
    bits: int = 4
    group: int = 32
    act_order: bool = False
    sym: bool = False
    form: str = "gptq"
    quantizer: str = ""

    @property
    def config(self) -> dict[str, Any]:
        """The quantization_config."""
        config: dict[str, Any] = {
            "quant_method": self.method,
            "bits": self.bits,
            "group_size": self.group,
        }
        if self.method == "awq":
            return {**config, "zero_point": not self.sym, "version": "gemm"}
        config |= {"desc_act": self.act_order, "sym": self.sym}
        if self.form != "gptq":
            config["checkpoint_format"] = self.form
        if self.quantizer:
            config["meta"] = {"quantizer": [self.quantizer]}
        return config


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack each column of unsigned integers [n, m] as a stream of bits into int32 words [n * bits / 32, m]."""
    words = np.zeros([len(values) * bits // 32, values.shape[1]], np.uint32)
    for i, row in enumerate(values):
        for bit in range(bits):
            position = i * bits + bit
            words[position // 32] |= ((row.astype(np.uint32) >> bit) & 1) << (position % 32)
    return words.view(np.int32)


def quantized_layer(
    rng: np.random.Generator, n_in: int, n_out: int, variant: Variant
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A random linear layer: its stored tensors, and its weight [out, in] in float64."""
    bits, levels = variant.bits, 2**variant.bits
    group = n_in if variant.group == -1 else variant.group
    groups = -(-n_in // group)
    g_idx = np.arange(n_in) // group
    if variant.act_order:
        g_idx = rng.permutation(g_idx)
    integers = rng.integers(0, levels, [n_in, n_out])
    zeros = rng.integers(0, levels, [groups, n_out])
    zeros[0, :4] = (0, levels - 1, 1, 0)  # GPTQ stores zero points minus 1: 0 wraps around or borrows (below)
    if variant.sym:
        zeros[:] = levels // 2
    scales = (rng.uniform(0.5, 1.5, [groups, n_out]) * 3 / levels / n_in**0.5).astype(np.float16)
    weight = scales[g_idx].astype(np.float64) * (integers - zeros[g_idx])
    if variant.method == "awq":
        # For each input, its outputs in AWQ's order, as a stream of bits.
        order = np.arange(n_out).reshape(-1, 8)[:, AWQ_ORDER].ravel()
        qweight, qzeros = (pack_bits(values[:, order].T, bits).T for values in (integers, zeros))
        return {"qweight": qweight, "qzeros": qzeros, "scales": scales}, weight.T
    if variant.form == "gptq_v2":
        qzeros = pack_bits(zeros.T, bits).T
    elif variant.quantizer:
        # GPTQModel subtracts 1 from each zero point by a subtraction of int32 words, with borrows between zero points.
        ones = sum(1 << (bits * i) for i in range(32 // bits))
        words = pack_bits(zeros.T, bits).T.view(np.uint32).astype(object)
        qzeros = ((words - ones) % 2**32).astype(np.uint32).view(np.int32)
    else:
        qzeros = pack_bits((zeros.T - 1) % levels, bits).T
    tensors = {
        "qweight": pack_bits(integers, bits),
        "qzeros": qzeros,
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    return tensors, weight.T


def quantized_tensors(variant: Variant) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tensors of a quantized model, and of the same model in float32, both with Hugging Face's names."""
    stored, dense = _quantized_tensors(variant)
    return dict(stored), dict(dense)


@functools.lru_cache
def _quantized_tensors(variant: Variant) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    weights = random_weights(parse_config(CONFIG, "test"), 0)
    float16 = {name: value.astype(np.float16) for name, value in weights.items()}
    stored = renamed(float16, "huggingface", transpose=True)
    dense = {name: value.astype(np.float32) for name, value in stored.items()}
    for layer in LAYERS:
        name = f"transformer.h.0.{layer}"
        n_out, n_in = stored.pop(f"{name}.weight").shape
        tensors, weight = quantized_layer(rng, n_in, n_out, variant)
        dense[f"{name}.weight"] = weight.astype(np.float32)
        stored |= {f"{name}.{suffix}": value for suffix, value in tensors.items()}
        # AutoGPTQ stores a bias of zeros for a layer without one; here the AWQ folders have it, too.
        stored.setdefault(f"{name}.bias", np.zeros(n_out, np.float16))
    return stored, dense


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()},
        str(folder / "model.safetensors"),
    )
    return folder


def write_quantized(folder: Path, variant: Variant) -> dict[str, np.ndarray]:
    """Write a quantized model folder; return the tensors of the same model in float32."""
    tensors, dense = quantized_tensors(variant)
    write_tensors(folder, tensors, {**CONFIG, "quantization_config": variant.config})
    return dense


def copy_tool_folder(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Copy a language model that a tool wrote, and add a random image encoder; return the recorded results.

    golden/quantized/make.py describes the results, which it computed with the tool's layers or weights.
    """
    shutil.copytree(BY_TOOLS / name, folder)
    config = json.loads((folder / "config.json").read_text())
    vision = {
        key: value.astype(np.float16)
        for key, value in random_weights(parse_config(config, "test"), 0).items()
        if key.startswith("visual.")
    }
    [language] = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    _add_shard(folder, language, renamed(vision, "huggingface", transpose=True))
    return dict(np.load(folder / "reference.npz"))


def _add_shard(folder: Path, language: Path, vision: dict[str, np.ndarray]) -> None:
    """Write `vision` as a second shard next to the shard `language`, and the index of both shards."""
    shard = folder / f"vision{language.suffix}"
    if language.suffix == ".bin":
        write_bin(shard, vision, "float16")
    else:
        save_file({name: np.ascontiguousarray(value) for name, value in vision.items()}, str(shard))
    reader = torch_file if language.suffix == ".bin" else safetensors_file
    names = {
        **dict.fromkeys(reader.read_header(language), language.name),
        **dict.fromkeys(vision, shard.name),
    }
    index = f"{language.stem}{language.suffix}.index.json"
    (folder / index).write_text(json.dumps({"weight_map": names}))
