"""Cases of docs/errors.md for `--lora`, mostly adapters in PEFT's or PaddleNLP's format that cannot be merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import numpy as np
from error_cases import Bench, Case, case, cases
from quantized_folders import Variant, write_quantized
from safetensors.numpy import save_file

Shapes = dict[str, tuple[int, ...]]
C_ATTN = "base_model.model.transformer.h.0.attn.c_attn"
C_ATTN_UPDATE: Shapes = {f"{C_ATTN}.lora_A.weight": (8, 256), f"{C_ATTN}.lora_B.weight": (768, 8)}
PEFT_CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def write_adapter(
    folder: str,
    shapes: Optional[Shapes],
    config: Any,
    name: str = "adapter_config.json",
    dtype: type[np.generic] = np.float32,
) -> None:
    """Write an adapter folder with a config (JSON or text) and tensors of zeros; shapes None: without tensors."""
    Path(folder).mkdir()
    Path(folder, name).write_text(config if isinstance(config, str) else json.dumps(config))
    if shapes is not None:
        tensors = {key: np.zeros(shape, dtype) for key, shape in shapes.items()}
        save_file(tensors, f"{folder}/adapter_model.safetensors")


def peft(shapes: Optional[Shapes] = C_ATTN_UPDATE, **config: Any) -> Case:
    """`export-vision` with PEFT's adapter: tensors of these shapes, changed keys of its config; None removes a key."""

    def prepare(bench: Bench) -> list[str]:
        bench.model()
        settings = {**PEFT_CONFIG, **config}
        settings = {key: value for key, value in settings.items() if value is not None}
        write_adapter("adapter", shapes, settings)
        return bench.export("--lora", "adapter")

    return prepare


def infinite_weight(bench: Bench) -> list[str]:
    bench.model()
    write_adapter("adapter", C_ATTN_UPDATE, PEFT_CONFIG)
    return bench.export("--lora", "adapter=1e999")


def config_text(content: str) -> Case:
    """`export-vision` with PEFT's adapter and this text as its config."""

    def prepare(bench: Bench) -> list[str]:
        bench.model()
        write_adapter("adapter", C_ATTN_UPDATE, content)
        return bench.export("--lora", "adapter")

    return prepare


def paddlenlp(**config: Any) -> Case:
    """`export-vision` with PaddleNLP's adapter times 0.5, without weights; `config` adds keys to its config."""

    def prepare(bench: Bench) -> list[str]:
        bench.model()
        write_adapter("adapter", None, {"r": 8, "lora_alpha": 16, **config}, "lora_config.json")
        return bench.export("--lora", "adapter=0.5")

    return prepare


cases(
    {
        "an adapter with an infinite weight": infinite_weight,
        "an adapter's config is not JSON": config_text('{"r": 8,'),
        "an adapter's config holds a list": config_text("[]"),
        "an adapter's config without `r`": peft(r=None),
        "an adapter of rank 0": peft(r=0),
        "an adapter of another kind (PEFT's IA3)": peft(peft_type="IA3"),
        "a DoRA adapter": peft(use_dora=True),
        "an adapter initialised by PiSSA": peft(init_lora_weights="pissa"),
        "an adapter with a regular expression for ranks": peft(rank_pattern={"(a+)+": 4}),
        "an adapter with a rank of 0 for a module": peft(rank_pattern={"attn.c_attn": 0}),
        "an adapter whose alpha is beyond float32": peft(lora_alpha=1e300),
        "an adapter folder without weights": peft(shapes=None),
        "a PaddleNLP adapter split over tensor-parallel ranks": paddlenlp(tensor_parallel_degree=2),
        "a PaddleNLP adapter of MoRA": paddlenlp(use_mora=True),
        "an adapter for a layer that is not there": peft(
            {key.replace("h.0", "h.2"): shape for key, shape in C_ATTN_UPDATE.items()}
        ),
        "an adapter with a tensor of another kind": peft(
            {**C_ATTN_UPDATE, f"{C_ATTN}.lora_magnitude_vector.weight": (768,)}
        ),
        "an adapter without one half of an update": peft({f"{C_ATTN}.lora_A.weight": (8, 256)}),
        "an adapter of a rank that its config contradicts": peft(r=4),
        "an adapter for a model of another size": peft(
            {f"{C_ATTN}.lora_A.weight": (8, 4096), f"{C_ATTN}.lora_B.weight": (12288, 8)},
            base_model_name_or_path="Qwen/Qwen-VL-Chat",
        ),
        "an adapter for a vocabulary of another size": peft(
            {"base_model.model.lm_head.weight": (720, 256)}, modules_to_save=["lm_head"]
        ),
        "an adapter with a tensor under two names": peft(
            {**C_ATTN_UPDATE, f"{C_ATTN.replace('transformer.', 'qwen.')}.lora_A.weight": (8, 256)}
        ),
        "an adapter for a convolution": peft(
            {
                "base_model.model.transformer.visual.conv1.lora_A.weight": (8, 3, 14, 14),
                "base_model.model.transformer.visual.conv1.lora_B.weight": (64, 8, 1, 1),
            }
        ),
    }
)


@case("an adapter of integers")
def _(bench: Bench) -> list[str]:
    bench.model()
    write_adapter("adapter", C_ATTN_UPDATE, PEFT_CONFIG, dtype=np.int8)
    return bench.export("--lora", "adapter")


@case("`--lora` of a folder that is not there")
def _(bench: Bench) -> list[str]:
    bench.model()
    return bench.export("--lora", "adapter")


@case("`--lora` of a folder that is not an adapter")
def _(bench: Bench) -> list[str]:
    bench.model()
    return bench.export("--lora", "model")


@case("`--lora` of a folder whose name ends in a number after `=`")
def _(bench: Bench) -> list[str]:
    bench.model()
    write_adapter("lr=0.5", C_ATTN_UPDATE, PEFT_CONFIG)
    return bench.export("--lora", "lr=0.5")


@case("two adapters that replace the same tensor")
def _(bench: Bench) -> list[str]:
    bench.model()
    for folder in ("first", "second"):
        write_adapter(folder, {"base_model.model.lm_head.weight": (704, 256)}, PEFT_CONFIG)
    return bench.export("--lora", "first", "--lora", "second")


@case("`--lora` with a quantized checkpoint")
def _(bench: Bench) -> list[str]:
    write_quantized(Path("model"), Variant())
    write_adapter("adapter", C_ATTN_UPDATE, PEFT_CONFIG)
    return bench.export("--lora", "adapter")


@case("an adapter for the `lm_head` of a checkpoint that has none of its own")
def _(bench: Bench) -> list[str]:
    bench.config(tie_word_embeddings=True)
    write_adapter("adapter", {"base_model.model.lm_head.weight": (704, 256)}, PEFT_CONFIG)
    return bench.export("--lora", "adapter")
