"""PaddleMIX's stock Predictor (deploy/qwen_vl/run_static_predict.py) on our exports.

It is written for one export: legacy programs of the 7B model on a GPU, in float16, with one picture. What it feeds is
brought into the shape that the exported program declares, whatever that is.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import paddle

from paddlemix_qwenvl_plugin.artifact.manifest import manifest_path
from paddlemix_qwenvl_plugin.checkpoint.config import is_chat_model
from paddlemix_qwenvl_plugin.engine.gpu import gpu_index
from paddlemix_qwenvl_plugin.runtime.programs import Stage, stage_prefix
from paddlemix_qwenvl_plugin.runtime.real_time_save import write_tokens
from paddlemix_qwenvl_plugin.upstream.patching import replace
from paddlemix_qwenvl_plugin.util import env
from paddlemix_qwenvl_plugin.util.errors import make_folder
from paddlemix_qwenvl_plugin.util.machine import gpus
from paddlemix_qwenvl_plugin.util.notice import notice

# Places in the stock inputs (artifact/contract.py).
_INPUT_IDS, _FEATURES, _IMG_POS, _MASK, _EOS, _TGT_MASK, _STOP_NUMS, _CACHES = 0, 1, 2, 3, 12, 19, 21, 22


def adapt(predictor_class: type, script: ModuleType) -> None:
    """Make the script's Predictors open our exports; those of others they open as before.

    Args:
        predictor_class: its objects have `args`, `tokenizer` and `processor` when they call `create_predictor`.
        script: has the reader of token files, which is pointed at this process's own folder.
    """

    def opening_ours(upstream: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(upstream)
        def create_predictor(self: Any, model_path: str) -> Any:
            if not manifest_path(stage_prefix(model_path)).is_file():
                return upstream(self, model_path)
            if model_path == self.args.first_model_path:
                stage = _stage(model_path, "vision", self.args.device)
                size = stage.manifest.config.visual.image_size
                self.processor.image_processor.image_size = (size, size)
                return ImageEncoder(stage)
            replace(script, "load_real_time_tokens", _reading_own_folder)
            return LanguageModel(
                _stage(model_path, "language", self.args.device),
                self.tokenizer,
                Path(self.args.model_name_or_path),
            )

        return create_predictor

    replace(predictor_class, "create_predictor", opening_ours)
    if getattr(script, "paddle", None) is paddle:
        replace(script, "paddle", _OlderPaddle)


class _OlderPaddle:
    """Paddle as the script knows it: `where(condition)` gave columns, which it puts side by side."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def where(self, *args: Any, **kwargs: Any) -> Any:
        """paddle.where."""
        found = self._module.where(*args, **kwargs)
        return tuple(index.reshape([-1, 1]) for index in found) if isinstance(found, (list, tuple)) else found


class ImageEncoder:
    """Stage 1 with the `run` of a Paddle Inference predictor."""

    def __init__(self, stage: Stage) -> None:
        self._program = stage.open()

    def run(self, inputs: list[Any]) -> list[Any]:
        """Images [N, 3, size, size] -> [features float32 [N, n_queries, H]]."""
        return self._program([inputs[0].astype("float32")])


class LanguageModel:
    """Stage 2 with the `run` of a Paddle Inference predictor; its tokens go where the script's reader looks."""

    def __init__(self, stage: Stage, tokenizer: Any, model: Path) -> None:
        self._config = stage.manifest.config
        self._dtype = stage.manifest.dtype
        self._program = stage.open()
        self._end = int(tokenizer.eod_id)
        self._turn_ends = [int(tokenizer.im_end_id), int(tokenizer.im_start_id)]
        self._is_chat_model = is_chat_model(model) or is_chat_model(stage.prefix.parent)

    def run(self, inputs: list[Any]) -> list[Any]:
        """Generate from the stock inputs, and write the tokens as real_time_save files.

        Returns:
            The outputs of the program.
        """
        outputs = self._program(self._as_declared(inputs))
        write_tokens(_own_folder(), outputs[-1].numpy().tolist(), self._end)
        return outputs

    def _as_declared(self, inputs: list[Any]) -> list[Any]:
        """The script's inputs in the program's dtypes and sizes.

        The script takes the number of pictures for that of rows, writes the caches of the 7B model, and ends at the
        end-of-text token of the real vocabulary only.
        """
        ids = inputs[_INPUT_IDS]
        n_rows = ids.shape[0]
        feed = [
            tensor[:n_rows] if place > _IMG_POS and place not in (_EOS, _STOP_NUMS) else tensor
            for place, tensor in enumerate(inputs[:_CACHES])
        ]
        feed[_FEATURES] = feed[_FEATURES].astype("float32")
        if feed[_IMG_POS] is None:  # a prompt without a picture
            feed[_IMG_POS] = paddle.to_tensor([[-1, 0, 0]], dtype="int64")
        for mask in (_MASK, _TGT_MASK):
            feed[mask] = feed[mask].astype(self._dtype)
        feed[_EOS] = paddle.to_tensor(self._ends(ids), dtype="int64")
        feed[_STOP_NUMS] = paddle.to_tensor([n_rows], dtype="int64")
        max_len = inputs[_MASK].shape[-1]
        cache = [2, n_rows, self._config.num_attention_heads, max_len, self._config.head_dim]
        feed += [self._program.zeros(cache, self._dtype) for _ in range(self._config.num_hidden_layers)]
        return feed

    def _ends(self, ids: Any) -> list[int]:
        chat = self._is_chat_model or bool((ids == self._turn_ends[1]).any())
        return [self._end, *(self._turn_ends if chat else [])]


def _stage(path: str, stage: str, asked: str) -> Stage:
    """The stage on QWENVL_DEVICE, else on what the script was asked for, or by default asks for, which is a GPU."""
    device = env.DEVICE.read()
    if device is not None:
        gpu_index(device, env.DEVICE.name)  # names the variable where it is wrong
    elif asked == "gpu" and not gpus():
        notice("--device gpu: there is no GPU here, running on the CPU")
        device = "cpu"
    opened = Stage(path, stage, device or asked)
    if opened.gpu is None or opened.engine:
        paddle.set_device("cpu")  # a GPU build of Paddle would make the script's tensors on the GPU
    return opened


@functools.cache
def _own_folder() -> Path:
    """Where this process puts its token files: two in one working directory would read each other's."""
    named = env.REAL_TIME_SAVE_DIR.read()
    if named:
        folder = named.absolute()
        make_folder(folder)
    else:
        folder = Path(tempfile.mkdtemp(prefix="qwenvl-real-time-save-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[env.REAL_TIME_SAVE_DIR.name] = str(folder)  # a patched reader (patches/) looks there
    return folder


def _reading_own_folder(reader: Callable[[], Any]) -> Callable[[], Any]:
    """The script's reader of token files, which looks in the working directory, made to look in our folder."""

    @functools.wraps(reader)
    def read() -> Any:
        with _working_in(_own_folder()):
            return reader()

    return read


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
