"""Jobs of `qwenvl batch --ray` with parts answered in this process: paths and URLs, resumption, errors."""

from __future__ import annotations

import contextlib
import io
import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fsspec", reason="fsspec is missing; pip install 'paddlemix-qwenvl-plugin[ray]'")

from paddlemix_qwenvl_plugin import QwenVL, QwenVLError
from paddlemix_qwenvl_plugin.batch.job import run as run_alone
from paddlemix_qwenvl_plugin.batch.source import Source
from paddlemix_qwenvl_plugin.cluster.batch import job as module
from paddlemix_qwenvl_plugin.cluster.batch.files import absolute, filesystem, join, listed, opened, write
from paddlemix_qwenvl_plugin.cluster.batch.job import Job, Result, run
from paddlemix_qwenvl_plugin.cluster.batch.pool import Actors
from paddlemix_qwenvl_plugin.cluster.batch.worker import Worker
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions

OPTIONS = GenerationOptions(max_new_tokens=3)
N_ROWS = 30


@pytest.fixture(scope="module")
def model(tiny_exported: Path) -> QwenVL:
    return QwenVL.from_exported(tiny_exported / "vision" / "vision", tiny_exported / "text" / "qwen")


class InProcess:
    """Stub of Ray's actor pool: answers parts in this process and fails after `until` parts."""

    def __init__(self, model: QwenVL) -> None:
        self._model = model
        self.until = 1000
        self.answered: list[int] = []

    def __call__(self, work: Any, parts: Any, actors: Any) -> Any:
        worker = Worker(work)
        for part in parts:
            if len(self.answered) >= self.until:
                raise QwenVLError("stopped")
            result = worker({"part": [part.dump()]})
            if result["error"][0]:
                raise QwenVLError(result["error"][0])
            self.answered.append(part.index)
            yield result["rows"][0]

    def run(
        self, source: object, target: object, options: GenerationOptions = OPTIONS, **more: Any
    ) -> Result:
        prompt = more.get("prompt")
        job = Job(absolute(str(source)), absolute(str(target)), "in", "out", prompt, options, 2)
        return run(job, lambda: self._model, Actors(maximum=3), "")


@pytest.fixture
def here(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    here = InProcess(model)
    monkeypatch.setattr(module, "connect", contextlib.nullcontext)
    monkeypatch.setattr(module, "describe_model", lambda *_: (model.weights, model.picture_label))
    monkeypatch.setattr(module, "answered", here)
    return here


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "png")
    return buffer.getvalue()


def rows() -> bytes:
    """JSONL input with three failing rows, one of them without an id, and blank lines."""
    rows: list[Any] = [{"id": n, "prompt": f"{n}?"} for n in range(N_ROWS)]
    rows[4] = {"id": 4, "image": "a/red.png"}
    rows[7] = {"id": 7, "image": "a/none.png"}
    rows[8] = {"custom_id": "8", "body": {"messages": []}}
    rows[9] = {"prompt": "?"}
    return b"\n".join(json.dumps(row).encode() + b"\n" * (n % 5 == 0) for n, row in enumerate(rows))


def lines(folder: str, *names: str) -> list[Any]:
    found = []
    for name in names or [name for name in listed(folder) if name.startswith("part-")]:
        with opened(join(folder, name)) as file:
            found += [json.loads(line) for line in file]
    return found


