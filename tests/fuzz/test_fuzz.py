"""Corrupted configs, weight files, manifests, images, recipes: a line or an answer, in bounded memory and time.

QWENVL_FUZZ_SECONDS is the time for all targets together (60), QWENVL_FUZZ_SEED the seed (0). An input that does harm is
kept in found/TARGET and repeated in every later run; remove inputs that add nothing new.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from mutate import corrupted
from targets import REPO, Target, make_base, targets

SECONDS = float(os.environ.get("QWENVL_FUZZ_SECONDS") or 60)
SEED = int(os.environ.get("QWENVL_FUZZ_SEED") or 0)
FOUND = Path(__file__).with_name("found")
# Parts of a model folder or of an adapter: several inputs are read by one process.
OF_MODELS = ("config", "index", "safetensors", "bin", "bin_table", "bin_legacy", "pdparams", "ranks", "gptq")
OF_ADAPTERS = ("lora_peft", "lora_peft_bin", "lora_paddlenlp", "lora_pdparams")
TOGETHER = (*OF_MODELS, *OF_ADAPTERS)
NAMES = (*TOGETHER, "manifest_vision", "manifest_language", "image", "recipe")
N_TOGETHER = 20

MAX_MIB = 2048
MAX_SECONDS = 20.0
MAX_FINDS = 20


class Runner:
    """Lays inputs out and has child.py run `qwenvl` on them."""

    def __init__(self, folder: Path) -> None:
        base = folder / "base"
        base.mkdir(parents=True)
        make_base(base)
        self.targets: dict[str, Target] = targets(base)
        self._work = folder / "work"
        self._child: subprocess.Popen[str] | None = None

    def problem(self, target: Target, data: bytes) -> str | None:
        """Problem of `qwenvl` with this input; None if it behaved well."""
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        ended = self._run(target.lay_out(data, self._work))
        # The warnings are of a dry run.
        said = [line for line in ended["said"].splitlines() if not line.startswith("warning: ")]
        if ended["ended"] not in (0, 1, 2):
            return f"ended with {ended['ended']}: {said[-1:]}"
        if ended["seconds"] > MAX_SECONDS:
            return f"took {ended['seconds']:.0f} s"
        if ended["mib"] > MAX_MIB:
            return f"took {ended['mib']:.0f} MiB"
        if len(said) > 1 or (said and not said[0].startswith("qwenvl: ")):
            return f"says more than a line: {said[:3]}"
        if any(word in said[0] for word in ("internal error", "out of memory")) if said else ended["ended"]:
            return f"ended with {ended['ended']}: {said}"
        return None

    def suspects(self, target: Target, inputs: list[bytes]) -> list[bytes]:
        """Those of several inputs, parts of a model or an adapter, that one process could not read or refuse well."""
        shutil.rmtree(self._work, ignore_errors=True)
        folders = [self._work / str(i) for i in range(len(inputs))]
        for folder, data in zip(folders, inputs):
            target.lay_out(data, folder)
        ended = self._run([], models=[str(folder / "model") for folder in folders])
        outcomes = [json.loads(line) for line in ended["printed"].splitlines()]
        if ended["mib"] > MAX_MIB:
            return inputs
        bad = [
            data
            for data, outcome in zip(inputs, outcomes)
            if outcome["seconds"] > MAX_SECONDS / 4
            or outcome["said"].startswith("internal error")
            or len(outcome["said"].splitlines()) > 1
        ]
        return bad + inputs[len(outcomes) : len(outcomes) + 1]

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def _run(self, arguments: list[str], **more: Any) -> dict[str, Any]:
        if self._child is None:
            environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "QWENVL_DEBUG": "0"}
            self._child = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("child.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**environment, "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                text=True,
            )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(
            json.dumps({"arguments": arguments, "folder": str(self._work), **more}) + "\n"
        )
        self._child.stdin.flush()
        answer: dict[str, Any] = json.loads(self._child.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    made = Runner(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.close()


@pytest.mark.parametrize("name", NAMES)
def test_good_inputs_and_those_that_once_did_harm(name: str, runner: Runner) -> None:
    target = runner.targets[name]
    kept = sorted((FOUND / name).glob("*"))
    for data in target.seeds:
        assert runner.problem(target, data) is None
    for path in kept:
        assert runner.problem(target, path.read_bytes()) is None, path


@pytest.mark.parametrize("name", NAMES)
def test_corrupted_inputs(name: str, runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    target = runner.targets[name]
    end = time.monotonic() + SECONDS / len(NAMES)
    n_tried, finds = 0, dict[str, Path]()
    while time.monotonic() < end and len(finds) < MAX_FINDS:
        inputs = []
        for _ in range(N_TOGETHER if name in TOGETHER else 1):
            random = Random(f"{name} {SEED} {n_tried}")
            inputs.append(corrupted(random.choice(target.seeds), random, target.words, target.is_json))
            n_tried += 1
        for data in runner.suspects(target, inputs) if name in TOGETHER else inputs:
            problem = runner.problem(target, data)
            if problem is not None and problem not in finds:
                path = FOUND / name / hashlib.sha256(data).hexdigest()[:12]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                finds[problem] = path
    with capsys.disabled():
        print(f"\n{name}: {n_tried} inputs of seed {SEED}, {len(finds)} did harm")
    assert not finds
