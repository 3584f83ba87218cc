"""Images by URL: from hosts of an allow-list, at public addresses, and nothing said about what lies elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Sequence
from typing import Optional

import httpx

from paddlemix_qwenvl_plugin.processing.download import download
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, TooLargeError, line_of

_log = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole URLs, which may hold secrets

# Each is a thread, which a slow host holds for as long as a download may take.
_MOST_AT_ONCE = 16


class ImageHosts:
    """Downloads images from the hosts that the settings list."""

    def __init__(self, hosts: Sequence[str], max_bytes: int, timeout_seconds: float) -> None:
        """Args:
        hosts: names, `*.example.org` for all below example.org.
        max_bytes: of an image.
        timeout_seconds: for a whole download.
        """
        self._hosts = [_normal(host) for host in hosts]
        self._max_bytes = max_bytes
        self._timeout_seconds = timeout_seconds
        self._free: Optional[asyncio.Semaphore] = None  # made in the event loop, which it belongs to

    def allows(self, host: str) -> bool:
        """Whether images may come from a host."""
        host = _normal(host)
        return any(
            host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed
            for allowed in self._hosts
        )

    async def fetch(self, url: str, param: str) -> bytes:
        """The encoded image that an http(s) URL names.

        Raises:
            ApiError: the host is not on the list, or there is no image to be had. Why is only logged: a client must not
                learn from it what answers at which address.
        """
        try:
            host = httpx.URL(url).raw_host.decode("ascii")
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ApiError(400, f"{param}: not a valid URL", param=param, code="invalid_image_url") from error
        if not self.allows(host):
            raise ApiError(
                400,
                f"{param}: images from {_shown(host)} are not allowed here; send the image as a data: URL"
                + (f", or take it from {', '.join(self._hosts)}" if self._hosts else ""),
                param=param,
                code="image_host_not_allowed",
            )
        try:
            return await self._download(url, host)
        except TooLargeError as error:  # at a public address
            message = f"{param}: {line_of(error)}; send a smaller one"
            raise ApiError(400, message, param=param, code="image_too_large") from error
        except QwenVLError as error:
            _log.info("image not downloaded: %s", line_of(error))
            raise ApiError(
                400,
                f"{param}: the image cannot be downloaded from {_shown(host)} within "
                f"{self._timeout_seconds:g} seconds; check the URL, or send the image as a data: URL",
                param=param,
                code="image_download_failed",
            ) from error

    async def _download(self, url: str, host: str) -> bytes:
        """`download` in a thread, which goes on and keeps its place where the caller is cancelled."""
        loop = asyncio.get_running_loop()
        if self._free is None:
            self._free = asyncio.Semaphore(_MOST_AT_ONCE)
        await self._free.acquire()
        free = self._free
        done: asyncio.Future[bytes] = loop.create_future()

        def finish(body: bytes, error: Optional[BaseException]) -> None:
            free.release()
            if done.cancelled():
                return
            if error is None:
                done.set_result(body)
            else:
                done.set_exception(error)

        def work() -> None:
            body, error = b"", None
            try:
                body = download(url, host, self._max_bytes, self._timeout_seconds, False, self.allows)
            except BaseException as raised:  # raised again where it is awaited
                error = raised
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(finish, body, error)

        # Not of an executor, whose threads the end of the program waits for.
        threading.Thread(target=work, name="image-hosts", daemon=True).start()
        return await done


def _normal(host: str) -> str:
    """A host name as it is compared: what is no ASCII as in DNS, lower case, without a last dot."""
    star, name = ("*.", host[2:]) if host.startswith("*.") else ("", host)
    with contextlib.suppress(httpx.InvalidURL, UnicodeError):
        name = httpx.URL(scheme="http", host=name).raw_host.decode("ascii")
    return star + name.lower().rstrip(".")


def _shown(host: str) -> str:
    """A host name for a message; it came from a client."""
    name = "".join(c if c.isprintable() else "?" for c in host)
    return name if len(name) <= 100 else f"{name[:97]}…"
