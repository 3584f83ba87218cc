"""An answer in segments, while it is being generated: words as they come, refs and boxes when they are complete."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

from paddlemix_qwenvl_plugin.processing.boxes import Box, parse_boxes
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer

_TAG = re.compile(r"<(/?)(ref|box|quad)>")
_TAGS = tuple(f"<{slash}{kind}>" for slash in ("", "/") for kind in ("ref", "box", "quad"))


@dataclass(frozen=True)
class Segment:
    """A part of an answer.

    Attributes:
        text: as the model said it, tags included; the texts of all segments are the answer's text.
        ref: the words between `<ref>` and `</ref>`, if this segment is a ref.
        boxes: what stands between `<box>` and `</box>` (or quad), if this segment is a box; empty if it is malformed.
    """

    text: str
    ref: Optional[str] = None
    boxes: tuple[Box, ...] = ()


class SegmentBuilder:
    """Tokens in, segments out. A character is handed out when its last byte is there, a tag with its end tag."""

    def __init__(self, tokenizer: Optional[QwenTokenizer] = None) -> None:
        """`tokenizer` is what `add` needs."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._ref: str | None = None

    def add(self, token: int) -> Iterator[Segment]:
        """The segments that are complete with this token."""
        assert self._tokenizer is not None
        return self.add_text(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def add_text(self, text: str) -> Iterator[Segment]:
        """The segments that are complete with this text, for a caller that decodes the tokens itself."""
        self._held += text
        return self._complete(last=False)

    def finish(self) -> Iterator[Segment]:
        """The segments that wait for more, as the text they are."""
        self._held += self._decoder.decode(b"", final=True)
        return self._complete(last=True)

    def _complete(self, last: bool) -> Iterator[Segment]:
        while self._held:
            tag = _TAG.search(self._held)
            if tag is None:
                n_ready = len(self._held) if last else _before_partial_tag(self._held)
            elif tag.start():
                n_ready = tag.start()
            elif tag.group(1):  # an end tag without its tag
                n_ready = tag.end()
            else:
                end = _TAG.search(self._held, tag.end())
                if end is None and not last:
                    return
                if end is not None and end.group() == f"</{tag.group(2)}>":
                    yield self._tagged(tag.group(2), self._take(end.end()))
                    continue
                n_ready = tag.end()  # never closed
            if not n_ready:
                return
            text = self._take(n_ready)
            if text.strip():
                self._ref = None
            yield Segment(text)

    def _tagged(self, kind: str, text: str) -> Segment:
        if kind == "ref":
            self._ref = text[len("<ref>") : -len("</ref>")].strip() or None
            return Segment(text, ref=self._ref)
        before = f"<ref>{self._ref}</ref>" if self._ref is not None else ""
        return Segment(text, boxes=tuple(parse_boxes(before + text).boxes))

    def _take(self, n: int) -> str:
        taken, self._held = self._held[:n], self._held[n:]
        return taken


def _before_partial_tag(text: str) -> int:
    """How much of `text` cannot be the beginning of a tag."""
    start = text.rfind("<")
    if start >= 0 and any(tag.startswith(text[start:]) for tag in _TAGS):
        return start
    return len(text)
