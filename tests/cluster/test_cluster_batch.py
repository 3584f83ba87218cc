"""`qwenvl batch --ray` on three local nodes, with kills of actors, nodes and the command itself (the driver).

The tests run only with QWENVL_TEST_CLUSTER_KILLS=1 (conftest.py).
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("ray.data", reason="Ray is missing; pip install 'paddlemix-qwenvl-plugin[ray]'")

from batch_cluster import BatchProcess, LocalCluster, kill
from fsspec import filesystem

from paddlemix_qwenvl_plugin.serve.demo_model import DemoStages, demo_stages

N_ROWS = 2000
KILLS = ("actor",) * 4 + ("node",) * 3 + ("driver",) * 3
OPTIONS = ("--max_new_tokens", 2)


@pytest.fixture(scope="module")
def stages() -> DemoStages:
    return demo_stages(print)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with tempfile.TemporaryDirectory(prefix="qv-") as folder:  # short: the paths of sockets are limited
        cluster = LocalCluster(Path(folder), 3)
        yield cluster
        cluster.shutdown()


def write_input(folder: Path, n_rows: int) -> Path:
    """Write a JSONL input: of every 50 rows one has an image, one is in OpenAI's form, one fails, one is sampled."""
    colours = ("red", "green", "blue")
    for colour in colours:
        Image.new("RGB", (8, 8), colour).save(folder / f"{colour}.png")
    rows: list[Any] = [{"id": n, "prompt": f"{n}?"} for n in range(n_rows)]
    for n in range(0, n_rows, 50):
        rows[n] = {"id": f"image {n}", "image": f"{colours[n % 3]}.png", "prompt": f"{n}?"}
        rows[n + 1] = {"custom_id": f"chat {n}", "body": {"messages": [{"role": "user", "content": f"{n}?"}]}}
        rows[n + 2] = {"id": f"bad {n}", "image": "none.png"}
        rows[n + 3] = {"id": f"sampled {n}", "prompt": "?", "temperature": 3, "seed": n}
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_results(path: Path) -> list[Any]:
    """Read the results in a JSONL file, without their timestamps."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    for row in rows:
        if row.get("response"):
            del row["response"]["body"]["created"]
    return rows


def read_parts(folder: Path) -> list[Any]:
    return [row for path in sorted(folder.glob("part-*.jsonl")) for row in read_results(path)]


@pytest.mark.kills
def test_input_and_output_in_a_bucket(tmp_path, stages, bucket, cluster):
    """Results in a bucket equal those of one machine, although an actor is killed during the job."""
    n_rows, options = 400, ("--max_new_tokens", 24)
    source = write_input(tmp_path, n_rows)
    s3 = filesystem("s3")
    s3.put([str(path) for path in tmp_path.iterdir()], f"{bucket}/in/")
    alone = BatchProcess(stages, tmp_path / "alone", source, tmp_path / "alone.jsonl", *options)
    assert alone.finish()[0] == 1  # the exit code if rows failed
    # Error messages name the image files.
    expected = (tmp_path / "alone.jsonl").read_text().replace(str(tmp_path), f"{bucket}/in")
    (tmp_path / "alone.jsonl").write_text(expected)

    ray_flags = ("--ray", cluster.address, "--ray_actors", "1:2", "--ray_cpus", 0.75, "--batch_size", 8)
    job = BatchProcess(
        stages, tmp_path / "job", f"{bucket}/in/in.jsonl", f"{bucket}/out", *options, *ray_flags
    )
    actors: list[int] = []
    while not actors:
        assert job.process.poll() is None, job.finish()
        time.sleep(0.05)
        s3.invalidate_cache()
        if s3.exists(f"{bucket}/out/part-00000.jsonl"):
            actors = cluster.actors()
    kill(actors[0])
    code, out, err = job.finish()
    assert (code, err.splitlines()[-1]) == (
        1,
        f"qwenvl: {n_rows // 50} of {n_rows} rows failed; see their errors in {bucket}/out/errors.jsonl",
    )
    s3.invalidate_cache()
    s3.get(f"{bucket}/out", str(tmp_path / "out"), recursive=True)
    parts = sorted((tmp_path / "out").glob("part-*.jsonl"))
    assert f"{bucket}/out: wrote {n_rows} rows in {len(parts)} parts" in out.splitlines()
    assert read_parts(tmp_path / "out") == read_results(tmp_path / "alone.jsonl")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "job.json",
        "errors.jsonl",
        *(path.name for path in parts),
    }


@pytest.mark.kills
def test_killed_ten_times(tmp_path, stages, cluster):
    source, targets = write_input(tmp_path, N_ROWS), [tmp_path / "out-0"]
    alone = BatchProcess(
        stages, tmp_path / "alone", source, tmp_path / "alone.jsonl", *OPTIONS, "--batch_size", 32
    )
    # The cluster has CPUs for three actors. The maximum of 40 only makes the parts small.
    ray_flags = ("--ray", cluster.address, "--ray_actors", "1:40", "--ray_cpus", 0.75)

    def run() -> BatchProcess:
        return BatchProcess(stages, tmp_path / "job", source, targets[-1], *OPTIONS, *ray_flags)

    def n_parts() -> int:
        return len([*targets[-1].glob("part-*.jsonl")])

    def is_complete(code: int, out: str, err: str) -> bool:
        line = f"{N_ROWS // 50} of {N_ROWS} rows failed; see their errors in {targets[-1]}/errors.jsonl"
        written = {f"wrote {N_ROWS} rows in {n_parts()} parts", f"has all {N_ROWS} rows already"}
        written = {f"{targets[-1]}: {text}" for text in written}
        return (code, err.splitlines()[-1:]) == (1, [f"qwenvl: {line}"]) and bool(
            written & {*out.splitlines()}
        )

    rng = random.Random(0)
    remaining_kills = rng.sample(KILLS, len(KILLS))
    killed: list[str] = []
    parts_before_next_kill = 1  # number of parts that must exist
    job = run()
    while remaining_kills:
        time.sleep(rng.random() * 0.2)
        if job.process.poll() is not None:
            ended = job.finish()
            if is_complete(*ended):
                # The machine is too busy for ten kills in time: continue with another job.
                targets.append(tmp_path / f"out-{len(targets)}")
                parts_before_next_kill = 1
            else:
                # The job has failed: only after the kill of a node, since all nodes have the same IP address, and older
                # versions of Ray may attach the driver to the killed one. The next run resumes the job.
                assert killed[-1] == "node", (ended, killed)
                # No other error of `qwenvl` is printed.
                assert "qwenvl: " not in ended[2].replace("qwenvl: the job failed on the cluster (", "")
            job = run()
        actors = cluster.actors()
        if n_parts() < parts_before_next_kill or not actors:
            continue
        kind = remaining_kills.pop()
        if kind == "actor":
            kill(rng.choice(actors))
        elif kind == "node":
            cluster.kill_node(rng)
            cluster.fill()
        else:
            kill(job.process.pid)
            job.process.wait()
            job = run()
        killed.append(kind)
        parts_before_next_kill = n_parts() + rng.randrange(1, 3)
        print(f"{time.monotonic():.0f} s, {n_parts()} parts: killed {kind}", flush=True)
    ended = job.finish()
    assert is_complete(*ended), ended
    assert alone.finish()[0] == 1
    expected = read_results(tmp_path / "alone.jsonl")
    assert len({str(row.get("custom_id", row.get("id"))) for row in expected}) == N_ROWS
    for target in targets:
        assert read_parts(target) == expected
        assert read_results(target / "errors.jsonl") == [row for row in expected if row.get("error")]
        assert not [*target.glob(".*")]
