"""Read PyTorch weight files of versions before 1.6, and of torch.save(…, _use_new_zipfile_serialization=False).

Layout of such a file: three pickles (a magic number, the version 1001, properties of the machine), the pickle of the
table of tensors, a pickle of the keys of the storages, and the storages in this order, each as its number of values
(8 bytes, little-endian) and the values.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

from paddlemix_qwenvl_plugin.checkpoint.table_pickle import RefusedError
from paddlemix_qwenvl_plugin.checkpoint.torch_table import StoredTensor, TorchUnpickler, check, check_table
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# The pickle of the magic number 0x1950a86a20f9469cfc6c.
_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_VERSION = 1001


def is_legacy(path: Path) -> bool:
    """Whether a file has the format of PyTorch before 1.6, by its first bytes."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_header(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a legacy file.

    Raises:
        QwenVLError: another version or byte order, or values that are no tensors or do not fit their storages.
        RefusedError, or an exception in table_pickle.DAMAGED: a pickle with other content than tensors, or damaged.
    """
    table, locations = _read(path, path.stat().st_mtime_ns)
    tensors = check_table(path, table)
    for name, tensor in tensors.items():
        check(f"{path}: {name}", tensor, locations[tensor.storage.key][1])
    return tensors


def read_storage(path: Path, key: str) -> bytes:
    """Read the raw values of a storage by its key."""
    _, locations = _read(path, path.stat().st_mtime_ns)
    offset, n_bytes = locations[key]
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(n_bytes)


@lru_cache(maxsize=8)
def _read(path: Path, mtime_ns: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Read the table, and the location of each storage: key -> (offset, number of bytes).

    `mtime_ns` is part of the cache key, so that a changed file is read again.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(len(_MAGIC))
        version = TorchUnpickler(file).load()
        machine = TorchUnpickler(file).load()
        if version != _VERSION or machine.get("little_endian") is not True:
            raise QwenVLError(
                f"{path}: of another version of PyTorch, or big-endian; save it again with PyTorch 2"
            )
        unpickler = _RecordingUnpickler(file)
        table = unpickler.load()
        keys = TorchUnpickler(file).load()
        if not isinstance(keys, list) or any(not isinstance(key, str) for key in keys):
            raise RefusedError("its storages have no list of keys")
        locations: dict[str, tuple[int, int]] = {}
        for key in keys:
            [n_values] = struct.unpack("<q", file.read(8))
            n_bytes = n_values * unpickler.item_bytes[key]
            if key in locations or n_values < 0 or file.tell() + n_bytes > size:
                raise EOFError("a storage is listed twice, or reaches beyond the end of the file")
            locations[key] = (file.tell(), n_bytes)
            file.seek(n_bytes, 1)
    return table, locations


class _RecordingUnpickler(TorchUnpickler):
    """Unpickler that records the bytes per value of each storage."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.item_bytes: dict[str, int] = {}

    def persistent_load(self, pid: Any) -> Any:
        storage = super().persistent_load(pid)
        self.item_bytes[storage.key] = storage.item_bytes
        return storage
