"""Jobs of `qwenvl batch --ray` with parts answered in this process: paths and URLs, resumption, errors."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fsspec", reason="fsspec is missing; pip install 'paddlemix-qwenvl-plugin[ray]'")

from paddlemix_qwenvl_plugin import QwenVL, QwenVLError
from paddlemix_qwenvl_plugin.batch.job import run as run_alone
from paddlemix_qwenvl_plugin.batch.source import Source
from paddlemix_qwenvl_plugin.cluster.batch import job as job_module
from paddlemix_qwenvl_plugin.cluster.batch.files import absolute, filesystem, join, listed, opened, write
from paddlemix_qwenvl_plugin.cluster.batch.job import Job, Result, run
from paddlemix_qwenvl_plugin.cluster.batch.pool import Actors, describe_model
from paddlemix_qwenvl_plugin.cluster.batch.worker import Worker
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions

OPTIONS = GenerationOptions(max_new_tokens=3)
N_ROWS = 30


@pytest.fixture(scope="module")
def model(tiny_exported: Path) -> QwenVL:
    return QwenVL.from_exported(tiny_exported / "vision" / "vision", tiny_exported / "text" / "qwen")


class InProcessPool:
    """Stub of Ray's actor pool: answers parts in this process.

    Attributes:
        max_parts: number of answered parts after which the pool raises "stopped".
        answered: indices of the answered parts, over all runs.
    """

    def __init__(self, model: QwenVL) -> None:
        self._model = model
        self.max_parts = 1000
        self.answered: list[int] = []

    def __call__(self, work: Any, parts: Any, actors: Any) -> Any:
        worker = Worker(work)
        for part in parts:
            if len(self.answered) >= self.max_parts:
                raise QwenVLError("stopped")
            result = worker({"part": [part.dump()]})
            if result["error"][0]:
                raise QwenVLError(result["error"][0])
            self.answered.append(part.index)
            yield result["rows"][0]

    def run(
        self,
        source: object,
        target: object,
        options: GenerationOptions = OPTIONS,
        prompt: str | None = None,
    ) -> Result:
        """Run a job on this pool, with two concurrent rows per actor."""
        job = Job(
            absolute(str(source)),
            absolute(str(target)),
            source_name="in",
            name="out",
            prompt=prompt,
            options=options,
            window=2,
        )
        return run(job, lambda: self._model, Actors(maximum=3), address="")


@pytest.fixture
def pool(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> InProcessPool:
    pool = InProcessPool(model)
    monkeypatch.setattr(job_module, "connect", contextlib.nullcontext)
    monkeypatch.setattr(job_module, "describe_model", lambda *_: (model.weights, model.picture_label))
    monkeypatch.setattr(job_module, "answered", pool)
    return pool


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "png")
    return buffer.getvalue()


def jsonl_input() -> bytes:
    """Build an input with blank lines and three failing rows: 7, 8 and 9 (from 0), the last without an id."""
    rows: list[Any] = [{"id": n, "prompt": f"{n}?"} for n in range(N_ROWS)]
    rows[4] = {"id": 4, "image": "a/red.png"}
    rows[7] = {"id": 7, "image": "a/none.png"}
    rows[8] = {"custom_id": "8", "body": {"messages": []}}
    rows[9] = {"prompt": "?"}
    # A blank line follows every fifth row.
    return b"\n".join(json.dumps(row).encode() + b"\n" * (n % 5 == 0) for n, row in enumerate(rows))


def read_results(folder: str, *names: str) -> list[Any]:
    """Read the results in files of an output folder; without names, in all its parts."""
    results = []
    for name in names or [name for name in listed(folder) if name.startswith("part-")]:
        with opened(join(folder, name)) as file:
            results += [json.loads(line) for line in file]
    return results


@pytest.fixture(params=["path", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Folder with an input: a local path, or a URL on fsspec's memory file system or on the mock S3 server."""
    if request.param == "s3":
        folder = f"{request.getfixturevalue('bucket')}/data"
    else:
        folder = str(tmp_path) if request.param == "path" else f"memory://{uuid.uuid4().hex}"
    write(join(folder, "in.jsonl"), jsonl_input())
    write(join(folder, "a/red.png"), png("red"))
    return folder


# Only for some tests: the S3 server takes up to 0.1 s per request.
also_in_a_bucket = pytest.mark.parametrize("folder", ["path", "memory", "s3"], indirect=True)


@also_in_a_bucket
def test_the_parts_equal_the_output_of_one_machine(folder, tmp_path, model, pool):
    result = pool.run(f"{folder}/in.jsonl", f"{folder}/out")
    n_parts = N_ROWS // 3  # 3 rows per part: 30 rows / (3 actors * 4 parts per actor), rounded up
    assert result == Result(N_ROWS, n_parts, n_failed=3, ran=True)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "in.jsonl").write_bytes(jsonl_input())
    (tmp_path / "alone" / "a").mkdir()
    (tmp_path / "alone" / "a" / "red.png").write_bytes(png("red"))
    run_alone(Source(tmp_path / "alone" / "in.jsonl", OPTIONS), tmp_path / "alone.jsonl", model, 4)
    alone = (tmp_path / "alone.jsonl").read_text().replace(str(tmp_path / "alone"), folder)
    expected = [json.loads(line) for line in alone.splitlines()]
    assert read_results(f"{folder}/out") == expected
    assert read_results(f"{folder}/out", "errors.jsonl") == [row for row in expected if row.get("error")]
    assert [*listed(f"{folder}/out")] == [
        "errors.jsonl",
        "job.json",
        *(f"part-{n:05}.jsonl" for n in range(n_parts)),
    ]


