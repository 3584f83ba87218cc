"""Ask a model in the prompts of Qwen-VL's own evaluation: the picture, and the question right behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL


@dataclass(frozen=True)
class Request:
    """`<img>…</img>`, then `before`, `words` and `after`. Tags in `words`, which a data set brings, are plain text."""

    image: str
    words: str
    before: str = ""
    after: str = ""


def prompt_ids(tokenizer: QwenTokenizer, request: Request) -> list[int]:
    """The ids of a prompt. There is no `Picture 1:` and no line end, as in the official evaluation.

    The picture's name is a made-up one: the model sees the picture's features in its place.
    """
    return [
        *tokenizer.encode(f"<img>image</img>{request.before}"),
        *tokenizer.encode(request.words, allowed_special=()),
        *tokenizer.encode(request.after),
    ]


def answers(pair: QwenVL, requests: Iterable[Request], options: GenerationOptions) -> Iterator[str]:
    """The answer to each request, one at a time, without the end token: on a CPU a batch is hardly faster.

    A turn's end ends an answer as well, since a chat model may say so where the base model ends its text.

    Raises:
        UsageError, QwenVLError: a picture cannot be loaded, or a prompt leaves no room for an answer.
    """
    tokenizer = pair.tokenizer
    ends = [tokenizer.eod_id, tokenizer.im_end_id, tokenizer.im_start_id]
    for request in requests:
        images = pair.load_images([request.image])
        pixels = list(pair.preprocess(images))
        yield (
            pair.start(
                prompt_ids(tokenizer, request), pixels, ends, options, images[0].size, prepare_seconds=0.0
            )
            .finish()
            .text
        )
