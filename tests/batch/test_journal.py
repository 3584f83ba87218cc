"""Journal of a batch job, the partial file: a restart keeps the complete lines and no others."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin.batch.journal import Journal
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

JOB = {"qwenvl_batch": 1, "input": "abc", "options": {"seed": None}, "weights": ["x", "y"]}
# `id_key` of a row (its id as JSON) -> the row's output line.
LINES = {
    json.dumps(row_id): f'{{"id": "{row_id}", "text": "回答{row_id}"}}\n'.encode() for row_id in "abcdef"
}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda number: None)  # hundreds of calls would be slow
    return tmp_path / "out.jsonl.partial"


def write_journal(path, keys=tuple(LINES)):
    """Write a journal with some of LINES, and return its bytes."""
    with Journal(path, JOB, LINES) as journal:
        journal.append((key, LINES[key]) for key in keys)
    return path.read_bytes()


def test_a_reopened_journal_has_its_lines(path):
    write_journal(path, list(LINES)[:2])
    with Journal(path, JOB, LINES) as journal:
        assert [key for key in LINES if key in journal] == list(LINES)[:2]
        last = list(LINES)[-1]
        journal.append([(last, LINES[last])])
        assert len(journal) == 3
        assert all(journal.line(key) == LINES[key] for key in LINES if key in journal)
    assert path.read_bytes().count(b"\n") == 1 + 3  # the identity of the job, and three lines


def test_truncation_at_every_byte(path):
    complete = write_journal(path)
    for size in range(len(complete) + 1):
        path.write_bytes(complete[:size])
        with Journal(path, JOB, LINES) as journal:
            n_kept = sum(key in journal for key in LINES)
            # Every complete line except the first, the identity of the job.
            assert n_kept == max(complete[:size].count(b"\n") - 1, 0)
            journal.append((key, LINES[key]) for key in LINES if key not in journal)
            assert all(journal.line(key) == LINES[key] for key in LINES)
        assert path.read_bytes() == complete, size


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=40), last=st.integers(0, 5))
def test_an_invalid_line_is_removed_with_all_lines_after_it(path, tail, last):
    """As after a power failure, when only some blocks of the last write are on disk.

    `last`: index of the last valid line.
    """
    path.unlink(missing_ok=True)
    valid = write_journal(path, list(LINES)[: last + 1])
    path.write_bytes(valid + b"\0" + tail + b"\n" + LINES[list(LINES)[-1]])
    with Journal(path, JOB, LINES) as journal:
        assert len(journal) == last + 1
    assert path.read_bytes() == valid


def test_a_duplicate_or_unknown_line_is_removed(path):
    first, second = list(LINES)[:2]
    valid = write_journal(path, [first])
    for invalid in (LINES[first], b'{"id": "z", "text": ""}\n'):
        path.write_bytes(valid + invalid + LINES[second])
        with Journal(path, JOB, LINES) as journal:
            assert [key for key in LINES if key in journal] == [first]
        assert path.read_bytes() == valid


def test_another_job_is_refused(path):
    content = write_journal(path)
    with pytest.raises(QwenVLError, match=r"another job \(different: input, options\); remove it"):
        Journal(path, {**JOB, "input": "abd", "options": {"seed": 1}}, LINES)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"my notes\n", b"my notes", b"[]\n", b'{"id": 1}\n', b"\xff\n"])
def test_another_file_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(QwenVLError, match="not a partial file of this version"):
        Journal(path, JOB, LINES)
    assert path.read_bytes() == content


def test_an_open_journal_is_locked(path):
    with Journal(path, JOB, LINES) as journal:
        with pytest.raises(QwenVLError, match="another qwenvl batch is writing it"):
            Journal(path, JOB, LINES)
        journal.append(LINES.items())
    with Journal(path, JOB, LINES) as journal:
        assert len(journal) == len(LINES)


def test_a_journal_without_lines_removes_its_file(path):
    with Journal(path, JOB, LINES):
        assert path.is_file()
    assert not path.exists()


def test_lines_are_in_the_file_when_append_returns(path):
    with Journal(path, JOB, LINES) as journal:
        for n, key in enumerate(LINES, start=1):
            journal.append([(key, LINES[key])])
            assert path.read_bytes().count(b"\n") == 1 + n
