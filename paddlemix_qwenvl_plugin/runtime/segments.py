"""Segments of a streamed answer: text as it is generated, refs and boxes when they are complete."""

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
    """A segment of a streamed answer: text, a complete ref or a complete box.

    Attributes:
        text: the generated text, tags included; the texts of all segments join to the answer's text.
        ref: the text between `<ref>` and `</ref>`, stripped, if the segment is a ref; None for other segments, and if
            this text is empty.
        boxes: the box or quad, if the segment is one; empty for other segments and for a malformed box.
    """

    text: str
    ref: Optional[str] = None
    boxes: tuple[Box, ...] = ()


class SegmentBuilder:
    """Incremental builder of segments from tokens.

    Text is yielded when its last UTF-8 byte has arrived and it cannot belong to a tag, ref or box; a ref or box is
    yielded when its end tag has arrived.
    """

    def __init__(self, tokenizer: Optional[QwenTokenizer] = None) -> None:
        """Create a builder; only `add` needs the tokenizer."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._buffer = ""
        self._ref: str | None = None

    def add(self, token: int) -> Iterator[Segment]:
        """Add a token and yield the segments that it completes."""
        assert self._tokenizer is not None
        return self.add_text(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def add_text(self, text: str) -> Iterator[Segment]:
        """Add text and yield the segments that it completes; for callers that have text instead of tokens."""
        self._buffer += text
        return self._complete(final=False)

    def finish(self) -> Iterator[Segment]:
        """End the answer and yield the remaining segments, incomplete tags as plain text."""
        self._buffer += self._decoder.decode(b"", final=True)
        return self._complete(final=True)

    def _complete(self, final: bool) -> Iterator[Segment]:
        """Yield the complete segments of the buffered text; with `final`, all of it."""
        while self._buffer:
            tag = _TAG.search(self._buffer)
            if tag is None:
                n_ready = len(self._buffer) if final else _before_partial_tag(self._buffer)
            elif tag.start():
                n_ready = tag.start()
            elif tag.group(1):  # an end tag without its start tag
                n_ready = tag.end()
            else:
                end = _TAG.search(self._buffer, tag.end())
                if end is None and not final:
                    return
                if end is not None and end.group() == f"</{tag.group(2)}>":
                    yield self._tagged(tag.group(2), self._take(end.end()))
                    continue
                n_ready = tag.end()  # the end tag is missing
            if not n_ready:
                return
            text = self._take(n_ready)
            if text.strip():  # as in parse_boxes, text between a ref and a box separates them
                self._ref = None
            yield Segment(text)

    def _tagged(self, kind: str, text: str) -> Segment:
        if kind == "ref":
            self._ref = text[len("<ref>") : -len("</ref>")].strip() or None
            return Segment(text, ref=self._ref)
        ref = f"<ref>{self._ref}</ref>" if self._ref is not None else ""
        return Segment(text, boxes=tuple(parse_boxes(ref + text).boxes))

    def _take(self, n_chars: int) -> str:
        taken, self._buffer = self._buffer[:n_chars], self._buffer[n_chars:]
        return taken


def _before_partial_tag(text: str) -> int:
    """Length of `text` without a possible beginning of a tag at its end."""
    start = text.rfind("<")
    if start >= 0 and any(tag.startswith(text[start:]) for tag in _TAGS):
        return start
    return len(text)
