"""An HTTP connection that its client cannot keep for nothing."""

from __future__ import annotations

import asyncio
from typing import Any, Optional

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0
"""How long a client may take from connecting, or from an answer, to the whole head of its next request."""

_LAST_HEAD_SECONDS = 2.0
"""The same for one that has just connected when the server is ending: it gets its answer, be it a 503."""


class Connection(H11Protocol):
    """uvicorn's connection, with two limits that uvicorn has not.

    - The head of a request must be there in time.
    - What is sent must be read in time: a client that leaves more unread than the operating system and a buffer of
      64 KiB hold is cut off after `send_timeout` seconds. Its request sees that it has gone.
    """

    send_timeout = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = _Timer(self)
        self._reading = _Timer(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head.start(HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answering:
            self._head.stop()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._answering and not self.transport.is_closing():
            self._head.start(HEAD_SECONDS)

    def connection_lost(self, exc: Optional[Exception]) -> None:
        self._head.stop()
        self._reading.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading.start(self.send_timeout)

    def resume_writing(self) -> None:
        self._reading.stop()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # Closed, the connection still waits for its client to read the last answer.
        if self.transport.get_write_buffer_size():
            self._reading.start(self.send_timeout)

    def shutdown(self) -> None:
        if self.cycle is None:
            self._head.start(_LAST_HEAD_SECONDS)
        else:
            super().shutdown()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


class _Timer:
    """Cuts a connection off unless it is stopped in time."""

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
