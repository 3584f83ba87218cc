"""Image downloads from allow-listed hosts at public addresses; error messages reveal nothing about internal ones."""

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
# Below this level httpx logs URLs, which may contain secrets.
logging.getLogger("httpx").setLevel(logging.WARNING)

# Maximum of concurrent downloads: each blocks a thread, at most for the download timeout.
_MAX_DOWNLOADS = 16


class ImageHosts:
    """Downloader for images from the allow-listed hosts."""

    def __init__(self, hosts: Sequence[str], max_bytes: int, timeout_seconds: float) -> None:
        """Set the hosts and limits.

        Args:
            hosts: host names; `*.example.org` allows all subdomains of example.org, but not example.org itself.
            max_bytes: maximum size of an image.
            timeout_seconds: timeout of a download, from name resolution to the last byte.
        """
        self._hosts = [_normalized(host) for host in hosts]
        self._max_bytes = max_bytes
        self._timeout_seconds = timeout_seconds
        # Created at the first download: before Python 3.10 a semaphore is bound to the event loop of its creation.
        self._semaphore: Optional[asyncio.Semaphore] = None

    def allows(self, host: str) -> bool:
        """Whether downloads from a host are allowed."""
        host = _normalized(host)
        return any(
            host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed
            for allowed in self._hosts
        )

    async def fetch(self, url: str, param: str) -> bytes:
        """Download the encoded image at an http(s) URL; `param` names the field of the request in errors.

        Raises:
            ApiError: the URL is not valid, the host is not allowed, the image is too large, or the download failed. The
                reason of a failed download is only logged: a client must not be able to probe internal addresses.
        """
        try:
            host = httpx.URL(url).raw_host.decode("ascii")
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ApiError(400, f"{param}: not a valid URL", param=param, code="invalid_image_url") from error
        if not self.allows(host):
            raise ApiError(
                400,
                f"{param}: images from {_printable(host)} are not allowed here; send the image as a data: URL"
                + (f", or take it from {', '.join(self._hosts)}" if self._hosts else ""),
                param=param,
                code="image_host_not_allowed",
            )
        try:
            return await self._download(url, host)
        except TooLargeError as error:
            # Safe to show: a body is read only from a public address, so this reveals nothing about internal ones.
            message = f"{param}: {line_of(error)}; send a smaller one"
            raise ApiError(400, message, param=param, code="image_too_large") from error
        except QwenVLError as error:
            _log.info("image not downloaded: %s", line_of(error))
            raise ApiError(
                400,
                f"{param}: the image cannot be downloaded from {_printable(host)} within "
                f"{self._timeout_seconds:g} seconds; check the URL, or send the image as a data: URL",
                param=param,
                code="image_download_failed",
            ) from error

    async def _download(self, url: str, host: str) -> bytes:
        """Run `download` in a thread. The thread counts towards _MAX_DOWNLOADS until it ends."""
        loop = asyncio.get_running_loop()
        if self._semaphore is None:
            self._semaphore = asyncio.Semaphore(_MAX_DOWNLOADS)
        semaphore = self._semaphore
        await semaphore.acquire()
        result: asyncio.Future[bytes] = loop.create_future()

        def finish(body: bytes, error: Optional[BaseException]) -> None:
            semaphore.release()
            if result.cancelled():
                return
            if error is None:
                result.set_result(body)
            else:
                result.set_exception(error)

        def run_download() -> None:
            body, error = b"", None
            try:
                body = download(
                    url,
                    host,
                    self._max_bytes,
                    self._timeout_seconds,
                    allow_private=False,
                    allows_host=self.allows,
                )
            except BaseException as raised:  # `await result` raises it in the event loop
                error = raised
            with contextlib.suppress(RuntimeError):  # the event loop is closed: the server has ended
                loop.call_soon_threadsafe(finish, body, error)

        # A daemon thread, not an executor: at exit the interpreter waits for the threads of executors.
        threading.Thread(target=run_download, name="image-hosts", daemon=True).start()
        return await result


def _normalized(host: str) -> str:
    """Normalize a host name for comparison: IDNA-encoded, lower case, without a trailing dot."""
    wildcard, name = ("*.", host[2:]) if host.startswith("*.") else ("", host)
    with contextlib.suppress(httpx.InvalidURL, UnicodeError):
        name = httpx.URL(scheme="http", host=name).raw_host.decode("ascii")
    return wildcard + name.lower().rstrip(".")


def _printable(host: str) -> str:
    """Make a client's host name printable for a message: shortened, unprintable characters replaced."""
    name = "".join(c if c.isprintable() else "?" for c in host)
    return name if len(name) <= 100 else f"{name[:97]}…"
