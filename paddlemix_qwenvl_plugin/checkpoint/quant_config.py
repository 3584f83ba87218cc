"""The quantization of a checkpoint: `quantization_config` in config.json, or the quantizer's own JSON file.

| file | written by | keys read |
| --- | --- | --- |
| config.json | transformers, AutoGPTQ, GPTQModel, AutoAWQ, auto-round | `quantization_config`, see below |
| quantize_config.json | AutoGPTQ, GPTQModel | `bits`, `group_size`, `desc_act`, `checkpoint_format`, `meta` |
| quant_config.json | AutoAWQ | `w_bit`, `q_group_size`, `version` |

`quantization_config` has the method, `quant_method`, and the keys of the method's other file, with AWQ's sizes as
`bits` and `group_size`. Each other file implies its method, unless it has `quant_method`, too. `is_marlin_format` of
AutoGPTQ is read to refuse such weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from paddlemix_qwenvl_plugin.checkpoint.config import read_json
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

_BITS = {"gptq": (4, 8), "awq": (4,)}
_MAX_GROUP = 1 << 20  # more than the inputs of any layer (config.py)
# The quantizer's JSON file -> method.
_SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


@dataclass(frozen=True)
class QuantConfig:
    """How a checkpoint stores its quantized weights: method, bits, group size, act-order, form of zero points.

    Attributes:
        method: gptq or awq.
        bits: 4 or 8.
        group_size: number of weights of a row that share a scale and a zero point; -1: all of the row.
        act_order: whether inputs may belong to groups in any order (`desc_act`); `g_idx` is then required, otherwise
            optional.
        zeros_minus_one: whether zero points are stored minus one, as in AutoGPTQ's first format.
        zeros_borrow: if zeros_minus_one: whether the quantizer subtracted in whole int32 words, with borrows between
            their zero points, as GPTQModel does; AutoGPTQ subtracts one from each zero point separately.
        origin: the file, for messages.
    """

    method: str
    bits: int
    group_size: int
    act_order: bool
    zeros_minus_one: bool
    zeros_borrow: bool
    origin: Path


def load_quant_config(folder: Path) -> Optional[QuantConfig]:
    """Read the quantization of a model folder; None if no file describes one.

    Raises:
        QwenVLError: a file is not JSON, or describes an unsupported quantization; the message names the key.
    """
    path = folder / "config.json"
    data = read_json(path)
    section = data.get("quantization_config") if isinstance(data, dict) else None
    if section is not None:
        return _parse(section, path, None)
    for name, method in _SIDE_FILES.items():
        path = folder / name
        if path.is_file():
            return _parse(read_json(path), path, method)
    return None


def _parse(data: Any, path: Path, method: Optional[str]) -> QuantConfig:
    if not isinstance(data, dict):
        raise QwenVLError(f"{path}: the quantization must be a JSON object")
    method = str(data.get("quant_method", method)).lower()
    if method not in _BITS:
        raise QwenVLError(f"{path}: quant_method {method} is not supported, only gptq and awq are")
    bits = _integer(data, ("bits", "w_bit"), path)
    if bits not in _BITS[method]:
        allowed = " and ".join(map(str, _BITS[method]))
        raise QwenVLError(f"{path}: {method} with {bits} bits is not supported, only {allowed}")
    group_size = _integer(data, ("group_size", "q_group_size"), path)
    if group_size not in (-1, 32, 64) and (not 0 < group_size <= _MAX_GROUP or group_size % 128):
        raise QwenVLError(
            f"{path}: group_size {group_size} is not supported, only 32, 64, multiples of 128, and -1"
        )
    default, formats = ("gptq", ("gptq", "gptq_v2")) if method == "gptq" else ("gemm", ("gemm",))
    key = "checkpoint_format" if method == "gptq" else "version"
    form = "marlin" if data.get("is_marlin_format") else str(data.get(key) or default).lower()
    if form not in formats:
        raise QwenVLError(f"{path}: {key} {form} is not supported, only {' and '.join(formats)}")
    meta = data.get("meta")
    quantizer = str(meta.get("quantizer")).lower() if isinstance(meta, dict) else ""
    return QuantConfig(
        method=method,
        bits=bits,
        group_size=group_size,
        act_order=bool(data.get("desc_act")),
        zeros_minus_one=form == "gptq",
        zeros_borrow="gptqmodel" in quantizer,
        origin=path,
    )


def _integer(data: dict[str, Any], keys: tuple[str, ...], path: Path) -> int:
    value = next((data[key] for key in keys if key in data), None)
    if not isinstance(value, int) or isinstance(value, bool):
        raise QwenVLError(f"{path}: {keys[0]} must be an integer, not {str(value)[:40]!r}")
    return value
