"""Folders of images: a row per image, with the job's prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Optional

from paddlemix_qwenvl_plugin.batch.rows import Row
from paddlemix_qwenvl_plugin.cluster.batch.formats.entry import Entry, plain_row

# In lower case; also those of the images in a WebDataset (webdataset.py).
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Images:
    """Format of image files: a file is one row, with its path relative to the folder as the id."""

    def __init__(self, prompt: Optional[str], defaults: Mapping[str, Any]) -> None:
        self._prompt = prompt
        self._defaults = defaults

    def index(self, folder: str, name: str) -> Iterator[Entry]:
        """List the only row of an image file."""
        yield Entry(number=1, start=0, stop=1, row_id=name)

    def rows(self, folder: str, name: str, entry: Entry) -> Iterator[tuple[int, Row]]:
        """Build the row of an image file, without reading the file."""
        yield 1, plain_row(name, {"image": name}, self._prompt, self._defaults)
