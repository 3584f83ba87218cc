"""Prefetch of images by fsspec URL; the model itself loads only local files, `data:` and http(s) URLs."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from paddlemix_qwenvl_plugin.batch.request import RowRequest
from paddlemix_qwenvl_plugin.batch.rows import Row
from paddlemix_qwenvl_plugin.cluster.batch.files import join, read
from paddlemix_qwenvl_plugin.processing.images import DEFAULT_LIMITS
from paddlemix_qwenvl_plugin.processing.prompts import Query
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError, line_of
from paddlemix_qwenvl_plugin.util.sources import is_address, without_password

_LOADED_BY_MODEL = re.compile(r"(data|https?|file):", re.IGNORECASE)


def with_images(rows: Iterable[tuple[int, Row]], folder: str, ahead: int) -> Iterator[tuple[int, Row]]:
    """Replace images by their bytes where the model cannot load them: fsspec URLs, relative paths in a URL `folder`.

    A row whose image cannot be read becomes an error.

    Args:
        rows: (number, row) pairs.
        folder: path or URL of the folder against which relative paths are resolved.
        ahead: number of rows to prefetch.
    """
    with ThreadPoolExecutor(ahead) as pool:
        waiting: deque[tuple[int, Future[Row]]] = deque()
        for number, row in rows:
            waiting.append((number, pool.submit(_with_images, row, folder)))
            if len(waiting) > ahead:
                first_number, future = waiting.popleft()
                yield first_number, future.result()
        while waiting:
            first_number, future = waiting.popleft()
            yield first_number, future.result()


def _with_images(row: Row, folder: str) -> Row:
    if not isinstance(row.parsed, RowRequest):
        return row
    request = row.parsed.request
    try:
        parts = _loaded(request.parts, folder)
        history = [(_loaded(query, folder), answer) for query, answer in request.history]
    except (QwenVLError, OSError) as error:
        return row._replace(parsed=error if isinstance(error, QwenVLError) else QwenVLError(line_of(error)))
    return row._replace(parsed=replace(row.parsed, request=replace(request, parts=parts, history=history)))


def _loaded(query: Query, folder: str) -> Any:
    if isinstance(query, str):
        return query
    return [{"image": _load(part["image"], folder)} if "image" in part else part for part in query]


def _load(source: Any, folder: str) -> Any:
    if not isinstance(source, str) or _LOADED_BY_MODEL.match(source):
        return source
    if not is_address(source):
        if not is_address(folder) or source.startswith("/"):
            return source
        source = join(folder, source)
    try:
        # A byte over the limit, so that the model notices and refuses a larger image.
        return read(source, DEFAULT_LIMITS.max_bytes + 1)
    except FileNotFoundError as error:
        raise UsageError(f"image {without_password(source)} does not exist") from error
