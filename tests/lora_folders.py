"""Model folders and adapters for the tests of `--lora`. tests/golden/lora/README.md describes the adapters."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from folders import renamed
from safetensors.numpy import load_file, save_file

from paddlemix_qwenvl_plugin.checkpoint.schemes import SCHEMES

LORA = Path(__file__).parent / "golden" / "lora"
sys.path.insert(0, str(LORA))

import lora_base as base  # noqa: E402


def write_base(folder: Path, scheme: str = "paddlemix", **config: Any) -> Path:
    """Write the adapters' base model, its matrices as [out, in] in the scheme "huggingface", else as [in, out]."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**base.CONFIG, **config}))
    values = {SCHEMES["paddlemix"].name(name): value for name, value in base.weights().items()}
    values = renamed(values, scheme, transpose=scheme == "huggingface")
    save_file(values, str(folder / "model.safetensors"))
    return folder


def copy_adapter(adapter: str, folder: Path) -> Path:
    return Path(shutil.copytree(LORA / adapter, folder))


def change_settings(folder: Path, **changes: Any) -> None:
    """Change keys of the adapter's config; None removes a key."""
    [path] = [*folder.glob("adapter_config.json"), *folder.glob("lora_config.json")]
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter in safetensors form, read by the safetensors library."""
    return load_file(folder / "adapter_model.safetensors")


def save_tensors(folder: Path, values: dict[str, np.ndarray]) -> None:
    """Write the tensors of an adapter, as safetensors beside PEFT's config, as .pdparams beside PaddleNLP's."""
    if (folder / "adapter_config.json").exists():
        save_file(values, str(folder / "adapter_model.safetensors"))
    else:
        state = {name: paddle.to_tensor(value) for name, value in values.items()}
        paddle.save(state, str(folder / "lora_model_state.pdparams"))


def make_peft(folder: Path, values: dict[str, np.ndarray], **config: Any) -> Path:
    """Write an adapter folder as PEFT does, with these tensors; PEFT's prefix is put before their names."""
    folder.mkdir()
    data = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(data))
    save_tensors(folder, {f"base_model.model.{name}": value for name, value in values.items()})
    return folder


def update_tensors(
    module: str, n_in: int, n_out: int, rank: int = 2, seed: str = ""
) -> dict[str, np.ndarray]:
    """The tensors A and B of PEFT's low-rank update of a module."""
    return {
        f"{module}.lora_A.weight": base.random(f"{seed}{module} A", rank, n_in),
        f"{module}.lora_B.weight": base.random(f"{seed}{module} B", n_out, rank),
    }


def dense_update(
    values: dict[str, np.ndarray], module: str, alpha: float, rank: int, rslora: bool = False
) -> np.ndarray:
    """The product of PEFT's tensors A and B, scaled: the update of a weight, float64 [in, out]."""
    a, b = (values[f"{module}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
    return (b @ a).T * alpha / (math.sqrt(rank) if rslora else rank)
