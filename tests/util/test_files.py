"""Atomic writes of files and folders, and the first line of an error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from paddlemix_qwenvl_plugin.util.errors import UsageError, first_line
from paddlemix_qwenvl_plugin.util.files import new_folder, write_beside, write_text


def test_a_failed_write_leaves_the_file_unchanged(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_text(target, "Grüße\n")
    assert target.read_bytes() == "Grüße\n".encode()

    def fail(partial: Path) -> None:
        assert (partial.parent, partial.suffix) == (tmp_path, ".json")
        partial.write_text("incomplete")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as error:
        write_beside(target, fail)
    assert error.value.filename == str(target)
    assert target.read_bytes() == "Grüße\n".encode()
    assert list(tmp_path.iterdir()) == [target]


def test_of_two_concurrent_writes_the_last_rename_decides(tmp_path: Path) -> None:
    target = tmp_path / "a.json"

    def write_during_another_write(partial: Path) -> None:
        partial.write_text("renamed last")
        write_text(target, "renamed first")
        assert target.read_text() == "renamed first"

    write_beside(target, write_during_another_write)
    assert target.read_text() == "renamed last"
    assert list(tmp_path.iterdir()) == [target]


def fail_to_create(target: Path, error: BaseException) -> None:
    """Begin to create a folder and raise an error."""
    with new_folder(target) as partial:
        assert not list(partial.iterdir())
        (partial / "weights").write_text("incomplete")
        raise error


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "model"
    for _ in range(2):
        with pytest.raises(OSError, match="No space") as error:
            fail_to_create(target, OSError(errno.ENOSPC, "No space left on device"))
        assert error.value.filename == str(target)
        assert not list(target.parent.iterdir())
    with new_folder(target) as partial:
        (partial / "weights").write_text("complete")
        assert not target.exists()
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("weights", "complete")]
    assert list(target.parent.iterdir()) == [target]
    # The permissions are those of any new folder.
    (tmp_path / "other").mkdir()
    assert target.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_of_two_concurrent_creations_the_first_rename_decides(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def create_during_another_creation() -> None:
        with new_folder(target) as slow:
            (slow / "slow").write_text("")
            with new_folder(target) as fast:
                (fast / "fast").write_text("")
            assert (slow / "slow").exists()

    with pytest.raises(UsageError, match="model: exists already"):
        create_during_another_creation()
    assert [path.name for path in target.iterdir()] == ["fast"]
    assert list(tmp_path.iterdir()) == [target]


def test_the_temporary_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "model"
    child = os.fork()
    if child == 0:
        with new_folder(target) as partial:
            (partial / "old").write_text("")
            os._exit(0)  # as if killed: without cleanup
    os.waitpid(child, 0)
    assert [path.name.startswith(".partial-model-") for path in tmp_path.iterdir()] == [True]
    with new_folder(target) as partial:
        (partial / "new").write_text("")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_exists_or_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target, message in (
        (tmp_path, "exists already; name a new folder"),
        (tmp_path / "file" / "model", "cannot make this folder"),
    ):
        with pytest.raises(UsageError, match=message):
            new_folder(target).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [("", "ValueError"), ("\n \n", "ValueError"), ("\n a\nb", "a"), ("a\rb", "a")],
)
def test_first_line(message: str, expected: str) -> None:
    assert first_line(ValueError(message)) == expected
