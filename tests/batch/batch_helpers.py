"""Rows of batch files, and a model whose answers cost nothing."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix_qwenvl_plugin.batch.job import run
from paddlemix_qwenvl_plugin.batch.source import Source
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

REPO = Path(__file__).resolve().parents[2]
STREET = REPO / "recipes" / "pictures" / "street.png"


def openai_row(row_id: Any, messages: Any, **body: Any) -> dict[str, Any]:
    """A row in OpenAI's form."""
    body = {"model": "m", "messages": messages, **body}
    return {"custom_id": row_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def user(*content: Any) -> dict[str, Any]:
    """A message of the user: a text, or parts in which a string is a picture's address."""
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": "user", "content": content[0]}
    parts = [{"type": "image_url", "image_url": {"url": c}} if isinstance(c, str) else c for c in content]
    return {"role": "user", "content": parts}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def write_rows(path: Path, rows: list[Any]) -> Path:
    """`rows` as lines; bytes stay as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an output, without the time of day."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    for row in rows:
        if row.get("response"):
            assert row["response"]["body"].pop("created") > 1_700_000_000
    return rows


def run_job(source: Path, target: Path, model: QwenVL, batch_size: int = 4, **options: Any) -> None:
    chosen = GenerationOptions(**options)
    run(Source(source, asdict(chosen)), target, model, chosen, batch_size)


class CheapModel(QwenVL):
    """The tiny model, but each answer is three tokens that depend on the row's own ids alone.

    `runs` has the lengths of the rows of each batch.
    """

    def make_cheap(self) -> CheapModel:
        self.runs: list[list[int]] = []
        return self

    def generate_ids(
        self,
        input_ids: Any,
        features: Any = None,
        *,
        lengths: Any = None,
        eos_token_ids: Any = None,
        **_: Any,
    ) -> list[list[int]]:
        assert len(input_ids) == len(lengths)
        self.runs.append(list(lengths))
        answers = []
        for row, length in zip(np.asarray(input_ids), lengths):
            seed = zlib.crc32(row[:length].tobytes())
            tokens = [97 + seed % 26, 97 + seed // 26 % 26, 97 + seed // 676 % 26]
            answers.append([*tokens, eos_token_ids[0]] if seed % 2 else tokens)
        return answers

    def encode_images(self, pixels: Any) -> Any:
        return np.zeros([len(pixels), 256, self.config.hidden_size], np.float32)


def open_cheap(folder: Path) -> CheapModel:
    model = CheapModel.from_exported(folder / "vision" / "vision", folder / "text" / "qwen")
    assert isinstance(model, CheapModel)
    return model.make_cheap()
