"""Random requests with QwenVL's own answers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
    """A request, and its answer.

    Attributes:
        path: of the request.
        body: without `stream`.
        texts: of its choices, as QwenVL generates them without a server.
        reasons: why each ends.
    """

    path: str
    body: dict[str, Any]
    texts: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def questions(local_model: QwenVL, n: int, seed: int = 1) -> list[Question]:
    """N questions with their answers; the same for the same seed."""
    rng = random.Random(seed)
    made = _made(rng)
    return [_answered(local_model, *next(made)) for _ in range(n)]


def _made(rng: random.Random) -> Iterator[tuple[list[Any], list[Any], str, dict[str, Any]]]:
    """Content of a request, parts for QwenVL, path, parameters."""
    kinds = [_demo, _demo, _text, _text, _image_and_text]
    while True:
        for make in kinds:
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
            path, content, parts = make(rng)
            if path == COMPLETIONS and parameters.pop("logprobs", None):
                parameters["logprobs"] = 1
            yield content, parts, path, parameters


_Made = tuple[str, list[dict[str, Any]], list[dict[str, Any]]]


def _demo(rng: random.Random) -> _Made:
    question: DemoQuestion = rng.choice(QUESTIONS)
    path = CHAT if question.sample.form == "chat" else COMPLETIONS
    return path, *_content(question.images, question.turn.question)


def _text(rng: random.Random) -> _Made:
    return CHAT, *_content([], rng.choice(_TEXTS))


def _image_and_text(rng: random.Random) -> _Made:
    return CHAT, *_content([rng.choice(sorted(IMAGES.glob("*.png")))], rng.choice(_TEXTS))


def _content(images: Sequence[Any], text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    asked = [{"type": "image_url", "image_url": {"url": data_url(path)}} for path in images]
    given = [{"image": path.read_bytes()} for path in images]
    return [*asked, {"type": "text", "text": text}], [*given, {"text": text}]


def _answered(
    local_model: QwenVL, content: list[Any], parts: list[Any], path: str, parameters: dict[str, Any]
) -> Question:
    asked = {"messages": [{"role": "user", "content": content}]} if path == CHAT else {"prompt": content}
    question = Question(path, {"model": NAME, **asked, **parameters})
    names = ("temperature", "top_p", "presence_penalty")
    options = {name: parameters[name] for name in names if name in parameters}
    for number in range(parameters.get("n", 1)):
        if "seed" in parameters:
            options["seed"] = (parameters["seed"] + (number << 40)) % 2**64
        answer = local_model.generate(
            parts, chat=path == CHAT, max_new_tokens=parameters["max_tokens"], **options
        )
        text, stopped = _cut(answer.text, parameters.get("stop", ()))
        question.texts.append(text)
        question.reasons.append("stop" if stopped else answer.finish_reason)
    return question


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Cut a text at its first complete stop string, the longest of several; return whether one was found."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False
