"""Loading of a request's images."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from paddlemix_qwenvl_plugin.serve.openai.content import ImageSource
from paddlemix_qwenvl_plugin.serve.service import ImageLoader, LoadedImage


async def load_images(loader: ImageLoader, sources: Sequence[ImageSource]) -> list[LoadedImage]:
    """Load images concurrently; a URL that occurs several times is loaded once.

    Raises:
        ApiError: error of the first image that fails; the loading of the other images is cancelled.
    """
    # Reversed: for a URL that occurs several times, its first parameter remains.
    params = {source.url: source.param for source in reversed(sources)}
    tasks = {url: asyncio.ensure_future(loader.load(url, param)) for url, param in params.items()}
    try:
        await asyncio.gather(*tasks.values())
    finally:
        for task in tasks.values():
            task.cancel()
    return [tasks[source.url].result() for source in sources]
