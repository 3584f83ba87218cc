"""The model folder that an upstream script means: a folder, or a community name that PaddleNLP downloads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Optional

from paddlemix_qwenvl_plugin.checkpoint.shards import WEIGHT_FILES, read_index
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, first_line

_COMMUNITY_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CLASS = "QWenLMHeadModel"  # both language-only Qwen and Qwen-VL; the latter has a section `visual`


def is_qwen_vl(name_or_path: str) -> bool:
    """Whether the config.json of a model folder, or of a community name, is that of a Qwen-VL model.

    Raises:
        QwenVLError: no way to the model of a community name.
    """
    path: Optional[Path] = Path(name_or_path) / "config.json"
    if _is_community_name(name_or_path):
        # Upstream reads the model's kind off the name as well: one without it is no reason to ask the network.
        path = _download(name_or_path, "config.json") if "qwen" in name_or_path.lower() else None
    if path is None or not path.is_file():
        return False
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError:  # upstream reads it next, and says what is wrong
        return False
    if not isinstance(config, dict) or "visual" not in config:
        return False
    return _CLASS in (config.get("architectures") or [_CLASS])


def model_folder(name_or_path: str) -> Path:
    """A path as it is; of a community name, such as qwen-vl/qwen-vl-7b-static, the folder of PaddleNLP's cache.

    Downloads what is not in the cache: the config, the weights, the vocabulary.

    Raises:
        QwenVLError: no such model, or no way to it.
    """
    if not _is_community_name(name_or_path):
        return Path(name_or_path)
    config = _download(name_or_path, "config.json")
    weights = _download(name_or_path, *(name for name, _ in WEIGHT_FILES))
    if config is None or weights is None:
        what = "config.json" if config is None else "weights"
        raise QwenVLError(f"{name_or_path}: neither a folder nor a model that PaddleNLP finds {what} of")
    if weights.name.endswith(".index.json"):
        for file in sorted(set(read_index(weights).values())):
            if _download(name_or_path, file) is None:
                raise QwenVLError(f"{name_or_path}: {weights.name} names {file}, which is not there")
    for name in ("generation_config.json", "qwen.tiktoken"):
        _download(name_or_path, name)
    return config.parent


def _is_community_name(name_or_path: str) -> bool:
    return not Path(name_or_path).exists() and bool(_COMMUNITY_NAME.fullmatch(name_or_path))


def _download(repository: str, *names: str) -> Optional[Path]:
    """The first of these files that there is, downloaded into PaddleNLP's cache unless it is there."""
    from paddlenlp.utils.download import resolve_file_path

    try:
        found = resolve_file_path(repository, list(names))
    except OSError as error:  # PaddleNLP's word for every trouble on the way
        raise QwenVLError(f"{repository}: PaddleNLP cannot download it ({first_line(error)})") from error
    return Path(found) if found else None
