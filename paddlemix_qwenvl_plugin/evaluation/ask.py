"""Ask a model in the prompts of Qwen-VL's own evaluation: the image, and the question right behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from paddlemix_qwenvl_plugin.processing.prompts import Prompt
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL
from paddlemix_qwenvl_plugin.runtime.stream import AnswerStream


@dataclass(frozen=True)
class Question:
    """`<img>…</img>`, then `before`, `words` and `after`. Tags in `words`, which a data set brings, are plain text."""

    image: str
    words: str
    before: str = ""
    after: str = ""


def prompt_ids(tokenizer: QwenTokenizer, question: Question) -> list[int]:
    """The ids of a prompt. There is no `Picture 1:` and no line end, as in the official evaluation.

    The image's name is a made-up one: the model sees the image's features in its place.
    """
    return [
        *tokenizer.encode(f"<img>image</img>{question.before}"),
        *tokenizer.encode(question.words, allowed_special=()),
        *tokenizer.encode(question.after),
    ]


def answers(model: QwenVL, questions: Iterable[Question], options: GenerationOptions) -> Iterator[str]:
    """The answer to each question, without the stop token.

    A turn's end ends an answer as well, since a chat model may say so where the base model ends its text.

    Raises:
        UsageError, QwenVLError: an image cannot be loaded, or a prompt leaves no room for an answer.
    """
    return (answer.text for answer in model.finish_all(_start(model, each, options) for each in questions))


def _start(model: QwenVL, question: Question, options: GenerationOptions) -> AnswerStream:
    tokenizer = model.tokenizer
    images = model.load_images([question.image])
    prompt = Prompt(prompt_ids(tokenizer, question), [question.image])
    inputs = model.image_inputs(images)
    return model.start(prompt, inputs, tokenizer.chat_stop_token_ids, options, images[0].size)
