"""Prompts of Qwen-VL's official evaluation, in which text directly follows the image, and their answers."""

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
    """Prompt `<img>…</img>` + `before` + `words` + `after`, with tags in `words`, such as a data set's, as plain text.

    The parts are tokenized separately. Where `words` is preceded or followed by text, such as " Answer:", this text is
    in `words` as well: in `before` or `after`, its tokens could differ from the official ones.
    """

    image: str
    words: str
    before: str = ""
    after: str = ""


def prompt_ids(tokenizer: QwenTokenizer, question: Question) -> list[int]:
    """Encode a prompt without `Picture 1:` and without a line end, as the official evaluation does.

    The image's name is a placeholder: the model sees the image features in its place.
    """
    return [
        *tokenizer.encode(f"<img>image</img>{question.before}"),
        *tokenizer.encode(question.words, allowed_special=()),
        *tokenizer.encode(question.after),
    ]


def answers(model: QwenVL, questions: Iterable[Question], options: GenerationOptions) -> Iterator[str]:
    """Generate the answers to the questions, in their order, without the stop token.

    The end of a turn also stops an answer: a chat model may generate it where the base model ends its text.

    Raises:
        UsageError, QwenVLError: an image cannot be loaded, or a prompt leaves no room for a completion.
    """
    streams = (_start(model, question, options) for question in questions)
    return (answer.text for answer in model.finish_all(streams))


def _start(model: QwenVL, question: Question, options: GenerationOptions) -> AnswerStream:
    tokenizer = model.tokenizer
    images = model.load_images([question.image])
    prompt = Prompt(prompt_ids(tokenizer, question), [question.image])
    inputs = model.image_inputs(images)
    return model.start(prompt, inputs, tokenizer.chat_stop_token_ids, options, images[0].size)
