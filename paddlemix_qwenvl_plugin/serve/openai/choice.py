"""Choices: single completions running on the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Literal, NamedTuple, Optional

from paddlemix_qwenvl_plugin.serve.engine_api import EngineRequest, Token, TokenStream
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.openai.completion_text import CompletionText, Delta
from paddlemix_qwenvl_plugin.serve.request_info import RequestInfo
from paddlemix_qwenvl_plugin.serve.service import Service
from paddlemix_qwenvl_plugin.util.errors import QwenVLError


class Event(NamedTuple):
    """Increment of a choice.

    Attributes:
        choice: index of the choice in the request.
        finish_reason: set in the last event of the choice.
        image_size: (width, height) in pixels of the image to which the boxes refer.
    """

    choice: int
    delta: Delta
    finish_reason: Optional[Literal["stop", "length"]]
    image_size: Optional[tuple[int, int]]


@dataclass
class Deadline:
    """Time limit of a request in seconds, and whether it has passed."""

    seconds: float
    passed: bool = False

    def check(self) -> None:
        """Raise the timeout error if the deadline has passed."""
        if self.passed:
            raise self.error()

    def error(self, advice: str = "; request fewer tokens") -> ApiError:
        """Create the timeout error."""
        return ApiError(
            504,
            f"The completion timed out after {self.seconds:g} seconds{advice}.",
            "server_error",
            code="timeout",
            # A retry would take as long: clients must not retry automatically.
            headers={"x-should-retry": "false"},
        )


class ChoiceRun:
    """Run of one choice on the engine, from submission to the last token.

    Attributes:
        begun: set at the first token, or when the run ends without one.
        n_cached: number of prompt tokens found in the prefix cache; valid after the end.
    """

    def __init__(
        self,
        service: Service,
        index: int,
        request: EngineRequest,
        stop_strings: Sequence[str],
        image_size: Optional[tuple[int, int]],
        deadline: Deadline,
        after: Optional[ChoiceRun] = None,
    ) -> None:
        """Prepare a run.

        Args:
            deadline: deadline of the request; the caller sets its `passed`, and then cancels the run.
            after: another run with the same prompt. The new run is submitted after the first token of `after`, so that
                it finds the prompt in the prefix cache.
        """
        self._service = service
        self._index = index
        self._request = request
        self._image_size = image_size
        self._deadline = deadline
        self._after = after
        self._text = CompletionText(
            service.tokenizer, request.stop_token_ids, stop_strings, request.n_logprobs is not None
        )
        self._stream: Optional[TokenStream] = None
        self.begun = asyncio.Event()
        self.n_cached = 0

    @property
    def n_tokens(self) -> int:
        """Number of tokens so far, without the tokens after a stop string."""
        return self._text.n_tokens

    async def events(self, info: RequestInfo) -> AsyncGenerator[Event, None]:
        """Submit the request and yield its events.

        Raises:
            ApiError, QwenVLError: the request failed or timed out.
        """
        try:
            if self._after is not None:
                await self._after.begun.wait()
            self._deadline.check()
            self._stream = self._service.engine.submit(self._request)
            tokens = self._stream.__aiter__()
            delta = Delta()
            previous_time = info.begin
            async for new_tokens in tokens:
                previous_time = self._observe(len(new_tokens), previous_time)
                delta = self._text.add(new_tokens)
                if self._text.stopped:  # `delta` is sent below, with the finish reason
                    break
                if delta:
                    yield Event(self._index, delta, None, self._image_size)
            if self._text.stopped:
                self._stream.cancel()
                delta.extend(self._text.finish())
                yield Event(self._index, delta, "stop", self._image_size)
                await _drain(tokens)
            else:
                yield Event(self._index, self._text.finish(), self._reason(self._stream), self._image_size)
            if self._stream.ended is not None:
                self.n_cached = self._stream.ended.n_cached
        finally:
            self.begun.set()

    def cancel(self) -> None:
        """Cancel the run at the engine's next step; no effect before its submission and after its end."""
        if self._stream is not None:
            self._stream.cancel()

    def _observe(self, n_tokens: int, previous_time: float) -> float:
        """Record the latency of tokens received now in the metrics; return the present time.

        Args:
            previous_time: time of the previous tokens; for the first tokens, `begin` of RequestInfo.
        """
        now = monotonic()
        if self.begun.is_set():
            self._service.metrics.next_tokens(n_tokens, now - previous_time)
        elif self._index == 0:  # once for each request
            self._service.metrics.first_token(now - previous_time)
        self.begun.set()
        return now

    def _reason(self, stream: TokenStream) -> Literal["stop", "length"]:
        """Finish reason of a stream that ended without a stop string; ApiError if it was cancelled."""
        reason = stream.ended.reason if stream.ended is not None else "cancelled"
        if reason == "cancelled":
            self._deadline.check()
            raise ApiError(
                503,
                "The server has ended this request; try again.",
                "server_error",
                code="cancelled",
                headers={"Retry-After": "1"},
            )
        return reason


async def _drain(tokens: AsyncIterator[list[Token]]) -> None:
    """Read a cancelled stream to its end, which reports the number of cached prompt tokens."""
    with suppress(QwenVLError):  # an error after the stop string does not concern the completion
        async for _ in tokens:
            pass
