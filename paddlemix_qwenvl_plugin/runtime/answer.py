"""The answer to a prompt: whole, and in pieces while it is being generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Optional

from paddlemix_qwenvl_plugin.processing.boxes import Box, parse_boxes
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.runtime.kv_cache import KVCache
from paddlemix_qwenvl_plugin.runtime.pieces import Piece, PieceBuilder
from paddlemix_qwenvl_plugin.runtime.sampling import RowSampler


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt.

    Attributes:
        text: what the model said, with its `<ref>` and `<box>` tags, without the end token.
        boxes: the boxes and quads in it, in thousandths of the picture's width and height;
            `box.to_pixels(*answer.image_size)` gives pixels.
        image_size: (width, height) in pixels of the last picture, to which the boxes refer; None without a picture.
        problems: boxes that could not be read, one line each.
        token_ids: every generated token, the end token included.
        finish_reason: "stop" (an end token), "length" (max_new_tokens, or the context is full) or "cancelled"
            (a stream that was closed, or has not ended yet).
        timings: seconds of "prepare", "load" (of the programs, at the first call), "encode_images", "prefill" and
            "decode", and the decode's "tokens_per_second".
    """

    text: str
    boxes: tuple[Box, ...]
    image_size: Optional[tuple[int, int]]
    problems: tuple[str, ...]
    token_ids: list[int]
    finish_reason: str
    timings: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values; a box has `points` in thousandths and, of the last picture, `pixels`."""
        size = self.image_size
        return {
            "text": self.text,
            "boxes": [
                {
                    "kind": box.kind,
                    "ref": box.ref,
                    "points": box.points,
                    "pixels": box.to_pixels(*size) if size else None,
                }
                for box in self.boxes
            ],
            "image_size": size,
            "problems": list(self.problems),
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "timings": {name: round(value, 4) for name, value in self.timings.items()},
        }


def answer_of(
    tokenizer: QwenTokenizer,
    token_ids: list[int],
    ends: Sequence[int],
    image_size: Optional[tuple[int, int]],
    finish_reason: str,
    timings: dict[str, float],
) -> Answer:
    """Read the generated tokens; `ends` are those that end the answer, the others as in Answer."""
    text = tokenizer.decode(token_ids[:-1] if token_ids and token_ids[-1] in ends else token_ids)
    parsed = parse_boxes(text)
    return Answer(
        text, tuple(parsed.boxes), image_size, tuple(parsed.problems), token_ids, finish_reason, timings
    )


class AnswerStream(Iterator[Piece]):
    """An answer in pieces, generated as they are asked for.

    `close()`, the end of a `with` block, or dropping the stream frees the request; `answer` has what was said until
    then. An error in the middle is raised by the iteration.
    """

    def __init__(
        self,
        start: Callable[[dict[str, float]], tuple[RowSampler, Iterator[KVCache]]],
        tokenizer: QwenTokenizer,
        ends: Sequence[int],
        image_size: Optional[tuple[int, int]],
        prepare_seconds: float,
        on_end: Callable[[Answer, KVCache], None] = lambda answer, cache: None,
    ) -> None:
        """
        Args:
            start: encodes the pictures, adds the seconds of each part to the timings it is given, and returns the
                sampler and the steps of the generation.
            tokenizer, ends: of the model; the tokens that end the answer.
            image_size: see Answer.
            prepare_seconds: what tokenising and loading pictures took.
            on_end: called once with the answer and the cache of all its tokens but the last, when the generation
                ends or is cancelled after its first token; not after an error.
        """
        self._start = start
        self._tokenizer = tokenizer
        self._ends = ends
        self._image_size = image_size
        self._timings = {"prepare": prepare_seconds}
        self._on_end = on_end
        self._sampler: RowSampler | None = None
        self._ended = False
        self._stopping = False
        self._pieces = self._generate()

    def __next__(self) -> Piece:
        return next(self._pieces)

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()

    def stop(self) -> None:
        """End the iteration after the token that is being generated.

        Unlike `close()`, a signal handler or another thread may call this while a piece is awaited.
        """
        self._stopping = True

    def finish(self) -> Answer:
        """Generate what is left, and return the whole answer."""
        for _ in self:
            pass
        return self.answer

    @property
    def answer(self) -> Answer:
        """The whole answer, or what was said so far."""
        return answer_of(
            self._tokenizer,
            list(self._sampler.tokens) if self._sampler else [],
            self._ends,
            self._image_size,
            self._sampler.finish_reason if self._sampler and self._ended else "cancelled",
            dict(self._timings),
        )

    def _generate(self) -> Generator[Piece, None, None]:
        builder = PieceBuilder(self._tokenizer)
        sampler, steps = self._start(self._timings)
        self._sampler = sampler
        cache: KVCache | None = None
        try:
            # The seconds of the steps alone: what is done with a piece between two of them is not ours.
            seconds: list[float] = []
            while not self._stopping:
                start = time.perf_counter()
                following = next(steps, None)
                if following is None:
                    self._ended = True
                    break
                cache = following
                seconds.append(time.perf_counter() - start)
                decode = sum(seconds[1:])
                self._timings.update(prefill=seconds[0], decode=decode)
                self._timings["tokens_per_second"] = (len(seconds) - 1) / max(decode, 1e-9)
                if not sampler.ended:
                    yield from builder.add(sampler.tokens[-1])
            yield from builder.finish()
        except Exception:
            cache = None  # a failed turn is no turn
            raise
        finally:
            if cache is not None:
                self._on_end(self.answer, cache)
