"""Cases of docs/errors.md for `qwenvl batch --ray`; error_cases.py explains what a case is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from error_cases import ROW, Bench, Case, case, cases


def ray(*flags: str, address: str = "", **options: Any) -> Case:
    """`batch --ray` with these flags; `options` are those of `Bench.batch`."""
    return lambda bench: bench.batch(f"--ray={address}", *flags, out="out", **options)


cases(
    {
        "a flag of `--ray` without it": lambda bench: bench.batch("--ray_actors", "2"),
        "more actors at least than at most": ray("--ray_actors", "4:2"),
        "a share of several GPUs": ray("--ray_gpus", "1.5"),
        "an infinite number of CPUs": ray("--ray_cpus", "inf"),
        "something that is no address": ray(address="cluster"),
        "a cluster that is not there": ray(address="127.0.0.1:1"),
        "two rows of one id, with `--ray`": ray(rows=[ROW, {**ROW, "id": "b"}, ROW]),
    }
)


@case("`--ray` without Ray")
def _(bench: Bench) -> list[str]:
    bench.monkeypatch.setitem(sys.modules, "ray", None)
    return bench.batch("--ray", out="out")


@case("standard input with `--ray`")
def _(bench: Bench) -> list[str]:
    command = bench.batch("--ray", out="out")
    return ["batch", "-", *command[2:]]


@case("a server with `--ray`")
def _(bench: Bench) -> list[str]:
    return ["batch", "in.jsonl", "out", "--ray", "--url", "http://127.0.0.1:1"]


@case("the input is not there, with `--ray`")
def _(bench: Bench) -> list[str]:
    command = bench.batch("--ray", out="out")
    Path("in.jsonl").unlink()
    return command


def _input_folder(*names: str) -> Case:
    """`batch --ray` of a folder with empty files of these names."""

    def prepare(bench: Bench) -> list[str]:
        command = bench.batch("--ray", out="out")
        Path("in").mkdir()
        for name in names:
            Path("in", name).touch()
        return ["batch", "in", *command[2:]]

    return prepare


cases(
    {
        "a folder without rows": _input_folder("notes.txt"),
        "a folder with several formats": _input_folder("a.jsonl", "b.tar"),
    }
)


@case("a URL of an unknown kind")
def _(bench: Bench) -> list[str]:
    command = bench.batch("--ray", out="out")
    return ["batch", "cloud://in.jsonl", *command[2:]]


def _output_folder(name: str, text: str) -> Case:
    """`batch --ray` to a folder that has a file of this name and text."""

    def prepare(bench: Bench) -> list[str]:
        Path("out").mkdir()
        Path("out", name).write_text(text)
        return bench.batch("--ray", out="out")

    return prepare


# The job.json of a job with other input and options.
_OTHER_JOB = {
    "qwenvl_batch": 1,
    "input": "",
    "options": {},
    "weights": [],
    "picture_label": "Picture {}: ",
    "prompt": None,
    "part_rows": 8,
}

cases(
    {
        "the output folder is of another kind": _output_folder("notes.txt", ""),
        "the output folder of another job": _output_folder("job.json", json.dumps(_OTHER_JOB)),
        "job.json is not JSON": _output_folder("job.json", "{"),
    }
)
