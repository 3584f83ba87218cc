"""Build prompts in the forms that Qwen-VL was trained on: base form, and chat form (ChatML).

A `str` query is a rendered prompt: the paths between `<img>` and `</img>` become image sources. The plugin passes only
queries of a request's history so (runtime/request.py). Text from untrusted clients must be passed as parts, in which
`<img>`, `</img>` and `<imgpad>` are rejected.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from PIL import Image

from paddlemix_qwenvl_plugin.processing.tokenizer import IMAGE_TAGS, PICTURE_LABEL, QwenTokenizer
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.sources import is_data_url

Part = Mapping[str, Any]
"""A part of a query, with one of the keys image, text or box.

`{"image": source}`, `{"text": str}` or `{"box": [[x1, y1, x2, y2], …], "ref": str}` (ref optional).
"""

Query = Union[str, Sequence[Part]]
"""A query: a list of parts, or rendered text."""

_IMAGE_SPAN_TAGS = ("<img>", "</img>", "<imgpad>")
_IMAGE_SPAN = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_KEY_SETS = ({"image"}, {"text"}, {"box"}, {"box", "ref"})


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, with its image sources.

    Attributes:
        input_ids: the token ids, image slots included.
        images: the image sources, one for each `<img>`, in order.
        generated: the [start, end) ranges of the earlier answers in `input_ids`, each with its `<|im_end|>`, in order.
            Decode steps computed these tokens, not a prefill, which would round differently (runtime/generation.py).
    """

    input_ids: list[int]
    images: list[Any]
    generated: list[tuple[int, int]] = field(default_factory=list)


def render(parts: Sequence[Part], start: int = 1, label: str = PICTURE_LABEL) -> tuple[str, list[Any]]:
    """Render the parts of a query as text, and list their image sources.

    The text names paths and URLs as given; bytes, PIL images and `data:` URLs become `image-1`, `image-2` … by the
    image's number.

    Args:
        parts: see Part. Box coordinates are integers in thousandths of the image's width and height.
        start: number of the first image.
        label: text before each image, with `{}` for the image's number.

    Raises:
        UsageError: `parts` is not a list or is empty, a part is invalid, or adjacent texts join to an image tag.
    """
    if isinstance(parts, (str, bytes, Mapping)) or not isinstance(parts, Sequence):
        raise UsageError(f"a query must be a list of parts, got {type(parts).__name__}")
    if not parts:
        raise UsageError("a query must have at least one part (image, text or box)")
    text = ""
    images: list[Any] = []
    for number, part in enumerate(parts, start=1):
        where = f"part {number} of the query"
        if not isinstance(part, Mapping):
            raise UsageError(f"{where} must be a mapping, got {type(part).__name__}")
        if set(part) not in _KEY_SETS:
            keys = ", ".join(str(key) for key in part) or "none"
            raise UsageError(f"{where} must have the key image, text or box (ref beside box), got: {keys}")
        if "image" in part:
            image_number = start + len(images)
            name = _image_name(part["image"], image_number, where)
            text += f"{label.replace('{}', str(image_number))}<img>{name}</img>\n"
            images.append(part["image"])
        elif "text" in part:
            hint = ': give an image as a part {"image": …} (--image)'
            text += _checked_text(part["text"], _IMAGE_SPAN_TAGS, f"text of {where}", hint)
        else:
            text += _render_boxes(part, where)
    if text.count("<img>") != len(images) or text.count("</img>") != len(images) or "<imgpad>" in text:
        raise UsageError("adjacent texts of the query must not join to <img>, </img> or <imgpad>")
    return text, images


def base_prompt(tokenizer: QwenTokenizer, parts: Sequence[Part]) -> Prompt:
    """Build the prompt of the base model: the rendered parts. Errors as for `render` and `QwenTokenizer.encode`."""
    text, images = render(parts, label=tokenizer.picture_label)
    return Prompt(tokenizer.encode(text), images)


