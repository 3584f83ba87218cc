"""Answers as objects, and their JSON form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from paddlemix_qwenvl_plugin.processing.boxes import Box


@dataclass(frozen=True)
class Answer:
    """The model's answer to a prompt: text, boxes, token ids and timings.

    Attributes:
        text: the completion with its `<ref>` and `<box>` tags, without the stop token.
        boxes: its boxes and quads, in thousandths of the image's width and height;
            `box.to_pixels(*answer.image_size)` gives pixels.
        image_size: (width, height) in pixels of the last image, to which the boxes refer; None without an image.
        problems: malformed boxes, boxes whose coordinates were corrected, unpaired tags, empty refs; one line each.
        token_ids: every generated token, the stop token included; empty for a remote server's answer.
        finish_reason: "stop" (a stop token), "length" (max_new_tokens, or the context is full) or "cancelled" (the
            stream was closed or stopped, or has not ended yet).
        timings: seconds of "prepare" (tokenize the prompt, load the images), "load" (of the stages, at the first
            request), "encode_images", "prefill" and "decode", and the decoding rate "tokens_per_second"; of a remote
            server's answer "prepare" and "server".
    """

    text: str
    boxes: tuple[Box, ...]
    image_size: Optional[tuple[int, int]]
    problems: tuple[str, ...]
    token_ids: list[int]
    finish_reason: str
    timings: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON-ready values; a box has `points` in thousandths and `pixels` of the last image."""
        return {
            "text": self.text,
            "boxes": [box_as_dict(box, self.image_size) for box in self.boxes],
            "image_size": self.image_size,
            "problems": list(self.problems),
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "timings": {name: round(value, 4) for name, value in self.timings.items()},
        }


def box_as_dict(box: Box, image_size: Optional[tuple[int, int]]) -> dict[str, Any]:
    """Convert a box to JSON-ready values: `points` in thousandths, and `pixels`, which is None without `image_size`.

    `image_size` is (width, height) in pixels.
    """
    return {
        "kind": box.kind,
        "ref": box.ref,
        "points": box.points,
        "pixels": box.to_pixels(*image_size) if image_size else None,
    }
