"""The partial file: a restart keeps exactly the complete lines."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin.batch.journal import Journal
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

JOB = {"qwenvl_batch": 1, "input": "abc", "options": {"seed": None}, "weights": ["x", "y"]}
LINES = {json.dumps(key): f'{{"id": "{key}", "text": "回答{key}"}}\n'.encode() for key in "abcdef"}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda number: None)  # thousands of them take their time
    return tmp_path / "out.jsonl.partial"


def make(path, keys=tuple(LINES)):
    with Journal(path, JOB, LINES) as journal:
        journal.append((key, LINES[key]) for key in keys)
    return path.read_bytes()


def test_lines_come_back(path):
    make(path, list(LINES)[:2])
    with Journal(path, JOB, LINES) as journal:
        assert [key for key in LINES if key in journal] == list(LINES)[:2]
        last = list(LINES)[-1]
        journal.append([(last, LINES[last])])
        assert len(journal) == 3
        assert all(journal.line(key) == LINES[key] for key in LINES if key in journal)
    assert path.read_bytes().count(b"\n") == 4


def test_cut_at_every_byte(path):
    whole = make(path)
    for n in range(len(whole) + 1):
        path.write_bytes(whole[:n])
        with Journal(path, JOB, LINES) as journal:
            kept = [key for key in LINES if key in journal]
            # Brute force: as many lines as there are line ends after the first.
            assert len(kept) == max(whole[:n].count(b"\n") - 1, 0)
            journal.append((key, LINES[key]) for key in LINES if key not in journal)
            assert all(journal.line(key) == LINES[key] for key in LINES)
        assert path.read_bytes() == whole, n


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=40), n_lines=st.integers(0, 5))
def test_an_invalid_line_is_removed_with_all_lines_after_it(path, tail, n_lines):
    """After a power cut the last write may be on disk only in part."""
    path.unlink(missing_ok=True)
    good = make(path, list(LINES)[: n_lines + 1])
    path.write_bytes(good + b"\0" + tail + b"\n" + LINES[list(LINES)[-1]])
    with Journal(path, JOB, LINES) as journal:
        assert len(journal) == n_lines + 1
    assert path.read_bytes() == good


def test_a_duplicate_or_unknown_line_is_removed(path):
    first, second = list(LINES)[:2]
    good = make(path, [first])
    for bad in (LINES[first], b'{"id": "z", "text": ""}\n'):
        path.write_bytes(good + bad + LINES[second])
        with Journal(path, JOB, LINES) as journal:
            assert [key for key in LINES if key in journal] == [first]
        assert path.read_bytes() == good


def test_another_job_is_refused(path):
    whole = make(path)
    with pytest.raises(QwenVLError, match=r"another job \(different: input, options\); remove it"):
        Journal(path, {**JOB, "input": "abd", "options": {"seed": 1}}, LINES)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"my notes\n", b"my notes", b"[]\n", b'{"id": 1}\n', b"\xff\n"])
def test_another_file_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(QwenVLError, match="not a partial file of this version"):
        Journal(path, JOB, LINES)
    assert path.read_bytes() == content


def test_one_process_at_a_time(path):
    with Journal(path, JOB, LINES) as journal:
        with pytest.raises(QwenVLError, match="another qwenvl batch is writing it"):
            Journal(path, JOB, LINES)
        journal.append(LINES.items())
    with Journal(path, JOB, LINES) as journal:
        assert len(journal) == len(LINES)


def test_a_journal_without_lines_leaves_nothing(path):
    with Journal(path, JOB, LINES):
        assert path.is_file()
    assert not path.exists()


def test_lines_are_on_the_disk_when_append_returns(path):
    with Journal(path, JOB, LINES) as journal:
        for n, key in enumerate(LINES, start=1):
            journal.append([(key, LINES[key])])
            assert path.read_bytes().count(b"\n") == 1 + n
