"""`qwenvl batch --ray` on three local nodes, with actors, nodes and drivers killed at random."""

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

from batch_cluster import LocalCluster, finish, kill, start

from paddlemix_qwenvl_plugin.serve.demo_model import DemoStages, demo_stages

N_ROWS, KILLS = 2000, ("actor",) * 4 + ("node",) * 3 + ("driver",) * 3
OPTIONS = ("--max_new_tokens", 2)


@pytest.fixture(scope="module")
def stages() -> DemoStages:
    return demo_stages(print)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with tempfile.TemporaryDirectory(prefix="qv-") as folder:  # a short path: it will contain sockets
        cluster = LocalCluster(Path(folder), 3)
        yield cluster
        cluster.shutdown()


def write_input(folder: Path, n_rows: int) -> Path:
    """Write rows, a few with images or in OpenAI's form, and one in 50 with an error."""
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


def results(path: Path) -> list[Any]:
    """Read results, without the times in them."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    for row in rows:
        if row.get("response"):
            del row["response"]["body"]["created"]
    return rows


def all_results(folder: Path) -> list[Any]:
    return [row for path in sorted(folder.glob("part-*.jsonl")) for row in results(path)]


def test_killed_ten_times(tmp_path, stages, cluster):
    source, target = write_input(tmp_path, N_ROWS), tmp_path / "out"
    assert finish(start(stages, source, tmp_path / "expected.jsonl", *OPTIONS, "--batch_size", 32))[0] == 1
    n_failed = N_ROWS // 50

    def run():
        return start(
            stages,
            source,
            target,
            *OPTIONS,
            "--ray",
            cluster.address,
            "--ray_actors",
            "1:3",
            "--ray_cpus",
            0.75,
        )

    def n_parts():
        return len([*target.glob("part-*.jsonl")])

    rng = random.Random(0)
    kinds, killed, last = rng.sample(KILLS, len(KILLS)), list[str](), 0
    process = run()
    deadline = time.monotonic() + 900
    while kinds:
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, f"{n_parts()} parts, killed: {killed}"
        time.sleep(rng.random() * 0.2)
        if n_parts() < last + rng.randrange(1, 4) or not cluster.actors():
            continue
        last = n_parts()
        killed.append(kinds.pop())
        print(time.monotonic(), last, killed[-1], flush=True)
        if killed[-1] == "actor":
            kill(rng.choice(cluster.actors()))
        elif killed[-1] == "node":
            cluster.kill_node(rng)
            cluster.fill()
        else:
            process.kill()
            process.communicate()
            process = run()
    code, out, err = finish(process)
    assert (code, err.splitlines()[-1]) == (
        1,
        f"qwenvl: {n_failed} of {N_ROWS} rows failed; see their errors in {target}/errors.jsonl",
    )
    assert out.startswith(f"{target}: wrote {N_ROWS} rows in ")
    expected = results(tmp_path / "expected.jsonl")
    assert all_results(target) == expected
    assert len({str(row.get("custom_id", row.get("id"))) for row in expected}) == N_ROWS
    assert results(target / "errors.jsonl") == [row for row in expected if row.get("error")]
    assert not [*target.glob(".*")]
