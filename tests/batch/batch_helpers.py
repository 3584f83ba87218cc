"""Builders and readers of batch rows, and a model whose answers cost no computation."""

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
    """Build a row in OpenAI's format."""
    body = {"model": "m", "messages": messages, **body}
    return {"custom_id": row_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def user(*content: Any) -> dict[str, Any]:
    """Build a user message from a text, or from content parts, in which a string is the URL of an image."""
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": "user", "content": content[0]}
    parts = [
        {"type": "image_url", "image_url": {"url": part}} if isinstance(part, str) else part
        for part in content
    ]
    return {"role": "user", "content": parts}


def text(value: str) -> dict[str, str]:
    """Build a content part of text."""
    return {"type": "text", "text": value}


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write rows as lines of JSON; a row of type bytes is written verbatim."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of an output, without their `created` times."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    for row in rows:
        if row.get("response"):
            assert row["response"]["body"].pop("created") > 1_700_000_000  # seconds since 1970
    return rows


def run_job(source: Path, target: Path, model: QwenVL, window: int = 4, **options: Any) -> None:
    """Run a batch job with at most `window` concurrent rows, of at most 4 new tokens unless `options` differ."""
    defaults = GenerationOptions(**{"max_new_tokens": 4, **options})
    run(Source(source, defaults), target, model, window)


class CheapModel(QwenVL):
    """Tiny model whose answers are scripted: four letters, or three letters and a stop token.

    An answer depends only on a checksum of the prompt. `executor.prompts` lists the prompts in the order in which they
    were computed.
    """

    executor: Scripted

    def make_cheap(self) -> CheapModel:
        self.executor = Scripted(self, self._answer)
        self._loop = Loop(self.executor)
        return self

    def _answer(self, prompt: list[int]) -> list[int]:
        checksum = zlib.crc32(np.array(prompt, np.int64).tobytes())
        letters = [ord("a") + checksum // 26**n % 26 for n in range(4)]
        return [*letters[:3], self.tokenizer.eod_id] if checksum % 2 else letters


def open_cheap(folder: Path) -> CheapModel:
    model = CheapModel.from_exported(folder / "vision" / "vision", folder / "text" / "qwen")
    assert isinstance(model, CheapModel)
    return model.make_cheap()
