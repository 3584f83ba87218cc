"""Model folder of an upstream script: a path, or a community name that PaddleNLP downloads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Optional

from paddlemix_qwenvl_plugin.checkpoint.shards import WEIGHT_FILES, read_index
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, first_line

_COMMUNITY_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CLASS = "QWenLMHeadModel"  # of Qwen and Qwen-VL; only Qwen-VL has a section `visual`


def is_qwen_vl(name_or_path: str) -> bool:
    """Whether the config.json of a model folder or community name is that of a Qwen-VL model.

    Raises:
        QwenVLError: the config of a community name cannot be downloaded.
    """
    path: Optional[Path] = Path(name_or_path) / "config.json"
    if _is_community_name(name_or_path):
        # Upstream infers the model type from the name as well: without "qwen" in it, no download is needed.
        path = _download(name_or_path, "config.json") if "qwen" in name_or_path.lower() else None
    if path is None or not path.is_file():
        return False
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError:  # upstream reads it next and reports the error
        return False
    if not isinstance(config, dict) or "visual" not in config:
        return False
    return _CLASS in (config.get("architectures") or [_CLASS])  # a config without this key is accepted


def model_folder(name_or_path: str) -> Path:
    """Return a path as it is; resolve a community name such as qwen-vl/qwen-vl-7b-static to PaddleNLP's cache folder.

    Of the named model, config.json, generation_config.json, weights and vocabulary are downloaded unless cached.

    Raises:
        QwenVLError: no such model, or the download fails.
    """
    if not _is_community_name(name_or_path):
        return Path(name_or_path)
    config = _download(name_or_path, "config.json")
    weights = _download(name_or_path, *(name for name, _ in WEIGHT_FILES))
    if config is None or weights is None:
        missing = "config.json" if config is None else "weights"
        raise QwenVLError(f"{name_or_path}: neither a folder nor a model whose {missing} PaddleNLP finds")
    if weights.name.endswith(".index.json"):
        for file in sorted(set(read_index(weights).values())):
            if _download(name_or_path, file) is None:
                raise QwenVLError(f"{name_or_path}: {weights.name} names {file}, which is missing")
    for name in ("generation_config.json", "qwen.tiktoken"):
        _download(name_or_path, name)
    return config.parent


def _is_community_name(name_or_path: str) -> bool:
    return not Path(name_or_path).exists() and bool(_COMMUNITY_NAME.fullmatch(name_or_path))


def _download(repository: str, *names: str) -> Optional[Path]:
    """Download the first existing of these files into PaddleNLP's cache, unless it is cached."""
    from paddlenlp.utils.download import resolve_file_path

    try:
        path = resolve_file_path(repository, list(names))
    except OSError as error:  # PaddleNLP raises OSError for every download failure
        raise QwenVLError(f"{repository}: PaddleNLP cannot download it ({first_line(error)})") from error
    return Path(path) if path else None