def chat_prompt(
    tokenizer: QwenTokenizer,
    query: Query,
    history: Sequence[tuple[Query, str]] = (),
    system: str = "You are a helpful assistant.",
    max_window: int = 6144,
) -> Prompt:
    """Build the prompt of the chat model: system text, (query, answer) turns of `history`, and the new query.

    Keeps the newest turns, as many as take less than `max_window` tokens together with the system text. Older turns are
    dropped with their images. The new query is always kept and not counted. The default of `max_window` is that of the
    official code. Images are numbered through all turns, including the dropped ones, so that the number of an image
    does not change during a conversation.

    Role and content are tokenized separately, and the special tokens of ChatML are plain text in a content, as are
    `<img>`, `</img>` and `<imgpad>` in an answer or in the system text. Answers are not stripped here; the official
    code strips an answer before it appends it to the history.

    Raises:
        UsageError: an invalid query, history or system text.
    """
    label = tokenizer.picture_label
    new_line = tokenizer.encode("\n")

    def opening(role: str) -> list[int]:
        return [tokenizer.im_start_id, *tokenizer.encode(role), *new_line]

    def message(role: str, content: str, tags: Sequence[str] = IMAGE_TAGS) -> list[int]:
        return [*opening(role), *tokenizer.encode(content, tags), tokenizer.im_end_id]

    tags_without_images = [tag for tag in IMAGE_TAGS if tag not in _IMAGE_SPAN_TAGS]
    turns: list[tuple[str, list[Any], str]] = []
    n_images = 0
    for number, (turn_query, answer) in enumerate(_checked_history(history), start=1):
        text, images = _query_text(turn_query, f"query of history turn {number}", n_images + 1, label)
        n_images += len(images)
        turns.append((text, images, _checked_text(answer, (), f"answer of history turn {number}")))
    last_text, last_images = _query_text(query, "query", n_images + 1, label)

    ids = message("system", _checked_text(system, (), "system text"), tags_without_images)
    assistant_opening = opening("assistant")
    kept: list[tuple[list[int], int, list[Any]]] = []  # ids, number of answer tokens, images
    n_tokens = len(ids)
    for text, images, answer in reversed(turns):
        answer_ids = message("assistant", answer, tags_without_images)
        turn_ids = new_line + message("user", text) + new_line + answer_ids
        n_tokens += len(turn_ids)
        if n_tokens >= max_window:
            break
        kept.append((turn_ids, len(answer_ids) - len(assistant_opening), images))

    all_images, generated = list[Any](), list[tuple[int, int]]()
    for turn_ids, n_answer, images in reversed(kept):
        ids = ids + turn_ids
        all_images += images
        generated.append((len(ids) - n_answer, len(ids)))
    ids = ids + new_line + message("user", last_text) + new_line + assistant_opening
    return Prompt(ids, all_images + last_images, generated)


def image_spans(input_ids: Sequence[int], img_start_id: int, n_image_slots: int) -> list[tuple[int, int]]:
    """Find the images in token ids; return (index of `<img>`, index of `</img>`) for each, in order.

    Raises:
        QwenVLError: a span does not have `n_image_slots` ids between its tags, or a tag is unmatched.
    """
    img_end_id = img_start_id + 1
    spans: list[tuple[int, int]] = []
    start = None
    for index, token_id in enumerate(input_ids):
        if token_id == img_start_id:
            if start is not None:
                break
            start = index
        elif token_id == img_end_id:
            if start is None:
                raise QwenVLError(f"</img> at token {index} has no <img> before it")
            if index - start - 1 != n_image_slots:
                raise QwenVLError(
                    f"the image at token {start} has {index - start - 1} slots, "
                    f"the model needs {n_image_slots}"
                )
            spans.append((start, index))
            start = None
    if start is not None:
        raise QwenVLError(f"<img> at token {start} has no </img> after it")
    return spans


def _query_text(query: Query, where: str, start: int, label: str) -> tuple[str, list[Any]]:
    if not isinstance(query, str):
        try:
            return render(query, start, label)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
    images: list[Any] = _IMAGE_SPAN.findall(query)
    if not all(images):
        raise UsageError(f"{where}: <img></img> names no image")
    if len(images) != query.count("<img>") or len(images) != query.count("</img>"):
        raise UsageError(f"{where}: <img> and </img> do not pair")
    return query, images


def _checked_history(history: Any) -> Sequence[Any]:
    if isinstance(history, (str, bytes, Mapping)) or not isinstance(history, Sequence):
        raise UsageError(f"history must be a list of (query, answer) pairs, got {type(history).__name__}")
    for number, turn in enumerate(history, start=1):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise UsageError(f"history turn {number} must be a pair of query and answer")
    return history


def _checked_text(text: Any, refused_tags: Sequence[str], where: str, hint: str = "") -> str:
    if not isinstance(text, str):
        raise UsageError(f"{where} must be a string, got {type(text).__name__}")
    for tag in refused_tags:
        if tag in text:
            raise UsageError(f"{where} must not contain {tag}{hint}")
    return text


def _image_name(source: Any, number: int, where: str) -> str:
    if isinstance(source, (bytes, bytearray, Image.Image)):
        return f"image-{number}"
    if isinstance(source, os.PathLike):
        source = str(Path(source))
    name = _checked_text(source, _IMAGE_SPAN_TAGS, f"image of {where}")
    if not name:
        raise UsageError(f"image of {where} is empty")
    return f"image-{number}" if is_data_url(name) else name


def _render_boxes(part: Part, where: str) -> str:
    boxes = part["box"]
    if not isinstance(boxes, (list, tuple)) or not boxes:
        raise UsageError(f"box of {where} must be a list of [x1, y1, x2, y2], got {boxes!r:.60}")
    text = ""
    if "ref" in part:
        ref = _checked_text(part["ref"], IMAGE_TAGS, f"ref of {where}")
        if not ref.strip():
            raise UsageError(f"ref of {where} is empty")
        text = f"<ref>{ref}</ref>"
    for box in boxes:
        if (
            not isinstance(box, (list, tuple))
            or len(box) != 4
            or not all(type(value) is int for value in box)
        ):
            raise UsageError(f"box of {where} must be a list of [x1, y1, x2, y2] integers, got {box!r:.60}")
        if not all(0 <= value <= 1000 for value in box):
            raise UsageError(
                f"box of {where} must be in thousandths of the image's size, 0 to 1000, got {box!r:.60}"
            )
        text += "<box>({},{}),({},{})</box>".format(*box)
    return text
