"""Parameter files: compared with an independent parser; files of contract version 2; damaged files."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from engines import needs_compiler, open_model

from paddlemix_qwenvl_plugin.artifact.contract import step_inputs
from paddlemix_qwenvl_plugin.artifact.manifest import FileDigest, manifest_path, params_path, read_manifest
from paddlemix_qwenvl_plugin.artifact.params_file import Record, read_tensors, write_params
from paddlemix_qwenvl_plugin.artifact.weights import Weight
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.export.export import export_language, export_vision
from paddlemix_qwenvl_plugin.export.program import Program, save_program
from paddlemix_qwenvl_plugin.modeling.generation import Step
from paddlemix_qwenvl_plugin.modeling.language import LanguageModel
from paddlemix_qwenvl_plugin.modeling.weights import language_parameters, vision_parameters
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# qvl_dtype in csrc/include/qwenvl.h -> (storage type, Paddle's type in the record, bytes of an element of this type).
KINDS = {
    0: ("float32", 5, 4),
    1: ("bfloat16", 22, 2),
    2: ("int8", 20, 1),
    3: ("int4_g64", 20, 1),
    5: ("float16", 4, 2),
}


def product_of_dims(data: bytes) -> int:
    """Product of the dimensions in a protobuf message: varints, each after the byte 0x10."""
    product, position = 1, 0
    while position < len(data):
        assert data[position] == 0x10
        dim, shift = 0, 0
        while True:
            position += 1
            dim |= (data[position] & 127) << shift
            shift += 7
            if data[position] < 128:
                break
        product *= dim
        position += 1
    return product


def parse(data: bytes) -> dict[str, tuple[str, tuple[int, ...], int, bytes]]:
    """Parse a file of contract version 3: name -> (storage type, shape, offset of the values, values).

    The docstring of artifact/params_file.py defines the format.
    """
    found, offset = {}, 0
    while offset < len(data):
        zero, level, version, length = struct.unpack_from("<IQIi", data, offset)
        assert (zero, level, version) == (0, 0, 0)
        message = data[offset + 20 : offset + 20 + length]
        # A protobuf message: the type (field 1), the dimensions (field 2), and in field 15 "qvl1" and `content`.
        head, _, content = message.partition(b"qvl1")
        assert head[0] == 0x08
        paddle_type = head[1]
        assert head[-4] == 0x7A
        # The length of field 15, a varint of three bytes.
        first, second, third = head[-3:]
        assert first & 128
        assert second & 128
        assert (first & 127) + (second & 127) * 128 + third * 16384 == len(content) + 4
        count = product_of_dims(head[2:-4])
        code, n_dims, n_name = struct.unpack_from("<BBH", content)
        shape = struct.unpack_from(f"<{n_dims}q", content, 4)
        name = content[4 + 8 * n_dims : 4 + 8 * n_dims + n_name].decode()
        assert not any(content[4 + 8 * n_dims + n_name :])
        kind, expected_type, item_bytes = KINDS[code]
        assert paddle_type == expected_type
        start = offset + 20 + length
        offset = start + count * item_bytes
        found[name] = (kind, shape, start, data[start:offset])
    assert offset == len(data)
    return found


def write_version_2(path: Path, records: list[tuple[int, tuple[int, ...], bytes]]) -> None:
    """Write a file of contract version 2 from records of (Paddle's type, dimensions, bytes)."""
    with path.open("wb") as file:
        for paddle_type, dims, raw in records:
            message = bytes([0x08, paddle_type])
            for dim in dims:
                message += b"\x10"
                while dim > 127:
                    message += bytes([dim & 127 | 128])
                    dim >>= 7
                message += bytes([dim])
            file.write(struct.pack("<IQIi", 0, 0, 0, len(message)) + message + raw)


def convert_to_version_2(prefix: Path) -> None:
    """Convert an exported stage to contract version 2."""
    tensors = parse(params_path(prefix).read_bytes())
    types = {kind: number for kind, number, _ in KINDS.values()}
    records = []
    for name in sorted(tensors):
        kind, shape, _, raw = tensors[name]
        # The record of an integer type has the number of bytes as its only dimension.
        records.append((types[kind], (len(raw),) if kind.startswith("int") else shape, raw))
    write_version_2(params_path(prefix), records)
    path = manifest_path(prefix)
    data = json.loads(path.read_text())
    data["contract"] = 2
    data["weights"] = FileDigest.of(params_path(prefix)).model_dump()
    del data["weights_samples"]
    path.write_text(json.dumps(data))


@pytest.fixture
def exported(tiny_exported: Path, tmp_path: Path) -> Path:
    for folder in ("vision", "text"):
        shutil.copytree(tiny_exported / folder, tmp_path / folder)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_at_their_offsets(dtype: str, tiny_exported: Path, tmp_path: Path) -> None:
    model = tiny_exported / "model"
    export_vision(model, tmp_path / "vision", dtype, engine="portable")
    export_language(model, tmp_path, "text", dtype, engine="portable")
    checkpoint = Checkpoint(model)
    streams = {
        "vision": vision_parameters(checkpoint, dtype),
        "text": language_parameters(checkpoint, dtype),
    }
    for prefix, stream in streams.items():
        found = parse((tmp_path / f"{prefix}.pdiparams").read_bytes())
        for name, values in stream:
            kind, shape, offset, raw = found.pop(name)
            assert (kind, shape, raw) == (dtype, values.shape, np.ascontiguousarray(values).tobytes())
            assert offset % 64 == 0
        assert not found


def test_values_are_aligned_after_any_record(tmp_path: Path) -> None:
    """With random shapes, since each tensor of the tiny model has a multiple of 64 bytes."""
    random = np.random.RandomState(0)
    values = {
        f"h.{i}.weight": random.randn(*random.randint(1, 9, i % 4 + 1)).astype("float32") for i in range(40)
    }
    path = tmp_path / "a.pdiparams"
    records = {name: Record(value.shape, "float32") for name, value in values.items()}
    weights = {name: Weight(value.shape, "float32") for name, value in values.items()}
    write_params(path, records, weights, reversed(values.items()))
    found = parse(path.read_bytes())
    assert list(found) == list(values)
    for name, (kind, shape, offset, raw) in found.items():
        assert (kind, shape, raw) == ("float32", values[name].shape, values[name].tobytes())
        assert offset % 64 == 0


@needs_compiler
@pytest.mark.parametrize("quant_type", [None, "weight_only_int8", "weight_only_int4"])
@pytest.mark.parametrize("contract", [2, 3])
def test_read_tensors(contract: int, quant_type: str, tiny_exported: Path, tmp_path: Path) -> None:
    export_language(tiny_exported / "model", tmp_path, "text", "bfloat16", quant_type=quant_type)
    prefix = tmp_path / "text"
    expected = parse(params_path(prefix).read_bytes())
    assert {kind for kind, *_ in expected.values()} == {
        None: {"bfloat16"},
        "weight_only_int8": {"bfloat16", "int8"},
        "weight_only_int4": {"bfloat16", "int8", "int4_g64"},  # int8: c_attn and lm_head
    }[quant_type]
    if contract == 2:
        convert_to_version_2(prefix)
    data = params_path(prefix).read_bytes()
    entries = read_tensors(params_path(prefix), read_manifest(prefix, "language"))
    assert {entry.name for entry in entries} == set(expected)
    for name, kind, shape, offset, n_bytes in entries:
        assert (kind, shape, data[offset : offset + n_bytes]) == (*expected[name][:2], expected[name][3])


@pytest.mark.parametrize("form", ["pir", "legacy"])
def test_parameters_are_sorted_by_name(form: str, tiny_exported: Path, tmp_path: Path) -> None:
    """Files of version 2 rely on this order. With twelve layers, since "h.10" sorts before "h.2"."""
    config = Checkpoint(tiny_exported / "model").config.model_copy(update={"num_hidden_layers": 12})
    program = Program(
        "", LanguageModel, step_inputs, lambda model, inputs: Step(model)(*inputs[:7], inputs[7:])
    )
    names = list(save_program(program, config, "float32", "float32", form, tmp_path / "program"))
    assert names == sorted(names)
    assert names.index("h.10.ln_1.weight") < names.index("h.2.ln_1.weight")


@pytest.mark.parametrize("extension", [".json", ".pdmodel"])
def test_a_stage_of_version_2_gives_the_same_completion(
    extension: str, exported: Path, tiny_exported: Path
) -> None:
    completions = []
    for root in (exported, tiny_exported):
        stages = (root / "vision" / f"vision{extension}", root / "text" / f"qwen{extension}")
        if root == exported:
            convert_to_version_2(root / "vision" / "vision")
            convert_to_version_2(root / "text" / "qwen")
        vl = open_model(*stages, "portable")
        tokens = vl.generate_ids(np.arange(40)[None], max_new_tokens=24, eos_token_ids=())
        completions.append(np.asarray(tokens).tolist())
    assert completions[0] == completions[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite(dtype: str, value: float, tmp_path: Path) -> None:
    values = np.ones([3, 5], np.float32)
    values[1, 2] = value
    stored = (values.view(np.uint32) >> 16).astype("<u2") if dtype == "bfloat16" else values.astype(dtype)
    path = tmp_path / "a.pdiparams"
    with pytest.raises(QwenVLError, match=r"wte\.weight: 1 of its values"):
        write_params(
            path,
            {"wte.weight": Record((3, 5), dtype)},
            {"wte.weight": Weight((3, 5), dtype)},
            [("wte.weight", stored)],
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["magic", "type", "name", "length", "truncated"])
def test_damaged_records(damage: str, exported: Path) -> None:
    """Damage that digests do not detect: the manifest describes the damaged file."""
    prefix = exported / "text" / "qwen"
    path, manifest_file = params_path(prefix), manifest_path(prefix)
    data = bytearray(path.read_bytes())
    magic = data.index(b"qvl1")
    if damage == "truncated":
        del data[-100:]
    elif damage == "length":
        data[16:20] = struct.pack("<i", 1 << 20)
    else:
        # After the magic: 4 bytes (type, number of dimensions, length of the name), 8 for the only dimension, the name.
        positions = {"magic": magic, "type": magic + 4, "name": magic + 16}
        values = {"magic": b"x", "type": b"\x63", "name": b"Z"}
        position = positions[damage]
        data[position : position + 1] = values[damage]
    path.write_bytes(data)
    manifest = json.loads(manifest_file.read_text())
    manifest["weights"] = FileDigest.of(path).model_dump()
    manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(QwenVLError, match=r"qwen\.pdiparams: (damaged|cut off|its tensors)"):
        read_tensors(path, read_manifest(prefix, "language"))
