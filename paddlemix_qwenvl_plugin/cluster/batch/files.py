"""File access by path or fsspec URL: reading, listing, atomic writing."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError, first_line
from paddlemix_qwenvl_plugin.util.files import write_beside
from paddlemix_qwenvl_plugin.util.sources import is_address, without_password

PARTIAL = ".partial-"
"""Name prefix of temporary files during a write; the same as that of `write_beside`."""


def absolute(name: str) -> str:
    """Make a path absolute, for actors with other working directories; `file://` URLs become paths, other URLs stay."""
    if name.lower().startswith("file://"):
        name = str(filesystem(name)[1])
    return name if is_address(name) else str(Path(name).absolute())


def filesystem(name: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL, and the path within it.

    Raises:
        UsageError: the scheme is unknown, or its package is not installed.
    """
    import fsspec

    try:
        file_system, path = fsspec.core.url_to_fs(name)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{without_password(name)}: {first_line(error)}") from error
    return file_system, str(path)


@contextlib.contextmanager
def naming_url(name: str) -> Iterator[None]:
    """Name the file by its URL in errors of the block.

    A FileNotFoundError is raised anew with the URL as its file name. Other OSErrors with a file name, QwenVLErrors and
    MemoryErrors are raised unchanged. All other errors become QwenVLErrors.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), without_password(name)) from error
    except (OSError, QwenVLError, MemoryError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise QwenVLError(f"{without_password(name)}: {first_line(error)}") from error
        raise
    except Exception as error:
        raise QwenVLError(f"{without_password(name)}: {first_line(error)}") from error


@contextlib.contextmanager
def opened(name: str) -> Iterator[BinaryIO]:
    """Open a file for reading; `naming_url` applies to the errors of the block."""
    file_system, path = filesystem(name)
    with naming_url(name), file_system.open(path, "rb") as file:
        yield file


def read(name: str, limit: int) -> bytes:
    """Read the first `limit` bytes of a file."""
    with opened(name) as file:
        return file.read(limit)


def exists(name: str) -> bool:
    """Whether a file exists."""
    file_system, path = filesystem(name)
    with naming_url(name):
        file_system.invalidate_cache(path)
        return bool(file_system.exists(path))


def join(folder: str, name: str) -> str:
    """Join the path or URL of a folder and a file name."""
    return f"{folder.rstrip('/')}/{name}"


def folder_of(name: str) -> str:
    """Return the path or URL of a file's parent folder."""
    return name.rpartition("/")[0] if is_address(name) else str(Path(name).parent)


def listed(folder: str, recursive: bool = False) -> dict[str, int]:
    """Map the relative paths of a folder's files to their sizes, sorted; empty if the folder does not exist.

    `recursive`: also list the files of its subfolders.
    """
    file_system, path = filesystem(folder)
    with naming_url(folder):
        # Other processes write files: a cached listing may be stale.
        file_system.invalidate_cache(path)
        entries = file_system.find(path, maxdepth=None if recursive else 1, detail=True)
    start = len(path.rstrip("/")) + 1
    return {name[start:]: info["size"] or 0 for name, info in sorted(entries.items()) if name[start:]}


def write(name: str, content: bytes) -> None:
    """Write a file atomically; create its folder if it does not exist."""
    if not is_address(name):
        write_with(name, lambda path: path.write_bytes(content))
        return
    file_system, path = filesystem(name)
    folder, _, last = path.rpartition("/")
    # In object stores a write is atomic; on other file systems only a rename is.
    partial = f"{folder}/{PARTIAL}{uuid.uuid4().hex[:12]}-{last}"
    with naming_url(name):
        file_system.makedirs(folder, exist_ok=True)
        file_system.pipe_file(partial, content)
        file_system.mv(partial, path)


def write_with(target: str, fill: Callable[[Path], Any]) -> None:
    """Write a local file atomically and sync it to disk; `fill` writes the content to the path that it gets."""

    def fill_and_sync(path: Path) -> None:
        fill(path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())

    Path(target).parent.mkdir(parents=True, exist_ok=True)
    write_beside(Path(target), fill_and_sync)


def remove(names: list[str]) -> None:
    """Remove files; ignore files that another process has removed."""
    for name in names:
        file_system, path = filesystem(name)
        with naming_url(name), contextlib.suppress(FileNotFoundError):
            file_system.rm_file(path)
