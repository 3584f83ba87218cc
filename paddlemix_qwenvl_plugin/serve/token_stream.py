"""Buffer for the received tokens of a request, in the front and in the engine replicas of a cluster."""

from __future__ import annotations

import asyncio
from typing import Callable, Optional

from paddlemix_qwenvl_plugin.serve.engine_api import Ended, Token
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# Timeout for the engine process to confirm a cancellation, which a process that hangs never does. The stream then ends
# without the confirmation.
CANCEL_SECONDS = 5.0


class ReceivedTokens:
    """TokenStream filled by the engine client; supports one reader.

    Attributes:
        n_cached: number of prompt tokens found in the prefix cache; valid from the first token on.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        """Create an empty buffer; `cancel` cancels the request in the engine process."""
        self.n_cached = 0
        self._send_cancellation = cancel
        self._tokens: list[Token] = []
        self._error: Optional[QwenVLError] = None
        self._ended: Optional[Ended] = None
        self._wakeup: Optional[asyncio.Future[None]] = None  # awaited by the reader
        self._cancel_timer: Optional[asyncio.TimerHandle] = None

    def __aiter__(self) -> ReceivedTokens:
        return self

    async def __anext__(self) -> list[Token]:
        while not self._tokens:
            if self._error is not None:
                raise self._error
            if self._ended is not None:
                raise StopAsyncIteration
            self._wakeup = asyncio.get_running_loop().create_future()
            await self._wakeup
        tokens, self._tokens = self._tokens, []
        return tokens

    @property
    def ended(self) -> Optional[Ended]:
        """Finish reason and cached tokens of the request; None until all its tokens have been read."""
        return None if self._tokens else self._ended

    def cancel(self) -> None:
        """Cancel the request; the stream ends after CANCEL_SECONDS even if the engine has not ended the request."""
        if self._cancel_timer is None and self._ended is None and self._error is None:
            self._send_cancellation()
            loop = asyncio.get_running_loop()
            self._cancel_timer = loop.call_later(CANCEL_SECONDS, self.end, Ended("cancelled", 0))

    def add(self, tokens: list[Token], n_cached: int) -> None:
        """Append received tokens."""
        self.n_cached = n_cached
        self._tokens += tokens
        self._notify()

    def end(self, ended: Ended) -> None:
        """End the stream after the buffered tokens; calls after the first have no effect."""
        self._ended = self._ended or ended
        self._notify()

    def fail(self, error: QwenVLError) -> None:
        """End the stream after the buffered tokens with an error, which the reader's iteration raises."""
        self._error = error
        self._notify()

    def _notify(self) -> None:
        """Wake the reader; stop the timer of a cancellation if the stream has ended."""
        if self._cancel_timer is not None and (self._ended is not None or self._error is not None):
            self._cancel_timer.cancel()
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)
