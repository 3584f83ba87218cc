"""Write PyTorch weight files without PyTorch: zip archives, and the format before version 1.6."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

# dtype of the weights -> PyTorch's class of storages. Arrays of bfloat16 weights are uint16.
STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int32": "IntStorage",
}


def _stand_in(module: str, name: str) -> Any:
    """Stand-in for an object that a pickle refers to as `module.name`."""
    stand_in = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, stand_in)
    return stand_in


class _Pickler(pickle.Pickler):
    """Pickle arrays as PyTorch pickles tensors: shape and strides, with the storage outside the pickle.

    `view` follows the number of elements in the reference to a storage; the format before version 1.6 has a None there.
    """

    def __init__(self, file: Any, dtype: str, *view: Any) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[memoryview] = []
        self._view = view
        self._storage_type = _stand_in("torch", STORAGES[dtype])
        self._rebuild = _stand_in("torch._utils", "_rebuild_tensor_v2")

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, memoryview):
            return None
        self.storages.append(value)
        return "storage", self._storage_type, str(len(self.storages) - 1), "cpu", len(value), *self._view

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return NotImplemented
        values = value.copy(order="C")  # `value` may be a view, for example a transposed array
        strides = tuple(stride // values.itemsize for stride in values.strides)
        return self._rebuild, (memoryview(values.ravel()), 0, values.shape, strides, False, OrderedDict())


def _pickled(weights: dict[str, np.ndarray], dtype: str, *view: Any) -> tuple[bytes, list[memoryview]]:
    body = io.BytesIO()
    # Only while pickling: einops would mistake the stand-in for PyTorch.
    with mock.patch.dict(sys.modules, {name: ModuleType(name) for name in ("torch", "torch._utils")}):
        pickler = _Pickler(body, dtype, *view)
        pickler.dump(OrderedDict(weights))
    return body.getvalue(), pickler.storages


def write_bin(path: Path, weights: dict[str, np.ndarray], dtype: str) -> None:
    """Write weights in the format of PyTorch 1.6 and newer, a zip archive."""
    table, storages = _pickled(weights, dtype)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{path.stem}/data.pkl", table)
        file.writestr(f"{path.stem}/byteorder", "little")
        for i, storage in enumerate(storages):
            file.writestr(f"{path.stem}/data/{i}", storage.tobytes())
        file.writestr(f"{path.stem}/version", "3\n")


def write_legacy(path: Path, weights: dict[str, np.ndarray], dtype: str) -> None:
    """Write weights in the format before PyTorch 1.6: pickles, then the storages."""
    table, storages = _pickled(weights, dtype, None)
    system_info = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    with path.open("wb") as file:
        # The magic number, the protocol version of the format, and the writer's byte order and type sizes.
        for value in (0x1950A86A20F9469CFC6C, 1001, system_info):
            file.write(pickle.dumps(value, 2))
        file.write(table + pickle.dumps([str(i) for i in range(len(storages))], 2))
        for storage in storages:
            file.write(struct.pack("<q", len(storage)) + storage.tobytes())


def replace_pickle(source: Path, target: Path, table: bytes) -> Path:
    """Copy `source`, a file of PyTorch 1.6 or newer, to `target` with the pickle `table`."""
    with zipfile.ZipFile(source) as source_file, zipfile.ZipFile(target, "w") as target_file:
        for name in source_file.namelist():
            target_file.writestr(name, table if name.endswith("data.pkl") else source_file.read(name))
    return target


def pickle_of(path: Path) -> bytes:
    """The pickle in a file of PyTorch 1.6 or newer."""
    with zipfile.ZipFile(path) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(name)
