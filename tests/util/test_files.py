"""Atomic writes of files and folders."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from paddlemix_qwenvl_plugin.util.errors import UsageError, first_line
from paddlemix_qwenvl_plugin.util.files import new_folder, write_beside, write_text


def test_a_file_is_replaced_whole_or_left(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_text(target, "Grüße\n")
    assert target.read_bytes() == "Grüße\n".encode()

    def fail(partial: Path) -> None:
        assert (partial.parent, partial.suffix) == (tmp_path, ".json")
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        write_beside(target, fail)
    assert caught.value.filename == str(target)
    assert target.read_bytes() == "Grüße\n".encode()
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_two_write_at_once_is_one_of_the_two(tmp_path: Path) -> None:
    target = tmp_path / "a.json"

    def first(partial: Path) -> None:
        partial.write_text("first")
        write_text(target, "second")
        assert target.read_text() == "second"

    write_beside(target, first)
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def break_off(target: Path, error: BaseException) -> None:
    """A folder whose creation fails."""
    with new_folder(target) as partial:
        assert not list(partial.iterdir())
        (partial / "weights").write_text("half")
        raise error


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    for _ in range(2):
        with pytest.raises(OSError, match="No space") as caught:
            break_off(target, OSError(errno.ENOSPC, "No space left on device"))
        assert caught.value.filename == str(target)
        assert not list(target.parent.iterdir())
    with new_folder(target) as partial:
        (partial / "weights").write_text("whole")
        assert not target.exists()
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("weights", "whole")]
    assert list(target.parent.iterdir()) == [target]
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_two_make_at_once_is_the_quicker_ones(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def slow() -> None:
        with new_folder(target) as partial:
            (partial / "slow").write_text("")
            with new_folder(target) as quick:
                (quick / "quick").write_text("")
            assert (partial / "slow").exists()

    with pytest.raises(UsageError, match="model: exists already"):
        slow()
    assert [path.name for path in target.iterdir()] == ["quick"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_process_folder_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "model"
    child = os.fork()
    if child == 0:
        with new_folder(target) as partial:
            (partial / "old").write_text("")
            os._exit(0)
    os.waitpid(child, 0)
    assert [path.name.startswith(".partial-model-") for path in tmp_path.iterdir()] == [True]
    with new_folder(target) as partial:
        (partial / "new").write_text("")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target, line in (
        (tmp_path, "exists already; name a new folder"),
        (tmp_path / "file" / "model", "cannot make this folder"),
    ):
        with pytest.raises(UsageError, match=line):
            new_folder(target).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("said", "line"), [("", "ValueError"), ("\n \n", "ValueError"), ("\n a\nb", "a"), ("a\rb", "a")]
)
def test_first_line(said: str, line: str) -> None:
    assert first_line(ValueError(said)) == line
