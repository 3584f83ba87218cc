"""Input of a batch job on a cluster: its files, their format, and the index of their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Optional, Union

from paddlemix_qwenvl_plugin.batch.rows import dump, id_key
from paddlemix_qwenvl_plugin.cluster.batch.files import (
    filesystem,
    folder_of,
    join,
    listed,
    naming_url,
    opened,
)
from paddlemix_qwenvl_plugin.cluster.batch.formats.entry import Entry, Format
from paddlemix_qwenvl_plugin.cluster.batch.formats.images import SUFFIXES, Images
from paddlemix_qwenvl_plugin.cluster.batch.formats.jsonl import Jsonl
from paddlemix_qwenvl_plugin.cluster.batch.formats.parquet import Parquet
from paddlemix_qwenvl_plugin.cluster.batch.formats.webdataset import WebDataset
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.util.errors import UsageError

# File name suffixes of each kind of input.
_SUFFIXES = {"jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",), "tar": (".tar",), "images": SUFFIXES}

_FILES_AT_ONCE = 16  # files that are indexed concurrently


@dataclass(frozen=True)
class Input:
    """Input files of a batch job.

    Attributes:
        folder: path or URL of their folder, against which relative image paths are resolved.
        sizes: size of each file in bytes, by its path relative to the folder.
        kind: a key of `_SUFFIXES`.
    """

    folder: str
    sizes: dict[str, int]
    kind: str

    def format(self, prompt: Optional[str], options: GenerationOptions) -> Format:
        """Create the format of the files; `prompt` (not in JSONL) and `options` are the defaults of rows."""
        defaults = asdict(options)
        if self.kind == "jsonl":
            return Jsonl(defaults)
        kinds: dict[str, type[Union[Parquet, WebDataset, Images]]]
        kinds = {"parquet": Parquet, "tar": WebDataset, "images": Images}
        return kinds[self.kind](prompt, defaults)

    def digest(self) -> str:
        """Compute a digest: of the content of a single JSONL file, otherwise of the files' names and sizes.

        Many files, or one with images (Parquet, tar), would take too long to read; a change that keeps all names and
        sizes is not noticed.
        """
        if self.kind != "jsonl" or len(self.sizes) > 1:
            return hashlib.sha256(dump([*self.sizes.items()])).hexdigest()
        digest = hashlib.sha256()
        with opened(join(self.folder, *self.sizes)) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


def find(source: str, name: str) -> Input:
    """Find the input files of a source: a JSONL, Parquet or tar file, or a folder of these or of images.

    A single file of another suffix is taken as JSONL. `name` identifies the source in messages.

    Raises:
        UsageError: the source does not exist, is a URL of an unknown scheme, or is a folder without input files or with
            several formats.
        QwenVLError, OSError: it cannot be read.
    """
    file_system, path = filesystem(source)
    with naming_url(source):
        is_folder = file_system.isdir(path)
        if not is_folder and not file_system.isfile(path):
            raise UsageError(f"{name}: no such file")
        if not is_folder:
            folder, file_name = folder_of(source), source.rstrip("/").rpartition("/")[2]
            kind = "jsonl"
            for other_kind in ("parquet", "tar"):
                if file_name.lower().endswith(_SUFFIXES[other_kind]):
                    kind = other_kind
            return Input(folder, {file_name: int(file_system.size(path) or 0)}, kind)
    # No hidden files, and none in hidden folders.
    sizes = {file: size for file, size in listed(source, recursive=True).items() if "/." not in f"/{file}"}
    sizes_by_kind = {
        kind: {file: size for file, size in sizes.items() if file.lower().endswith(suffixes)}
        for kind, suffixes in _SUFFIXES.items()
    }
    images = sizes_by_kind.pop("images")  # beside other formats, these are images that the rows refer to
    kinds = [kind for kind, files in sizes_by_kind.items() if files]
    if len(kinds) > 1:
        raise UsageError(f"{name}: has files of several formats ({', '.join(kinds)}); name one file")
    if not kinds and not images:
        raise UsageError(f"{name}: has no .jsonl, .parquet or .tar files and no images")
    return Input(source, sizes_by_kind[kinds[0]], kinds[0]) if kinds else Input(source, images, "images")


def index(files: Input, format: Format) -> Iterator[tuple[str, Entry]]:
    """List all rows as (name of the file, entry).

    Raises:
        UsageError: two rows have the same id.
        QwenVLError, OSError: a file is damaged or cannot be read; see `naming_url`.
    """
    seen: dict[str, tuple[str, int]] = {}
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        names = [*files.sizes]
        for name, entries in zip(names, pool.map(lambda name: [*format.index(files.folder, name)], names)):
            for entry in entries:
                if entry.row_id is not None:
                    place = (name, entry.number)
                    first = seen.setdefault(id_key(entry.row_id), place)
                    if first != place:
                        unit = "line" if files.kind == "jsonl" else "row"  # what the number counts: see Entry
                        where = " and ".join(f"{file}: {unit} {number}" for file, number in (first, place))
                        raise UsageError(f"{where} have the same id {entry.row_id!r}")
                yield name, entry