@pytest.fixture(params=["path", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Folder with an input file: a path, or a URL of a file system without folders, like an object store."""
    if request.param == "s3":
        folder = f"{request.getfixturevalue('bucket')}/data"
    else:
        folder = str(tmp_path) if request.param == "path" else f"memory://{uuid.uuid4().hex}"
    write(join(folder, "in.jsonl"), rows())
    write(join(folder, "a/red.png"), png("red"))
    return folder


# Not all tests: a request takes the S3 server up to a tenth of a second.
also_in_a_bucket = pytest.mark.parametrize("place", ["path", "memory", "s3"], indirect=True)


@also_in_a_bucket
def test_the_parts_equal_the_output_of_one_machine(place, tmp_path, model, here):
    result = here.run(f"{place}/in.jsonl", f"{place}/out")
    n_parts = -(-N_ROWS // 3)
    assert result == Result(N_ROWS, n_parts, 3, True)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "in.jsonl").write_bytes(rows())
    (tmp_path / "alone" / "a").mkdir()
    (tmp_path / "alone" / "a" / "red.png").write_bytes(png("red"))
    run_alone(Source(tmp_path / "alone" / "in.jsonl", OPTIONS), tmp_path / "alone.jsonl", model, 4)
    alone = (tmp_path / "alone.jsonl").read_text().replace(str(tmp_path / "alone"), place)
    expected = [json.loads(line) for line in alone.splitlines()]
    assert lines(f"{place}/out") == expected
    assert lines(f"{place}/out", "errors.jsonl") == [row for row in expected if row.get("error")]
    assert [*listed(f"{place}/out")] == [
        "errors.jsonl",
        "job.json",
        *(f"part-{n:05}.jsonl" for n in range(n_parts)),
    ]


@also_in_a_bucket
def test_resumption(place, here, capsys):
    here.until = 4
    with pytest.raises(QwenVLError, match="stopped"):
        here.run(f"{place}/in.jsonl", f"{place}/out")
    write(f"{place}/out/.partial-of-a-killed-actor", b"{")
    here.until = 1000
    here.run(f"{place}/in.jsonl", f"{place}/out")
    assert here.answered == [*range(10)]
    assert capsys.readouterr().err == f"resuming: 12 of {N_ROWS} rows are answered\n"
    assert not here.run(f"{place}/in.jsonl", f"{place}/out").ran
    assert here.answered == [*range(10)]
    assert not [name for name in listed(f"{place}/out") if name.startswith(".")]


def test_another_job_is_refused(place, here):
    here.run(f"{place}/in.jsonl", f"{place}/out")
    other = GenerationOptions(max_new_tokens=4)
    message = (
        r"out/job.json: belongs to another job \(different: options\); remove the folder or name another"
    )
    with pytest.raises(QwenVLError, match=message):
        here.run(f"{place}/in.jsonl", f"{place}/out", other)


def test_other_weights_are_refused(place, here, monkeypatch):
    here.until = 1
    with pytest.raises(QwenVLError, match="stopped"):
        here.run(f"{place}/in.jsonl", f"{place}/out")
    monkeypatch.setattr(module, "describe_model", lambda *_: (["other"], ""))
    with pytest.raises(QwenVLError, match=r"out/job.json: .*\(different: weights, picture_label\)"):
        here.run(f"{place}/in.jsonl", f"{place}/out")


def test_an_actor_with_other_weights_is_refused(place, here, monkeypatch):
    monkeypatch.setattr(module, "describe_model", lambda *_: (["other"], ""))
    with pytest.raises(QwenVLError, match="the weights of an actor differ from those of the job"):
        here.run(f"{place}/in.jsonl", f"{place}/out")


def test_a_damaged_part_is_named(place, here):
    here.run(f"{place}/in.jsonl", f"{place}/out")
    write(f"{place}/out/part-00002.jsonl", b'{"id": 6, "text": ""}\n')
    with pytest.raises(
        QwenVLError, match=r"part-00002.jsonl: does not have the results of its rows; remove it"
    ):
        here.run(f"{place}/in.jsonl", f"{place}/out")
    file_system, path = filesystem(f"{place}/out/part-00002.jsonl")
    file_system.rm_file(path)
    here.run(f"{place}/in.jsonl", f"{place}/out")
    assert here.answered == [*range(10), 2]


def test_a_changed_input_is_noticed(place, here, monkeypatch):
    index = module.index

    def index_and_change(*arguments: Any) -> Any:
        yield from index(*arguments)
        write(f"{place}/in.jsonl", rows().replace(b'"id": 1,', b'"id": 91,'))

    monkeypatch.setattr(module, "index", index_and_change)
    with pytest.raises(QwenVLError, match=r"in.jsonl: was changed while it was being read; start again"):
        here.run(f"{place}/in.jsonl", f"{place}/out")


@also_in_a_bucket
def test_a_folder_of_images(place, here, model):
    result = here.run(f"{place}/a", f"{place}/out", prompt="What is it?")
    answer = model.generate([{"image": png("red")}, {"text": "What is it?"}], max_new_tokens=3)
    assert result == Result(1, 1, 0, True)
    (row,) = lines(f"{place}/out")
    assert (row["id"], row["text"]) == ("red.png", answer.text)
