"""Read PyTorch weight files one tensor at a time, without PyTorch.

Since PyTorch 1.6 such a file is a zip archive of `data.pkl`, a pickle of the table of tensors, and `data/KEY`, the raw
values of each storage. Older files are a sequence of pickles, one of them the table, followed by the storages
(torch_legacy_file.py).
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint import torch_legacy_file
from paddlemix_qwenvl_plugin.checkpoint.table_pickle import DAMAGED, RefusedError
from paddlemix_qwenvl_plugin.checkpoint.torch_table import StoredTensor, TorchUnpickler, check, check_table
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, first_line

_DAMAGED = (zipfile.BadZipFile, *DAMAGED)
# The table of a 7B model takes 100 KB.
_MAX_TABLE_BYTES = 16 << 20
# Size of the local file header before the content of each zip member, without the file name and the extra field.
_ZIP_HEADER_BYTES = 30


def read_header(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a PyTorch weight file.

    Raises:
        QwenVLError: not a PyTorch weight file, truncated, with other content than tensors, with a tensor that does not
            fit its storage, or of a form that `_check_members` refuses.
    """
    try:
        if torch_legacy_file.is_legacy(path):
            return torch_legacy_file.read_header(path)
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
            folder = _folder(archive)
            table = TorchUnpickler(io.BytesIO(archive.read(f"{folder}data.pkl"))).load()
            tensors = check_table(path, table)
            for name, tensor in tensors.items():
                n_bytes = archive.getinfo(f"{folder}data/{tensor.storage.key}").file_size
                check(f"{path}: {name}", tensor, n_bytes)
    except RefusedError as error:
        raise QwenVLError(f"{path}: {error}; only tables of tensors are read") from error
    except _DAMAGED as error:
        raise QwenVLError(
            f"{path}: not a PyTorch weight file, or truncated ({first_line(error)[:200]})"
        ) from error
    return tensors


def read_tensor(path: Path, tensor: StoredTensor) -> NDArray[np.generic]:
    """Read one tensor of a PyTorch file in its storage type (bfloat16 as uint16 bits, float8 as uint8 bits).

    Raises:
        QwenVLError: the values are damaged.
    """
    key = tensor.storage.key
    try:
        if torch_legacy_file.is_legacy(path):
            return tensor.view(torch_legacy_file.read_storage(path, key))
        with zipfile.ZipFile(path) as archive:
            return tensor.view(archive.read(f"{_folder(archive)}data/{key}"))
    except _DAMAGED as error:
        raise QwenVLError(f"{path}: data/{key} cannot be read ({first_line(error)[:200]})") from error


def _folder(archive: zipfile.ZipFile) -> str:
    """The folder of the archive's members, with a trailing slash, or empty."""
    [pickle_name] = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    return pickle_name.removesuffix("data.pkl")


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse compressed, duplicate and overlapping members, a huge table, and big-endian values.

    PyTorch writes none of them, except big-endian values on some machines.
    """
    end = 0
    names = set()
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise QwenVLError(f"{path}: {member.filename} is compressed; save the file again with torch.save")
        if member.filename in names or member.header_offset < end:
            raise QwenVLError(f"{path}: {member.filename} is in it twice, or overlaps another member")
        names.add(member.filename)
        end = member.header_offset + _ZIP_HEADER_BYTES + len(member.filename) + member.file_size
        if member.filename.endswith("data.pkl") and member.file_size > _MAX_TABLE_BYTES:
            raise QwenVLError(f"{path}: its table takes {member.file_size} bytes, more than any model's")
        if member.filename.endswith("byteorder") and archive.read(member) != b"little":
            raise QwenVLError(f"{path}: its values are big-endian; save the file again on another machine")
