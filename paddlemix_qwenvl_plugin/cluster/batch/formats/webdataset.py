"""WebDataset tar files: consecutive members whose paths are equal up to the file name's first dot form a row."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, Optional

from paddlemix_qwenvl_plugin.batch.rows import Row
from paddlemix_qwenvl_plugin.cluster.batch.files import join, opened
from paddlemix_qwenvl_plugin.cluster.batch.formats.entry import Entry, data_url, plain_row
from paddlemix_qwenvl_plugin.cluster.batch.formats.images import SUFFIXES
from paddlemix_qwenvl_plugin.util.errors import UsageError


class WebDataset:
    """Format of WebDataset tar files; `start` and `stop` of an Entry are byte offsets in the tar file.

    A row's id is the path of its members up to the file name's first dot. Members without an extension, or whose file
    name begins with a dot, such as those that macOS adds, are no part of a row. A row's `.json` has the keys of the
    plain form, this package's format of a row (PLAIN_KEYS in entry.py). Its image members, in the order of their
    extensions, replace the images in the `.json`. Its prompt is the key `prompt`, else the job's, else its `.txt`.
    """

    def __init__(self, prompt: Optional[str], defaults: Mapping[str, Any]) -> None:
        self._prompt = prompt
        self._defaults = defaults

    def index(self, folder: str, name: str) -> Iterator[Entry]:
        """List the rows of a tar file."""
        number, key, start, stop = 0, "", 0, 0  # of the current row; number 0: no row yet; no key is empty
        with opened(join(folder, name)) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                _clear_members(archive)
                member_key, extension = _split(member.name)
                if not member.isfile() or not extension:
                    continue
                if member_key != key:
                    if number:
                        yield Entry(number, start, member.offset, key)
                    number, key, start = number + 1, member_key, member.offset
                stop = member.offset_data + member.size
            if number:
                yield Entry(number, start, stop, key)

    def rows(self, folder: str, name: str, entry: Entry) -> Iterator[tuple[int, Row]]:
        """Read the rows in a range of byte offsets."""
        number, key = entry.number, ""
        files: dict[str, bytes] = {}
        with opened(join(folder, name)) as file:
            file.seek(entry.start)
            # "r|" reads forward only; member.offset is relative to entry.start, where the reading begins.
            with tarfile.open(fileobj=file, mode="r|") as archive:
                for member in archive:
                    _clear_members(archive)
                    if member.offset >= entry.stop - entry.start:
                        break
                    content = archive.extractfile(member)
                    member_key, extension = _split(member.name)
                    if content is None or not extension:
                        continue
                    if files and member_key != key:
                        yield number, self._row(key, files)
                        number, files = number + 1, {}
                    key, files[extension] = member_key, content.read()
            if files:
                yield number, self._row(key, files)

    def _row(self, key: str, files: Mapping[str, bytes]) -> Row:
        try:
            fields = json.loads(files.get("json", b"{}"))
            prompt = files["txt"].decode() if "txt" in files and self._prompt is None else self._prompt
        except ValueError as error:
            return Row(key, False, UsageError(f"{key}: not valid JSON or UTF-8 ({error})"))
        if not isinstance(fields, dict):
            return Row(key, False, UsageError(f"{key}.json: must be a JSON object"))
        images = [data_url(files[name]) for name in sorted(files) if f".{name}".endswith(SUFFIXES)]
        if images:
            fields = {**fields, "image": None, "images": images}
        return plain_row(key, fields, prompt, self._defaults)


def _clear_members(archive: Any) -> None:
    """Clear tarfile's list of read members, which would grow to millions."""
    archive.members = []


def _split(name: str) -> tuple[str, str]:
    """Split a member's name into the row's key and the extension in lower case; both empty if it is of no row."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else ("", "")
