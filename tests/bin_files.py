"""Write PyTorch weight files without PyTorch: a zip of one pickle (`data.pkl`) and the tensors' raw values."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from types import ModuleType
from unittest import mock

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def stand_in(module, name):
    """Stand-in for an object that a pickle refers to as `module.name`."""
    found = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, found)
    return found


class Pickler(pickle.Pickler):
    """Pickle arrays as PyTorch pickles tensors: storage outside the pickle, shape and strides."""

    def __init__(self, file, dtype):
        super().__init__(file, protocol=2)
        self.storages = []
        self.storage_type = stand_in("torch", STORAGES[dtype])
        self.rebuild = stand_in("torch._utils", "_rebuild_tensor_v2")

    def persistent_id(self, value):
        if not isinstance(value, memoryview):
            return None
        self.storages.append(value)
        return "storage", self.storage_type, str(len(self.storages) - 1), "cpu", len(value)

    def reducer_override(self, value):
        if not isinstance(value, np.ndarray):
            return NotImplemented
        strides = tuple(stride // value.itemsize for stride in value.strides)
        return self.rebuild, (memoryview(value.ravel()), 0, value.shape, strides, False, OrderedDict())


def write_bin(path, weights, dtype):
    body = io.BytesIO()
    # Only while pickling: einops would mistake the stand-in for PyTorch.
    with mock.patch.dict(sys.modules, {name: ModuleType(name) for name in ("torch", "torch._utils")}):
        pickler = Pickler(body, dtype)
        pickler.dump(OrderedDict(weights))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{path.stem}/data.pkl", body.getvalue())
        file.writestr(f"{path.stem}/byteorder", "little")
        for i, storage in enumerate(pickler.storages):
            file.writestr(f"{path.stem}/data/{i}", storage.tobytes())
        file.writestr(f"{path.stem}/version", "3\n")
