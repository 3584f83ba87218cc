"""The command `qwenvl batch`: flags, output, exit codes."""

from __future__ import annotations

import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from batch_helpers import STREET, openai_row, read_rows, text, user, write_rows
from fake_network import FakeNetwork

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.cli.main import main
from paddlemix_qwenvl_plugin.util import progress

ROWS = [{"id": n, "prompt": f"{n}?"} for n in range(3)]


@pytest.fixture
def batch(tiny_exported, tmp_path, monkeypatch, capsys):
    """Function that runs `qwenvl batch in.jsonl out.jsonl FLAGS` and returns the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for stage in ("vision", "text"):
        shutil.copytree(tiny_exported / stage, stage)

    def run(*flags):
        stages = ["--first_model_path", "vision/vision", "--second_model_path", "text/qwen"]
        monkeypatch.setattr(sys, "argv", ["qwenvl", "batch", "in.jsonl", "out.jsonl", *stages, *flags])
        with pytest.raises(SystemExit) as system_exit:
            main()
        return system_exit.value.code, *capsys.readouterr()

    return run


def test_flags_are_defaults_of_the_rows_options(batch):
    rows = [{"id": 1, "prompt": "?"}, {"id": 2, "prompt": "?", "max_new_tokens": 2}]
    rows += [openai_row("3", [user("?")]), openai_row("4", [user("?")], max_tokens=3)]
    write_rows(Path("in.jsonl"), rows)
    assert batch("--max_new_tokens", "4", "--batch_size", "2") == (0, "out.jsonl: wrote 4 rows\n", "")
    usages = [row.get("usage") or row["response"]["body"]["usage"] for row in read_rows(Path("out.jsonl"))]
    assert [usage["completion_tokens"] for usage in usages] == [4, 2, 4, 3]


def test_number_of_concurrent_rows(batch, monkeypatch):
    n_concurrent = []
    wait_any = QwenVL.wait_any

    def count_and_wait_any(self, streams):
        n_concurrent.append(len(streams))
        return wait_any(self, streams)

    monkeypatch.setattr(QwenVL, "wait_any", count_and_wait_any)
    write_rows(Path("in.jsonl"), [{"id": n, "prompt": "?"} for n in range(10)])
    for flags, expected in (((), 8), (("--batch_size", "3"), 3)):
        n_concurrent.clear()
        assert batch("--max_new_tokens", "2", *flags)[0] == 0
        assert max(n_concurrent) == expected
        Path("out.jsonl").unlink()


def test_a_complete_job_does_not_open_the_model(batch):
    write_rows(Path("in.jsonl"), ROWS)
    assert batch("--max_new_tokens", "1")[0] == 0
    output = Path("out.jsonl").read_bytes()
    shutil.rmtree("vision")
    # As if the first process had been killed between the rename of the output and the removal of this file.
    Path("out.jsonl.partial").write_bytes(b"content")
    assert batch() == (0, "out.jsonl: has all 3 rows already\n", "")
    assert Path("out.jsonl").read_bytes() == output
    assert not Path("out.jsonl.partial").exists()


def test_failed_rows_are_reported_by_every_run(batch):
    write_rows(Path("in.jsonl"), [*ROWS, {"id": "x", "image": "no.png"}, b"oops"])
    error = "qwenvl: 2 of 5 rows failed; see their errors in out.jsonl\n"
    assert batch("--max_new_tokens", "1") == (1, "out.jsonl: wrote 5 rows\n", error)
    assert batch("--max_new_tokens", "1") == (1, "out.jsonl: has all 5 rows already\n", error)


def test_progress_in_a_log(batch, monkeypatch):
    """Without a terminal, progress is printed as lines; a resumed job first prints the number of answered rows.

    Each row gets a line here, since the minimum time between two lines is set to 0.
    """
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    write_rows(Path("in.jsonl"), ROWS)
    with monkeypatch.context() as patch:
        # Fail when the output is written: the partial file remains.
        patch.setattr("paddlemix_qwenvl_plugin.batch.job.write_beside", lambda *_: 1 / 0)
        code, _, err = batch("--max_new_tokens", "1", "--batch_size", "2")
    assert code == 1
    assert [line for line in err.splitlines() if "/" in line] == [f"rows answered: {n}/3" for n in (1, 2, 3)]
    partial_file = Path("out.jsonl.partial")
    identity_and_two_rows = partial_file.read_bytes().splitlines(keepends=True)[:3]
    partial_file.write_bytes(b"".join(identity_and_two_rows))
    code, _, err = batch("--max_new_tokens", "1", "--batch_size", "2")
    assert (code, err.splitlines()) == (0, ["resuming: 2 of 3 rows are answered", "rows answered: 1/1"])


def test_allow_http(batch, tmp_path, monkeypatch):
    # A public address, whose connections FakeNetwork directs to this machine: local ones are refused.
    FakeNetwork(monkeypatch, {"images.example": [["93.184.215.14"]]})
    (tmp_path / "web").mkdir()
    shutil.copyfile(STREET, tmp_path / "web" / "street.png")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "web")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://images.example:{server.server_port}/street.png"
        rows = [openai_row("a", [user(url, text("?"))]), {"id": 2, "image": url}]
        write_rows(Path("in.jsonl"), rows)
        assert batch("--max_new_tokens", "1")[0] == 1
        errors = [row["error"] for row in read_rows(Path("out.jsonl"))]
        assert "downloading is off" in errors[0]["message"]
        assert "downloading is off" in errors[1]
        Path("out.jsonl").unlink()
        assert batch("--max_new_tokens", "1", "--allow_http")[0] == 0
        server.shutdown()