@also_in_a_bucket
def test_resumption(folder, pool, capsys):
    pool.max_parts = 4
    with pytest.raises(QwenVLError, match="stopped"):
        pool.run(f"{folder}/in.jsonl", f"{folder}/out")
    write(f"{folder}/out/.partial-of-a-killed-actor", b"{")
    pool.max_parts = 1000
    pool.run(f"{folder}/in.jsonl", f"{folder}/out")
    assert pool.answered == [*range(10)]
    assert capsys.readouterr().err == f"resuming: 12 of {N_ROWS} rows are answered\n"
    assert not pool.run(f"{folder}/in.jsonl", f"{folder}/out").ran
    assert pool.answered == [*range(10)]
    assert not [name for name in listed(f"{folder}/out") if name.startswith(".")]


def test_another_job_is_refused(folder, pool):
    pool.run(f"{folder}/in.jsonl", f"{folder}/out")
    other = GenerationOptions(max_new_tokens=4)
    message = (
        r"out/job.json: belongs to another job \(different: options\); remove the folder or name another"
    )
    with pytest.raises(QwenVLError, match=message):
        pool.run(f"{folder}/in.jsonl", f"{folder}/out", other)


def test_other_weights_are_refused(folder, pool, monkeypatch):
    pool.max_parts = 1
    with pytest.raises(QwenVLError, match="stopped"):
        pool.run(f"{folder}/in.jsonl", f"{folder}/out")
    monkeypatch.setattr(job_module, "describe_model", lambda *_: (["other"], ""))
    with pytest.raises(QwenVLError, match=r"out/job.json: .*\(different: weights, picture_label\)"):
        pool.run(f"{folder}/in.jsonl", f"{folder}/out")


def test_an_actor_with_other_weights_is_refused(folder, pool, monkeypatch):
    monkeypatch.setattr(job_module, "describe_model", lambda *_: (["other"], ""))
    with pytest.raises(QwenVLError, match="the weights of an actor differ from those of the job"):
        pool.run(f"{folder}/in.jsonl", f"{folder}/out")


def test_a_damaged_part_is_named(folder, pool):
    pool.run(f"{folder}/in.jsonl", f"{folder}/out")
    write(f"{folder}/out/part-00002.jsonl", b'{"id": 6, "text": ""}\n')
    with pytest.raises(
        QwenVLError, match=r"part-00002.jsonl: does not have the results of its rows; remove it"
    ):
        pool.run(f"{folder}/in.jsonl", f"{folder}/out")
    file_system, path = filesystem(f"{folder}/out/part-00002.jsonl")
    file_system.rm_file(path)
    pool.run(f"{folder}/in.jsonl", f"{folder}/out")
    assert pool.answered == [*range(10), 2]


def test_a_changed_input_is_noticed(folder, pool, monkeypatch):
    index = job_module.index

    def index_and_change(*arguments: Any) -> Any:
        yield from index(*arguments)
        write(f"{folder}/in.jsonl", jsonl_input().replace(b'"id": 1,', b'"id": 91,'))

    monkeypatch.setattr(job_module, "index", index_and_change)
    with pytest.raises(QwenVLError, match=r"in.jsonl: was changed while it was being read; start again"):
        pool.run(f"{folder}/in.jsonl", f"{folder}/out")


def test_the_notice_while_the_model_is_not_described(monkeypatch, capsys):
    """The notice does not claim that a node is missing: the model may be slow to open."""
    result = SimpleNamespace(remote=lambda: "result")
    ray = SimpleNamespace(
        remote=lambda **_: lambda _describe: result,
        wait=lambda results, timeout: ([], results),
        get=lambda _: (["weights"], "label"),
        exceptions=SimpleNamespace(RayError=RuntimeError),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert describe_model(lambda: None, Actors(cpus=4, gpus=0.5)) == (["weights"], "label")
    notice = "waiting for a node with 4 CPUs and 0.5 GPUs, or for its worker to start and open the model\n"
    assert capsys.readouterr().err == notice


@also_in_a_bucket
def test_a_folder_of_images(folder, pool, model):
    result = pool.run(f"{folder}/a", f"{folder}/out", prompt="What is it?")
    answer = model.generate([{"image": png("red")}, {"text": "What is it?"}], max_new_tokens=3)
    assert result == Result(n_rows=1, n_parts=1, n_failed=0, ran=True)
    (row,) = read_results(f"{folder}/out")
    assert (row["id"], row["text"]) == ("red.png", answer.text)
