"""Rows of batch files, and a model with cheap answers."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from executors import Scripted

from paddlemix_qwenvl_plugin.batch.job import run
from paddlemix_qwenvl_plugin.batch.source import Source
from paddlemix_qwenvl_plugin.runtime.loop import Loop
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

REPO = Path(__file__).resolve().parents[2]
STREET = REPO / "recipes" / "images" / "street.png"


def openai_row(row_id: Any, messages: Any, **body: Any) -> dict[str, Any]:
    """Row in OpenAI's format."""
    body = {"model": "m", "messages": messages, **body}
    return {"custom_id": row_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def user(*content: Any) -> dict[str, Any]:
    """User message: a text, or parts in which a string is the URL of an image."""
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": "user", "content": content[0]}
    parts = [{"type": "image_url", "image_url": {"url": c}} if isinstance(c, str) else c for c in content]
    return {"role": "user", "content": parts}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Serialize `rows` as lines; bytes are copied verbatim."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of an output without the `created` times."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    for row in rows:
        if row.get("response"):
            assert row["response"]["body"].pop("created") > 1_700_000_000
    return rows


def run_job(source: Path, target: Path, model: QwenVL, window: int = 4, **options: Any) -> None:
    chosen = GenerationOptions(**{"max_new_tokens": 4, **options})
    run(Source(source, chosen), target, model, window)


class CheapModel(QwenVL):
    """The tiny model, but each answer is three letters and a stop token, or four letters, by the prompt alone.

    `executor.prompts` has the prompts in the order of their first token.
    """

    executor: Scripted

    def make_cheap(self) -> CheapModel:
        self.executor = Scripted(self, self._answer)
        self._loop = Loop(self.executor)
        return self

    def _answer(self, prompt: list[int]) -> list[int]:
        seed = zlib.crc32(np.array(prompt, np.int64).tobytes())
        letters = [97 + seed // 26**n % 26 for n in range(4)]
        return [*letters[:3], self.tokenizer.eod_id] if seed % 2 else letters


def open_cheap(folder: Path) -> CheapModel:
    model = CheapModel.from_exported(folder / "vision" / "vision", folder / "text" / "qwen")
    assert isinstance(model, CheapModel)
    return model.make_cheap()
