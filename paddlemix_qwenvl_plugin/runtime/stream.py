"""Streamed answers: iterators over the segments of an answer while it is generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Optional

from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.runtime.answer import Answer
from paddlemix_qwenvl_plugin.runtime.generation import Generation
from paddlemix_qwenvl_plugin.runtime.loop import Loop
from paddlemix_qwenvl_plugin.runtime.segments import Segment, SegmentBuilder


class AnswerStream(Iterator[Segment]):
    """Iterator over the segments of an answer, which is generated during the iteration.

    `close()` and the end of a `with` block cancel the request; `answer` then has the text so far. Deleting the stream
    cancels the request as well if the iteration has begun. The iteration raises errors of the generation.
    """

    def __init__(
        self,
        open_loop: Callable[[], Loop],
        generation: Generation,
        tokenizer: QwenTokenizer,
        image_size: Optional[tuple[int, int]],
        prepare_seconds: float,
        on_end: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        """Create a stream; the request is submitted when its first segment is requested.

        Args:
            open_loop: returns the loop to submit the request to.
            generation: the request.
            tokenizer: decodes the tokens.
            image_size: see Answer.
            prepare_seconds: time taken to tokenize the prompt, and to load and preprocess the images.
            on_end: called once with the answer when the generation ends or is cancelled after its first token; not
                after an error.
        """
        self._open_loop = open_loop
        self._generation = generation
        self._tokenizer = tokenizer
        self._image_size = image_size
        self._prepare_seconds = prepare_seconds
        self._load_seconds = 0.0
        self._on_end = on_end
        self._stopping = False
        self._n_seen = 0  # tokens delivered by the iteration
        self._loop: Loop | None = None
        self._tokens = self._generate()
        self._segments = self._assemble()

    def __next__(self) -> Segment:
        return next(self._segments)

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self) -> AnswerStream:
        """Submit the request now, so that it runs in a batch with others before its first segment is requested."""
        if self._loop is None:
            start = time.perf_counter()
            self._loop = self._open_loop()
            self._load_seconds = time.perf_counter() - start
            self._loop.submit(self._generation)
        return self

    def close(self) -> None:
        """Cancel the request."""
        self._segments.close()
        self._tokens.close()
        if self._loop is not None:
            self._loop.cancel(self._generation)

    def stop(self) -> None:
        """End the iteration after the current token and cancel the request.

        Unlike `close()`, a signal handler or another thread may call this while the iteration waits for a segment.
        """
        self._stopping = True

    def finish(self) -> Answer:
        """Generate the remaining tokens and return the complete answer."""
        for _ in self._tokens:
            pass
        return self.answer

    @property
    def done(self) -> bool:
        """Whether the request has ended: with its last token, with an error or by cancellation."""
        return self._generation.finished

    @property
    def n_prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return len(self._generation.prompt)

    @property
    def n_new_tokens(self) -> int:
        """Number of tokens read so far, the stop token included; other readers' steps may have generated more."""
        return self._n_seen

    @property
    def answer(self) -> Answer:
        """The complete answer, or the answer so far, which has the finish reason `cancelled`."""
        generation = self._generation
        tokens = generation.tokens[: self._n_seen]
        complete = generation.finish_reason is not None and len(tokens) == len(generation.tokens)
        has_stop_token = bool(tokens) and tokens[-1] in generation.stop_token_ids
        text = self._tokenizer.decode(tokens[:-1] if has_stop_token else tokens)
        parsed = parse_boxes(text)
        return Answer(
            text,
            tuple(parsed.boxes),
            self._image_size,
            tuple(parsed.problems),
            tokens,
            (generation.finish_reason if complete else None) or "cancelled",
            {
                "prepare": self._prepare_seconds,
                "load": self._load_seconds,
                "encode_images": generation.encode_seconds,
                "prefill": generation.prefill_seconds,
                "decode": generation.decode_seconds,
                # The first token is the prefill's.
                "tokens_per_second": max(0, len(generation.tokens) - 1)
                / max(generation.decode_seconds, 1e-9),
            },
        )

    def _assemble(self) -> Generator[Segment, None, None]:
        builder = SegmentBuilder(self._tokenizer)
        for token in self._tokens:
            if token not in self._generation.stop_token_ids:
                yield from builder.add(token)
        yield from builder.finish()

    def _generate(self) -> Generator[int, None, None]:
        self.submit()
        loop, generation = self._loop, self._generation
        assert loop is not None
        failed = False
        try:
            while not self._stopping:
                loop.advance(generation, self._n_seen, lambda: self._stopping)
                if len(generation.tokens) == self._n_seen:
                    return
                self._n_seen += 1
                yield generation.tokens[self._n_seen - 1]
        except Exception:
            failed = True
            raise
        finally:
            if not generation.finished:
                loop.cancel(generation)
            if self._n_seen and not failed:
                self._on_end(self.answer)
