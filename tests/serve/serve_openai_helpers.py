"""Helpers for tests of OpenAI's routes."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from serve_openai_engine import Engine, Images, NoLimits

from paddlemix_qwenvl_plugin.demo.questions import QUESTIONS
from paddlemix_qwenvl_plugin.serve.service import Service

NAME = "qwen-vl-chat"


@dataclass
class Server:
    """A running server with its components, the openai client and an HTTP client.

    The engine client, the image loader and the slot queue are the test doubles of serve_openai_engine.py.
    """

    url: str
    service: Service
    engine: Engine
    images: Images
    admission: NoLimits
    openai: openai.OpenAI
    http: httpx.Client

    def wait_until_idle(self) -> None:
        """Wait until the engine has no request and no slot is in use."""
        wait_for(lambda: self.engine.idle and not self.admission.slots_in_use)


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def image_part(path: Path) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(path)}}


def demo_question(name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A question of the demo in two forms: content of a message of OpenAI's API, and query parts for QwenVL.

    The query parts have images as bytes, which QwenVL names image-1, image-2 … in the prompt, as the server does. Paths
    would themselves be in the prompt.
    """
    (question,) = [question for question in QUESTIONS if question.name == name]
    text = question.turn.question
    content = [*map(image_part, question.images), {"type": "text", "text": text}]
    return content, [*({"image": path.read_bytes()} for path in question.images), {"text": text}]


def chat(server: Server, messages: Any, **parameters: Any) -> Any:
    """Request a chat completion."""
    return server.openai.chat.completions.create(model=NAME, messages=messages, **parameters)


def chat_chunks(server: Server, messages: Any, **parameters: Any) -> list[Any]:
    """The chunks of a streamed chat completion."""
    return list(chat(server, messages, stream=True, **parameters))


def text_of(chunks: list[Any], index: int = 0) -> str:
    """The text of one choice in a streamed chat completion."""
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def question(text: str) -> list[dict[str, str]]:
    """Messages of a chat: one user message with this text."""
    return [{"role": "user", "content": text}]
