"""The front's end of a request: the tokens that have come and nobody has read."""

from __future__ import annotations

import asyncio
from typing import Callable, Optional

from paddlemix_qwenvl_plugin.serve.engine_api import Ended, Token
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# How long a step may take to see that a request is cancelled. A process that hangs never does.
CANCEL_SECONDS = 5.0


class ReceivedTokens:
    """See TokenStream. The client puts in what the engine process sends; one reader takes it out."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        """`cancel` tells the engine process, as long as the request has not ended."""
        self._cancel = cancel
        self._tokens: list[Token] = []
        self._error: Optional[QwenVLError] = None
        self._ended: Optional[Ended] = None
        self._reader: Optional[asyncio.Future[None]] = None  # what it waits for
        self._giving_up: Optional[asyncio.TimerHandle] = None

    def __aiter__(self) -> ReceivedTokens:
        return self

    async def __anext__(self) -> list[Token]:
        while not self._tokens:
            if self._error is not None:
                raise self._error
            if self._ended is not None:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        tokens, self._tokens = self._tokens, []
        return tokens

    @property
    def ended(self) -> Optional[Ended]:
        """See TokenStream."""
        return None if self._tokens else self._ended

    def cancel(self) -> None:
        """See TokenStream."""
        if self._giving_up is None and self._ended is None and self._error is None:
            self._cancel()
            loop = asyncio.get_running_loop()
            self._giving_up = loop.call_later(CANCEL_SECONDS, self.end, Ended("cancelled", 0))

    def add(self, tokens: list[Token]) -> None:
        """Tokens have come."""
        self._tokens += tokens
        self._tell()

    def end(self, ended: Ended) -> None:
        """The last one has come, or is waited for no longer."""
        self._ended = self._ended or ended
        self._tell()

    def fail(self, error: QwenVLError) -> None:
        """No more will come. Those that have are still read."""
        self._error = error
        self._tell()

    def _tell(self) -> None:
        if self._giving_up is not None and (self._ended is not None or self._error is not None):
            self._giving_up.cancel()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
