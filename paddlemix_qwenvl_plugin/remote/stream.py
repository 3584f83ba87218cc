"""Answer stream of a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple, Optional

from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes
from paddlemix_qwenvl_plugin.remote.server import Server
from paddlemix_qwenvl_plugin.runtime.answer import Answer
from paddlemix_qwenvl_plugin.runtime.segments import Segment, SegmentBuilder


class End(NamedTuple):
    """Finish reason and token counts of an answer."""

    finish_reason: str
    n_prompt_tokens: int
    n_new_tokens: int


Work = Callable[[Callable[[str], None]], Coroutine[Any, Any, End]]
"""Coroutine function that sends the request, passes each received text to its argument, and returns the End."""


class ServerStream(Iterator[Segment]):
    """Answer of a server, a Stream (runtime/model.py): a chat's arrives in deltas, a batch row's in one text.

    The iteration and `finish` raise errors of the request. Its answer has no token ids, and only the timings `prepare`
    and `server`, the duration of the request.
    """

    def __init__(
        self,
        server: Server,
        work: Work,
        image_size: Optional[tuple[int, int]],
        prepare_seconds: float,
        on_end: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        """Create the stream; `work` sends the request to `server`. Other arguments: see AnswerStream."""
        self._server = server
        self._work = work
        self._image_size = image_size
        self._prepare_seconds = prepare_seconds
        self._on_end = on_end
        self._start = self._seconds = 0.0
        self._stopping = False
        # Received texts; None: the request has ended, or `stop` was called. Signal handlers may call SimpleQueue.put,
        # which is reentrant.
        self._received: SimpleQueue[Optional[str]] = SimpleQueue()
        self._future: Optional[Future[End]] = None
        self._end: Optional[End] = None
        self._deltas: list[str] = []
        self._texts = self._receive()
        self._segments = self._assemble()

    def __next__(self) -> Segment:
        return next(self._segments)

    def submit(self) -> ServerStream:
        """Send the request now instead of at the first segment."""
        if self._future is None:
            self._start = time.perf_counter()
            self._future = self._server.start(self._work(self._received.put))
            self._future.add_done_callback(lambda _: self._received.put(None))
        return self

    def stop(self) -> None:
        """End the iteration and cancel the request.

        Unlike `close()`, a signal handler or another thread may call this while the iteration waits for a segment.
        """
        self._stopping = True
        self._received.put(None)

    def close(self) -> None:
        """End the iteration and cancel the request."""
        self._segments.close()
        self._texts.close()
        if self._future is not None:
            self._future.cancel()

    def finish(self) -> Answer:
        """Wait for the end and return the whole answer."""
        for _ in self._texts:
            pass
        return self.answer

    @property
    def future(self) -> Future[End]:
        """Future of the submitted request."""
        assert self._future is not None
        return self._future

    @property
    def n_prompt_tokens(self) -> int:
        """Number of prompt tokens reported by the server; 0 before the end."""
        return self._end.n_prompt_tokens if self._end is not None else 0

    @property
    def n_new_tokens(self) -> int:
        """Number of completion tokens reported by the server; before the end, the number of received deltas."""
        return self._end.n_new_tokens if self._end is not None else len(self._deltas)

    @property
    def answer(self) -> Answer:
        """The answer so far; its finish reason is "cancelled" before the end."""
        text = "".join(self._deltas)
        parsed = parse_boxes(text)
        return Answer(
            text,
            tuple(parsed.boxes),
            self._image_size,
            tuple(parsed.problems),
            [],
            self._end.finish_reason if self._end is not None else "cancelled",
            {"prepare": self._prepare_seconds, "server": self._seconds},
        )

    def _assemble(self) -> Generator[Segment, None, None]:
        builder = SegmentBuilder()
        for text in self._texts:
            yield from builder.add_text(text)
        yield from builder.finish()

    def _receive(self) -> Generator[str, None, None]:
        future = self.submit().future
        failed = False
        try:
            while not self._stopping:
                text = self._received.get()
                if text is not None:
                    self._deltas.append(text)
                    yield text
                elif not self._stopping:
                    self._end = future.result()
                    return
        except Exception:
            failed = True
            raise
        finally:
            future.cancel()
            self._seconds = time.perf_counter() - self._start
            if self.n_new_tokens and not failed:
                self._on_end(self.answer)
