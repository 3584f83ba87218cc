"""Random requests of OpenAI's API, with the answers that QwenVL generates without a server."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_openai_helpers import NAME, data_url

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.demo.questions import IMAGES, QUESTIONS
from paddlemix_qwenvl_plugin.demo.questions import Question as DemoQuestion

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

_TEXTS = (
    "What is on the left of the red ball?",
    "Tell me a long story about two squares and a dog.",
    "几个蓝色的球?",
    "How many things are there, and what are their colours? Name them one by one, from left to right.",
)


@dataclass
class Question:
    """Request with its expected answer.

    Attributes:
        path: path of the request.
        body: body of the request, without the parameter `stream`.
        texts: the expected text of each choice.
        finish_reasons: the expected finish reason of each choice.
    """

    path: str
    body: dict[str, Any]
    texts: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)


def questions(local_model: QwenVL, n: int, seed: int = 1) -> list[Question]:
    """Make `n` questions with their answers; the same for the same seed."""
    requests = _random_requests(random.Random(seed))
    return [_with_answer(local_model, *next(requests)) for _ in range(n)]


# Path of the request; content of its message or prompt; the same content as query parts for QwenVL.
_Content = tuple[str, list[dict[str, Any]], list[dict[str, Any]]]


def _random_requests(rng: random.Random) -> Iterator[tuple[_Content, dict[str, Any]]]:
    """Generate content and parameters of requests without end."""
    kinds = [_demo, _demo, _text, _text, _image_and_text]
    while True:
        for make_content in kinds:
            parameters: dict[str, Any] = {"max_tokens": rng.randrange(1, 120)}
            if rng.random() < 0.5:
                parameters.update(temperature=1.1, top_p=0.95, seed=rng.randrange(2**63))
                if rng.random() < 0.5:
                    parameters["n"] = 2
            if rng.random() < 0.3:
                parameters["stop"] = rng.sample(["e", " the", "ll", ").", "红", "</ref>", "<box>"], 2)
            if rng.random() < 0.2:
                parameters["presence_penalty"] = 0.5
            if rng.random() < 0.2:
                parameters["logprobs"] = True
            content = make_content(rng)
            path = content[0]
            if path == COMPLETIONS and parameters.pop("logprobs", None):
                parameters["logprobs"] = 1  # a number in completions, a boolean in chats
            yield content, parameters


def _demo(rng: random.Random) -> _Content:
    question: DemoQuestion = rng.choice(QUESTIONS)
    path = CHAT if question.sample.form == "chat" else COMPLETIONS
    return path, *_image_text_parts(question.images, question.turn.question)


def _text(rng: random.Random) -> _Content:
    return CHAT, *_image_text_parts([], rng.choice(_TEXTS))


def _image_and_text(rng: random.Random) -> _Content:
    return CHAT, *_image_text_parts([rng.choice(sorted(IMAGES.glob("*.png")))], rng.choice(_TEXTS))


def _image_text_parts(images: Sequence[Path], text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Images and a text as parts of OpenAI's API, and as parts for QwenVL."""
    api_images = [{"type": "image_url", "image_url": {"url": data_url(path)}} for path in images]
    query_images = [{"image": path.read_bytes()} for path in images]
    return [*api_images, {"type": "text", "text": text}], [*query_images, {"text": text}]


def _with_answer(local_model: QwenVL, request: _Content, parameters: dict[str, Any]) -> Question:
    path, content, parts = request
    if path == CHAT:
        prompt: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
    else:
        prompt = {"prompt": content}
    question = Question(path, {"model": NAME, **prompt, **parameters})
    names = ("temperature", "top_p", "presence_penalty")
    options = {name: parameters[name] for name in names if name in parameters}
    for index in range(parameters.get("n", 1)):
        if "seed" in parameters:
            options["seed"] = (parameters["seed"] + (index << 40)) % 2**64  # the server's seed of this choice
        answer = local_model.generate(
            parts, chat=path == CHAT, max_new_tokens=parameters["max_tokens"], **options
        )
        text, stopped = _text_before_stop(answer.text, parameters.get("stop", ()))
        question.texts.append(text)
        question.finish_reasons.append("stop" if stopped else answer.finish_reason)
    return question


def _text_before_stop(text: str, stop_strings: Sequence[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, and whether there is one.

    Of several that are complete at the same character, the longest one counts.
    """
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stop_strings if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False
