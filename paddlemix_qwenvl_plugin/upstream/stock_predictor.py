"""PaddleMIX's stock Predictor (deploy/qwen_vl/run_static_predict.py) on our exports.

Upstream wrote it for one export: legacy programs of the 7B model on a GPU, in float16, with one image. The inputs
that the Predictor passes are converted to the shapes and dtypes that the exported program declares.
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

# Indices of stock inputs (artifact/contract.py).
_INPUT_IDS, _FEATURES, _IMG_POS, _MASK, _EOS, _TGT_MASK, _STOP_NUMS, _CACHES = 0, 1, 2, 3, 12, 19, 21, 22


def adapt(predictor_class: type, script: ModuleType) -> None:
    """Make the script's Predictor open our exports; other exports are opened as before.

    Args:
        predictor_class: the Predictor; its objects have `args`, `tokenizer` and `processor` when they call
            `create_predictor`.
        script: the script's module; its reader of token files is redirected to `_token_folder`.
    """

    def open_our_exports(upstream: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(upstream)
        def create_predictor(self: Any, model_path: str) -> Any:
            if not manifest_path(stage_prefix(model_path)).is_file():
                return upstream(self, model_path)
            if model_path == self.args.first_model_path:
                stage = _stage(model_path, "vision", self.args.device)
                size = stage.manifest.config.visual.image_size
                self.processor.image_processor.image_size = (size, size)
                return ImageEncoder(stage)
            replace(script, "load_real_time_tokens", _reading_token_folder)
            return LanguageModel(
                _stage(model_path, "language", self.args.device),
                self.tokenizer,
                Path(self.args.model_name_or_path),
            )

        return create_predictor

    replace(predictor_class, "create_predictor", open_our_exports)
    if getattr(script, "paddle", None) is paddle:
        replace(script, "paddle", _OlderPaddle)


class _OlderPaddle:
    """Proxy of Paddle with the old `where(condition)`: the script expects indices of shape [n, 1] from it."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def where(self, *args: Any, **kwargs: Any) -> Any:
        """Call paddle.where; if it returns indices (no x and y given), reshape each tensor to [n, 1]."""
        result = self._module.where(*args, **kwargs)
        if isinstance(result, (list, tuple)):
            return tuple(indices.reshape([-1, 1]) for indices in result)
        return result


class ImageEncoder:
    """The vision stage with the interface of a Paddle Inference predictor."""

    def __init__(self, stage: Stage) -> None:
        self._program = stage.open()

    def run(self, inputs: list[Any]) -> list[Any]:
        """Encode images [N, 3, size, size] -> [features float32 [N, n_queries, hidden size]]."""
        return self._program([inputs[0].astype("float32")])


class LanguageModel:
    """The language stage with the interface of a Paddle Inference predictor; writes tokens for the script's reader."""

    def __init__(self, stage: Stage, tokenizer: Any, model: Path) -> None:
        self._config = stage.manifest.config
        self._dtype = stage.manifest.dtype
        self._program = stage.open()
        self._eod_id = int(tokenizer.eod_id)
        self._turn_stop_token_ids = [int(tokenizer.im_end_id), int(tokenizer.im_start_id)]
        self._is_chat_model = is_chat_model(model) or is_chat_model(stage.prefix.parent)

    def run(self, inputs: list[Any]) -> list[Any]:
        """Generate from the stock inputs, and write the tokens to files real_time_save.*, which the script reads.

        Returns:
            Outputs of the program.
        """
        outputs = self._program(self._convert_inputs(inputs))
        write_tokens(_token_folder(), outputs[-1].numpy().tolist(), self._eod_id)
        return outputs

    def _convert_inputs(self, inputs: list[Any]) -> list[Any]:
        """Convert the script's inputs to the program's dtypes and sizes.

        The script uses the number of images as the number of rows, allocates the caches of the 7B model, and its only
        stop token is the end-of-text token of the real vocabulary.
        """
        ids = inputs[_INPUT_IDS]
        n_rows = ids.shape[0]
        feed = [
            tensor[:n_rows] if index > _IMG_POS and index not in (_EOS, _STOP_NUMS) else tensor
            for index, tensor in enumerate(inputs[:_CACHES])
        ]
        feed[_FEATURES] = feed[_FEATURES].astype("float32")
        if feed[_IMG_POS] is None:  # a prompt without an image
            feed[_IMG_POS] = paddle.to_tensor([[-1, 0, 0]], dtype="int64")
        for mask in (_MASK, _TGT_MASK):
            feed[mask] = feed[mask].astype(self._dtype)
        feed[_EOS] = paddle.to_tensor(self._stop_token_ids(ids), dtype="int64")
        feed[_STOP_NUMS] = paddle.to_tensor([n_rows], dtype="int64")
        max_len = inputs[_MASK].shape[-1]
        cache = [2, n_rows, self._config.num_attention_heads, max_len, self._config.head_dim]
        feed += [self._program.zeros(cache, self._dtype) for _ in range(self._config.num_hidden_layers)]
        return feed

    def _stop_token_ids(self, ids: Any) -> list[int]:
        # A prompt with <|im_start|> has the chat form, even if the checkpoint does not declare a chat model.
        chat = self._is_chat_model or bool((ids == self._turn_stop_token_ids[1]).any())
        return [self._eod_id, *(self._turn_stop_token_ids if chat else [])]


def _stage(path: str, stage: str, script_device: str) -> Stage:
    """Open a stage on QWENVL_DEVICE, else on the script's `--device`.

    The flag's default is gpu, which is replaced by cpu, with a notice, if there is no GPU.
    """
    device = env.DEVICE.read()
    if device is not None:
        gpu_index(device, env.DEVICE.name)  # raises an error that names the variable
    elif script_device == "gpu" and not gpus():
        notice("--device gpu: no GPU found, running on the CPU")
        device = "cpu"
    opened = Stage(path, stage, device or script_device)
    if opened.gpu is None or opened.engine:
        paddle.set_device("cpu")  # else a GPU build of Paddle creates the script's tensors on the GPU
    return opened


@functools.cache
def _token_folder() -> Path:
    """Folder of token files: QWENVL_REAL_TIME_SAVE_DIR, else a temporary folder of this process.

    The script itself uses the working directory, where processes would read each other's files.
    """
    configured = env.REAL_TIME_SAVE_DIR.read()
    if configured:
        folder = configured.absolute()
        make_folder(folder)
    else:
        folder = Path(tempfile.mkdtemp(prefix="qwenvl-real-time-save-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[env.REAL_TIME_SAVE_DIR.name] = str(folder)  # read by the patched reader (patches/)
    return folder


def _reading_token_folder(reader: Callable[[], Any]) -> Callable[[], Any]:
    """Wrap the script's reader of token files, which reads the working directory, to read this process's folder."""

    @functools.wraps(reader)
    def read() -> Any:
        with _working_directory(_token_folder()):
            return reader()

    return read


@contextlib.contextmanager
def _working_directory(folder: Path) -> Iterator[None]:
    previous = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(previous)
