"""One choice of a completion, on the engine."""

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
    """What is new in a choice; the last one of a choice has its finish reason.

    Attributes:
        image_size: (width, height) in pixels of the image that the boxes refer to.
    """

    choice: int
    delta: Delta
    finish_reason: Optional[Literal["stop", "length"]]
    image_size: Optional[tuple[int, int]]


@dataclass
class Deadline:
    """How long a request may run, in seconds, and whether it has."""

    seconds: float
    passed: bool = False

    def check(self) -> None:
        """Raise the error if it has."""
        if self.passed:
            raise self.error()

    def error(self) -> ApiError:
        return ApiError(
            504,
            f"The completion took more than {self.seconds:g} seconds; ask for fewer tokens.",
            "server_error",
            code="timeout",
            # It would take as long again: clients that try again by themselves should not.
            headers={"x-should-retry": "false"},
        )


class ChoiceRun:
    """A request of the engine, from its submission to its last token.

    Attributes:
        begun: set with its first token, or when there will be none.
        n_cached: tokens of its prompt that were found in the prefix cache, once it has ended.
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
        """Args:
        deadline: who lets it pass cancels the run.
        after: a run with the same prompt: this one is submitted when that one has begun, and finds the prompt in
            the prefix cache.
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
        """Tokens so far, those after a stop string not counted."""
        return self._text.n_tokens

    async def events(self, info: RequestInfo) -> AsyncGenerator[Event, None]:
        """Submit it, and what it says.

        Raises:
            ApiError, QwenVLError: it has failed, or its time was up.
        """
        try:
            if self._after is not None:
                await self._after.begun.wait()
            self._deadline.check()
            self._stream = self._service.engine.submit(self._request)
            tokens = self._stream.__aiter__()
            delta = Delta()
            before = info.begin
            async for new in tokens:
                before = self._observe(len(new), before)
                delta = self._text.add(new)
                if self._text.stopped:
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
        """End it at the engine's next step; no error if it has ended."""
        if self._stream is not None:
            self._stream.cancel()

    def _observe(self, n_tokens: int, before: float) -> float:
        """Tell the metrics of tokens that have come now; `before`: when those before them did, or the request."""
        now = monotonic()
        if self.begun.is_set():
            self._service.metrics.next_tokens(n_tokens, now - before)
        elif self._index == 0:
            self._service.metrics.first_token(now - before)
        self.begun.set()
        return now

    def _reason(self, stream: TokenStream) -> Literal["stop", "length"]:
        """Why it ended, of itself."""
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
    """Let a cancelled stream end, for what it says of its prompt."""
    with suppress(QwenVLError):  # the completion is whole
        async for _ in tokens:
            pass
