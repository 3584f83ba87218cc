"""HTTP connection with timeouts for slow and idle clients."""

from __future__ import annotations

import asyncio
from typing import Any, Optional

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 15.0
"""Timeout from the connection, or from the previous response, to the complete headers of the next request."""

_SHUTDOWN_HEADER_SECONDS = 2.0
"""At shutdown, timeout for the headers of a connection's first request. If they arrive, the request gets a response."""


class Connection(H11Protocol):
    """uvicorn's HTTP connection with two additional timeouts.

    - Headers: the complete headers of a request must arrive within HEADER_SECONDS.
    - Send: a client with more unread data than the socket buffer and asyncio's write buffer (64 KiB) hold is
      disconnected after `send_timeout` seconds. The handler of its request sees a disconnect.
    """

    send_timeout = 30.0  # seconds; server.py sets the setting of this name in a subclass

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer = _Timer(self)
        self._send_timer = _Timer(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout for the request headers."""
        super().connection_made(transport)
        self._header_timer.start(HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Stop the timeout for the headers once a request is being answered."""
        super().data_received(data)
        if self._answering:
            self._header_timer.stop()

    def on_response_complete(self) -> None:
        """Start the timeout for the headers of the next request."""
        super().on_response_complete()
        if not self._answering and not self.transport.is_closing():
            self._header_timer.start(HEADER_SECONDS)

    def connection_lost(self, exc: Optional[Exception]) -> None:
        """Stop both timeouts."""
        self._header_timer.stop()
        self._send_timer.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the send timeout: the write buffer is full."""
        super().pause_writing()
        self._send_timer.start(self.send_timeout)

    def resume_writing(self) -> None:
        """Stop the send timeout."""
        self._send_timer.stop()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; the send timeout still applies to its last response."""
        super().timeout_keep_alive_handler()
        # The transport stays open until the client has read the last response.
        if self.transport.get_write_buffer_size():
            self._send_timer.start(self.send_timeout)

    def shutdown(self) -> None:
        """Close after the current response; a connection that has not sent a request yet gets a short timeout."""
        if self.cycle is None:
            self._header_timer.start(_SHUTDOWN_HEADER_SECONDS)
        else:
            super().shutdown()

    @property
    def _answering(self) -> bool:
        """Whether a request's headers have been received and its response is not complete."""
        return self.cycle is not None and not self.cycle.response_complete


class _Timer:
    """Timer that aborts a connection when it expires."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._handle: Optional[asyncio.TimerHandle] = None

    def start(self, seconds: float) -> None:
        self.stop()
        self._handle = self._connection.loop.call_later(seconds, self._connection.transport.abort)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
