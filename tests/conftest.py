"""Fixtures of all tests: model folders and their exports, created once per session, and the engine settings.

The exports have engine="auto", since their first use may be in a test for which `engine` has set QWENVL_ENGINE.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from engines import ENGINES
from safetensors.numpy import save_file

from paddlemix_qwenvl_plugin.export.export import export_language, export_vision
from paddlemix_qwenvl_plugin.tiny.make import make_tiny

GOLDEN = Path(__file__).parent / "golden"

# Under nohup SIGHUP is ignored, and in a script's background jobs SIGINT; the commands that tests start would inherit
# that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _remove_log_handlers() -> Iterator[None]:
    """Remove the root logger's stream handlers that a test has installed: pytest closes their stream, its stderr."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with each engine setting of ENGINES."""
    monkeypatch.setenv("QWENVL_ENGINE", request.param)
    return str(request.param)


class Golden:
    """A golden model: `folder` (PaddleMIX names, float32), the prefixes of its exported stages, and `figures`.

    `figures` are token ids and upstream's outputs for them.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder / "model"
        self.vision = folder / "vision" / "vision"
        self.language = folder / "text" / "qwen"
        self.config = json.loads((GOLDEN / name / "config.json").read_text())
        self.weights = {
            key: value.astype(np.float32) for key, value in np.load(GOLDEN / name / "weights.npz").items()
        }
        self.figures = dict(np.load(GOLDEN / name / "golden.npz"))
        self.folder.mkdir(parents=True)
        shutil.copyfile(GOLDEN / name / "config.json", self.folder / "config.json")
        save_file(self.weights, str(self.folder / "model.safetensors"))

    @property
    def input_ids(self) -> np.ndarray:
        return self.figures["input_ids"]

    @property
    def images(self) -> np.ndarray:
        """The images for which upstream computed `figures` (tests/golden/README.md)."""
        n_images = len(self.figures["features_every_16th_query"])
        return np.random.RandomState(101).randn(n_images, 3, 448, 448).astype("float32")

    @property
    def img_pos(self) -> np.ndarray:
        """int64 [N, 3]: row, index of <img>, index of </img>."""
        start_id = self.config["visual"]["image_start_id"]
        rows, starts = np.nonzero(self.input_ids == start_id)
        _, ends = np.nonzero(self.input_ids == start_id + 1)
        return np.stack([rows, starts, ends], axis=1).astype("int64")


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Golden]:
    """Function that returns golden model "a" or "b", exported in float32 at its first use."""
    models: dict[str, Golden] = {}

    def get(name: str) -> Golden:
        if name not in models:
            model = Golden(name, tmp_path_factory.mktemp(f"golden-{name}"))
            export_vision(model.folder, model.vision, engine="auto")
            export_language(model.folder, model.language.parent, model.language.name, engine="auto")
            models[name] = model
        return models[name]

    return get


@pytest.fixture(scope="session")
def tiny_exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model in model/ and its exports vision/vision and text/qwen."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder / "model", seed=1)
    export_vision(folder / "model", folder / "vision" / "vision", engine="auto")
    export_language(folder / "model", folder / "text", "qwen", engine="auto")
    return folder
