"""Incremental detokenization of a completion: tokens to text deltas, boxes and log probabilities."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

from paddlemix_qwenvl_plugin.processing.boxes import Box
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.runtime.segments import Segment, SegmentBuilder
from paddlemix_qwenvl_plugin.serve.engine_api import Token
from paddlemix_qwenvl_plugin.serve.openai.stop_strings import StopStrings


class PlacedToken(NamedTuple):
    """A token and its character offset in the completion."""

    token: Token
    start: int


@dataclass
class Delta:
    """Increment of a completion.

    Attributes:
        text: new text. A complete ref, box or quad is in one delta; a tag without its counterpart is plain text.
        boxes: boxes whose tags are in `text`.
        tokens: if log probabilities were requested, the tokens whose text begins in `text`: no stop tokens, and no
            tokens whose whole text belongs to a stop string. Unless a stop string was found, the last delta also has
            the tokens at the end that have no text.
    """

    text: str = ""
    boxes: list[Box] = field(default_factory=list)
    tokens: list[PlacedToken] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)

    def extend(self, other: Delta) -> None:
        """Append the next delta."""
        self.text += other.text
        self.boxes += other.boxes
        self.tokens += other.tokens


class CompletionText:
    """Incremental converter of tokens to deltas; the concatenated texts are the completion up to its stop string.

    Attributes:
        n_tokens: number of tokens added, stop token included, without the tokens after a stop string.
    """

    def __init__(
        self,
        tokenizer: QwenTokenizer,
        stop_token_ids: Collection[int],
        stop_strings: Sequence[str],
        with_tokens: bool,
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._stop_token_ids = frozenset(stop_token_ids)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stops = StopStrings(stop_strings)
        self._segments = SegmentBuilder(tokenizer)
        # Tokens whose text is not in a delta yet; None: no log probabilities were requested.
        self._pending_tokens: Optional[deque[PlacedToken]] = deque() if with_tokens else None
        self._n_decoded = 0  # characters decoded so far
        self._n_sent = 0  # characters in the deltas so far
        self.n_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the completion."""
        return self._stops.found

    def add(self, tokens: Iterable[Token]) -> Delta:
        """Add tokens and return the new delta; tokens after a stop string are ignored.

        Once `stopped` is true, only `finish` may follow: further tokens would be counted in `n_tokens`.
        """
        new_text = ""
        for token in tokens:
            self.n_tokens += 1
            if token.id in self._stop_token_ids:
                continue
            if self._pending_tokens is not None:
                self._pending_tokens.append(PlacedToken(token, self._n_decoded))
            text = self._decode(self._token_bytes(token.id))
            self._n_decoded += len(text)
            new_text += self._stops.add(text)
            if self._stops.found:
                break
        return self._delta(self._segments.add_text(new_text)) if new_text else Delta()

    def finish(self) -> Delta:
        """End the completion and return the delta with the text held back so far."""
        last_text = self._stops.add(self._decode(b"", final=True)) + self._stops.finish()
        delta = self._delta([*self._segments.add_text(last_text), *self._segments.finish()])
        if self._pending_tokens and not self.stopped:
            delta.tokens += self._pending_tokens  # tokens without text
        return delta

    def _delta(self, segments: Iterable[Segment]) -> Delta:
        """Join segments to a delta, with the pending tokens whose text begins in it."""
        delta = Delta()
        for segment in segments:
            delta.text += segment.text
            delta.boxes += segment.boxes
        self._n_sent += len(delta.text)
        while self._pending_tokens and self._pending_tokens[0].start < self._n_sent:
            delta.tokens.append(self._pending_tokens.popleft())
        return delta
