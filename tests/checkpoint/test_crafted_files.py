"""Crafted weight files, indices and config.json: refused with one line, in little time and memory; no code runs.

The pickles are written opcode by opcode (the module pickletools lists them), since no pickler writes such files.
"""

from __future__ import annotations

import json
import pickle
import re
import resource
import struct
import time
import zipfile
from pathlib import Path

import pytest
from torch_files import pickle_of, replace_pickle

from paddlemix_qwenvl_plugin import QwenVLError
from paddlemix_qwenvl_plugin.checkpoint import pdparams_file, safetensors_file, torch_file
from paddlemix_qwenvl_plugin.checkpoint.config import MAX_JSON_BYTES, load_config
from paddlemix_qwenvl_plugin.checkpoint.shards import read_index

BY_TORCH = Path(__file__).parents[1] / "golden" / "torch"
MAX_MIB = 300  # growth of the process's peak memory in a test
MAX_SECONDS = 10.0  # for a call of a reader


def text(value: str) -> bytes:
    """The opcode that pushes a string."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def nested(levels: int) -> bytes:
    """Opcodes of nested pairs, of which each holds the next inner pair twice.

    They are few bytes, but hashing or printing the tuple takes 2^levels steps.
    """
    slots = [struct.pack("<I", 10_000 + i) for i in range(levels)]  # memo slots that no other opcode uses
    # Each level: r stores the last tuple in a slot, j pushes it a second time, \x86 makes a pair of the two.
    return b")" + b"".join(b"r" + slot + b"j" + slot + b"\x86" for slot in slots)


def table_with(value: bytes, key: bytes = text("a")) -> bytes:
    """A pickle of {key: value}, from opcodes that push a key and a value."""
    return b"\x80\x02}" + key + value + b"s."


def table_with_array(shape: bytes, code: bytes = text("f4"), content: bytes = b"C\x04abcd") -> bytes:
    """A pickle of {"a": array}, from opcodes that push the array's shape, dtype code and bytes."""
    dtype = (
        b"cnumpy\ndtype\n"
        + code
        + b"\x85R(K\x03"
        + text("<")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    return table_with(start + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb")


# Description of the pickle -> (its bytes, pattern of the message).
PICKLES = {
    "a function": (table_with(b"cos\nsystem\n" + text("touch ran") + b"\x85R"), "imports os.system"),
    "a function returned by a function": (
        table_with(b"cbuiltins\ngetattr\ncbuiltins\n__import__\n" + text("os") + b"\x85R" + text("system") + b"\x86R"),
        "imports builtins.getattr",
    ),
    "a dotted name": (b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93.", "imports"),
    "an instance": (b"\x80\x02(icollections\nOrderedDict\n.", "has the operation b'i'"),
    "a class called by the opcode OBJ": (b"\x80\x02(ccollections\nOrderedDict\no.", "has the operation b'o'"),
    "an object of the extension registry": (b"\x80\x02\x82\x01.", "has the operation"),
    "an out-of-band buffer": (b"\x80\x05\x97.", "has the operation"),
    "a set": (b"\x80\x04\x8f(" + nested(40) + b"\x90.", "has the operation"),
    "a number of a million digits": (b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.", "has the operation b'L'"),
    "a key that takes forever to hash": (table_with(b"N", key=nested(60)), "a key that is not text"),
    "a name that takes forever to print": (table_with(nested(60)), "a is not a tensor"),
    "a code that takes forever to print": (table_with_array(b"K\x01\x85", code=nested(60)), "holds no numbers"),
    "an encoding that takes forever to print": (
        table_with(b"c_codecs\nencode\n" + text("x") + nested(60) + b"\x86R"),
        "encodes text with another codec",
    ),
    "an expression that takes forever to print": (
        table_with(b"cbuiltins\neval\n" + nested(60) + b"}\x86R"),
        "evaluates",
    ),
    "a table that holds itself": (b"\x80\x02}q\x00" + text("a") + b"h\x00s.", "a is not a tensor"),
    "a list that holds itself": (b"\x80\x02]q\x00h\x00a.", "holds no table"),
    "lists nested 100,000 deep": (table_with(b"]" * 100_000 + b"a" * 99_999), "a is not a tensor"),
    "millions of opcodes": (b"\x80\x02" + b"N0" * 1_500_000 + b".", "more than 300000 operations"),
    "copies of a long list": (
        table_with(b"](" + b"N" * 100_000 + b"eq\x00" + b"cbuiltins\ntuple\nh\x00\x85R" * 20_000),
        "a tuple in it is not a",
    ),
    "a wrong length of bytes": (b"\x80\x02B\xff\xff\xff\x7f.", "truncated"),
    "a length of 2^63 bytes": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "truncated"),
    "a wrong length of a frame": (b"\x80\x04\x95" + b"\xff" * 6 + b"\0\0.", "truncated"),
    "a memo of gigabytes": (b"\x80\x02}r\xff\xff\xff\x7f.", "no table"),
    "text longer than its frame": (b"\x80\x04\x95\x08" + bytes(7) + b"X\x00\x10\x00\x00abc" + b"." * 5000, "truncated"),
    "a shape of floats": (table_with_array(b"G\x3f\xf0\0\0\0\0\0\0\x85"), "no valid shape"),
    "a shape of NaN": (table_with_array(b"G\x7f\xf8\0\0\0\0\0\0\x85"), "no valid shape"),
    "a negative size": (table_with_array(b"J\xff\xff\xff\xff\x85"), "no valid shape"),
    "sizes whose product overflows": (
        table_with_array(b"(" + b"\x8a\x06" + b"\0" * 5 + b"\x10" + b"\x8a\x06" + b"\0" * 5 + b"\x10" + b"t"),
        "where .* is declared",
    ),
    "a size of 2^64": (table_with_array(b"\x8a\x09" + b"\0" * 8 + b"\x01\x85"), "no valid shape"),
    "a hundred thousand dimensions": (table_with_array(b"(" + b"K\x01" * 100_000 + b"t"), "no valid shape"),
    "an array of objects": (table_with_array(b"K\x01\x85", code=text("O8")), "holds no numbers"),
    "an array of strings": (table_with_array(b"K\x01\x85", code=text("U1")), "holds no numbers"),
    "a split tensor with a missing part": (
        b"\x80\x02}" + text("UnpackBigParamInfor@@") + b"}" + text("a") + b"}" + text("slices") + b"](" + text("b")
        + b"es" + text("OriginShape") + b"K\x01\x85sss.",
        "truncated",
    ),
}  # fmt: skip


def refused(call, path):
    """Call a reader, which refuses the file in time; return the error message, which has one line."""
    start = time.monotonic()
    with pytest.raises(QwenVLError) as caught:
        call(path)
    assert time.monotonic() - start < MAX_SECONDS
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


@pytest.fixture(autouse=True)
def memory_is_bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_MIB << 10  # KiB


def test_a_valid_pickle_is_read(tmp_path):
    """`table_with_array` writes readable files if its arguments are valid."""
    path = tmp_path / "a.pdparams"
    path.write_bytes(table_with_array(b"K\x01\x85"))
    header = pdparams_file.read_header(path)
    assert pdparams_file.read_tensor(path, header["a"]).tobytes() == b"abcd"


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_of_paddle(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    path = Path("a.pdparams")
    path.write_bytes(PICKLES[case][0])
    assert re.search(PICKLES[case][1], refused(pdparams_file.read_header, path))
    assert not Path("ran").exists()


@pytest.mark.parametrize("case", [case for case in PICKLES if "numpy" not in str(PICKLES[case][0])])
def test_pickles_of_pytorch(tmp_path, monkeypatch, case):
    """The pickles without NumPy arrays, in a zip archive and in the format before PyTorch 1.6."""
    monkeypatch.chdir(tmp_path)
    refused(torch_file.read_header, replace_pickle(BY_TORCH / "float32.bin", Path("a.bin"), PICKLES[case][0]))
    legacy = (BY_TORCH / "float32-before-1.6.bin").read_bytes()
    # Insert the crafted pickle where the reader expects the table: after the dict with the key "little_endian".
    system_info = legacy.index(b"}", legacy.index(b"little_endian"))
    start = legacy.index(b"\x80\x02", system_info)
    Path("b.bin").write_bytes(legacy[:start] + PICKLES[case][0] + legacy[start:])
    refused(torch_file.read_header, Path("b.bin"))
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # The shape (3, 20) becomes (3, 2^48), (3, nested tuple) and a nested tuple.
        (b"K\x03K\x14\x86", b"K\x03\x8a\x07" + b"\0" * 6 + b"\x01\x86", "no valid shape"),
        (b"K\x03K\x14\x86", b"K\x03" + nested(60) + b"\x86", "no valid shape"),
        (b"K\x03K\x14\x86", nested(60), "no valid shape"),
        (b"FloatStorage", b"ComplexFloatStorage", "ComplexFloatStorage, which no weight is"),
        (b"FloatStorage", b"TypedStorage", "TypedStorage, which no weight is"),
        # The first word of the reference to a storage, and the next opcode.
        (b"storageq", b"starageq", "refers to something that is not a storage"),
    ],
)
def test_changed_tables_of_pytorch(tmp_path, old, new, message):
    table = pickle_of(BY_TORCH / "float32.bin")
    assert old in table
    # The name of a class is replaced in all tensors, the others in one tensor only.
    table = table.replace(old, new) if b"Storage" in old else table.replace(old, new, 1)
    found = refused(
        torch_file.read_header, replace_pickle(BY_TORCH / "float32.bin", tmp_path / "a.bin", table)
    )
    assert re.search(message, found)


# Archives


def archive(path, members, compression=zipfile.ZIP_STORED):
    """Write a zip archive of (name, content)."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def test_a_zip_bomb(tmp_path):
    """128 MiB of zeros, compressed to less than 1 MiB; PyTorch never compresses."""
    path = archive(tmp_path / "a.bin", [("a/data.pkl", bytes(1 << 27))], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert "a/data.pkl is compressed; save the file again with torch.save" in refused(
        torch_file.read_header, path
    )


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_duplicate_member(tmp_path):
    members = [
        ("a/data.pkl", pickle_of(BY_TORCH / "float32.bin")),
        ("a/data/0", bytes(240)),  # the first storage, 60 float32 values
        ("a/data/0", bytes(240)),
    ]
    message = refused(torch_file.read_header, archive(tmp_path / "a.bin", members))
    assert "a/data/0 is in it twice, or overlaps another member" in message


def test_two_tables(tmp_path):
    table = pickle_of(BY_TORCH / "float32.bin")
    message = refused(
        torch_file.read_header, archive(tmp_path / "a.bin", [("a/data.pkl", table), ("b/data.pkl", table)])
    )
    assert "not a PyTorch weight file" in message


def test_members_that_overlap(tmp_path):
    """The central directory gives the second member the place of the first."""
    path = archive(
        tmp_path / "a.bin", [("a/0", bytes(500)), ("a/1", bytes(500)), ("a/data.pkl", b"\x80\x02}.")]
    )
    content = bytearray(path.read_bytes())
    # The second entry of the central directory.
    entry = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    assert content[entry + 46 : entry + 49] == b"a/1"
    content[entry + 42 : entry + 46] = struct.pack("<I", 0)  # offset of the member in the file
    path.write_bytes(content)
    assert "is in it twice, or overlaps another member" in refused(torch_file.read_header, path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\\..\\b", "x" * 5000])
def test_names_of_members_are_not_paths(tmp_path, name):
    """A member that no tensor refers to is ignored, even if its name is a path or very long.

    The file is refused only because its table is empty.
    """
    path = archive(tmp_path / "a.bin", [(name, b"x"), ("a/data.pkl", b"\x80\x02}.")])
    assert "holds no table of tensors" in refused(torch_file.read_header, path)


def test_a_big_endian_archive(tmp_path):
    table = pickle_of(BY_TORCH / "float32.bin")
    path = archive(tmp_path / "a.bin", [("a/data.pkl", table), ("a/byteorder", b"big")])
    assert "its values are big-endian" in refused(torch_file.read_header, path)


# safetensors, indices, config.json


def safetensors(path, header, length=None):
    """Write a file with this header (JSON values or bytes) and 8 bytes; `length` replaces the header's true length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(8))
    return path


def entry(shape, offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry([2]), "b": entry([2])}, "b begins at byte"),
        ({"a": entry([1], (0, 4)), "b": entry([1], (2, 6))}, "b begins at byte"),
        ({"a": entry([1], (4, 8))}, "a begins at byte"),
        ({"a": entry([2], (8, 0))}, "negative size"),
        ({"a": entry([2], (-8, 0))}, "not a whole number"),
        ({"a": entry([-2])}, "not a whole number"),
        ({"a": entry([2.0])}, "not a whole number"),
        ({"a": entry([float("nan")])}, "not a whole number"),
        ({"a": entry([float("inf")])}, "not a whole number"),
        ({"a": entry([True, 2])}, "not a whole number"),
        ({"a": entry(["2"])}, "not a whole number"),
        ({"a": entry({"2": 2})}, "not a whole number"),
        ({"a": entry([1 << 62, 1 << 62])}, "wrong number of bytes"),
        ({"a": entry([1 << 64])}, "wrong number of bytes"),
        ({"a": entry([2], (0, 1 << 64))}, "wrong number of bytes"),
        ({"a": entry([1 << 40], (0, 1 << 42))}, "truncated"),
        ({"a": entry([1] * 9)}, "9 dimensions"),
        ({"a": entry([2], dtype="F4")}, "has the unsupported dtype F4"),
        ({"a": entry([2], dtype=["F32"])}, "has the unsupported dtype ?"),
        ({"a": [2]}, "header is damaged"),
        ([1, 2], "header is damaged"),
        (b"[" * 100_000, "header is damaged"),
        (b'{"a":' * 50_000, "header is damaged"),
        (b'{"a": NaN}', "header is damaged"),
        (b'{"a": 1e999}', "header is damaged"),
        (b"\xff\xfe", "header is damaged"),
        (b'{"a": 1, "a": 2}', "a is listed twice"),
    ],
)
def test_headers_of_safetensors(tmp_path, header, message):
    assert message in refused(safetensors_file.read_header, safetensors(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize("length", [2 << 30, 1 << 63, (1 << 64) - 1, MAX_JSON_BYTES + 1])
def test_a_header_of_gigabytes(tmp_path, length):
    """The file, which is sparse, is as long as its header claims, but at most 3 GiB."""
    path = safetensors(tmp_path / "a.safetensors", {}, length=length)
    with path.open("r+b") as file:
        file.truncate(min(length, 3 << 30) + 8)
    assert "not a safetensors file, cut off in its header, or with a header over 16 MiB" in refused(
        safetensors_file.read_header, path
    )


def test_gigabytes_of_json(tmp_path):
    for name, call in (("config.json", lambda path: load_config(path.parent)), ("index.json", read_index)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(3 << 30)
        assert f"{name}: larger than 16 MiB" in refused(call, tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"weight_map":' * 50_000, b'{"weight_map": {"a": ' * 20_000]
)
def test_deep_json(tmp_path, content):
    for name, call in (("config.json", lambda path: load_config(path.parent)), ("index.json", read_index)):
        (tmp_path / name).write_bytes(content)
        assert f"{name}: not valid JSON" in refused(call, tmp_path / name)


def test_pythons_unpickler_runs_the_code(tmp_path, monkeypatch):
    """The pickle "a function" is valid: Python's own unpickler runs its command."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(PICKLES["a function"][0])
    assert Path("ran").exists()


def test_a_long_file_takes_little_memory(tmp_path):
    """A small tensor is read without the other tensor of its file, which has 512 MiB."""
    small = table_with_array(b"M\x00\x04\x85", content=b"B\x00\x10\x00\x00" + bytes(4096))
    large = table_with_array(b"\x8a\x05\x00\x00\x00\x08\x00\x85", content=b"B\x00\x00\x00\x20")
    path = tmp_path / "a.pdparams"
    # One table: `small` up to its end opcode, then `large` without its beginning, with its values as a sparse region.
    with path.open("wb") as file:
        file.write(small[:-1] + text("large") + large[len(b"\x80\x02}" + text("a")) : -len(b"tbs.")])
        file.seek(1 << 29, 1)
        file.write(b"tbs.")
    header = pdparams_file.read_header(path)
    assert header["large"].shape == (1 << 27,)
    assert not pdparams_file.read_tensor(path, header["a"]).any()
