"""Fuzzer: `qwenvl` with a corrupted input succeeds or prints a one-line error, in bounded memory and time.

Inputs are configs, indices of shards, weight files, adapters, manifests, images and recipes. QWENVL_FUZZ_SECONDS is the
time for all targets together (default 60), QWENVL_FUZZ_SEED the seed (default 0). The first input with each problem is
stored in found/TARGET and repeated in every later run; remove stored inputs that fail for the same reason as another.
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

TOTAL_SECONDS = float(os.environ.get("QWENVL_FUZZ_SECONDS") or 60)
SEED = int(os.environ.get("QWENVL_FUZZ_SEED") or 0)
FOUND = Path(__file__).with_name("found")
# Targets whose input is a part of a model folder or of an adapter. One process reads BATCH_SIZE of these inputs.
BATCH_TARGETS = (
    *("config", "index", "safetensors", "bin", "bin_table", "bin_legacy", "pdparams", "ranks", "gptq"),
    *("lora_peft", "lora_peft_bin", "lora_paddlenlp", "lora_pdparams"),
)
NAMES = (*BATCH_TARGETS, "manifest_vision", "manifest_language", "image", "recipe")
BATCH_SIZE = 20

# Limits for one input. child.py kills a process later, after its TIMEOUT.
MAX_MIB = 2048
MAX_SECONDS = 20.0
# A target's test ends after this number of different problems.
MAX_PROBLEMS = 20


class Runner:
    """Writes inputs into folders and lets child.py run `qwenvl` on them."""

    def __init__(self, folder: Path) -> None:
        base = folder / "base"
        base.mkdir(parents=True)
        make_base(base)
        self.targets: dict[str, Target] = targets(base)
        self._work = folder / "work"
        self._child: subprocess.Popen[str] | None = None

    def problem(self, target: Target, data: bytes) -> str | None:
        """Run `qwenvl` with an input and check the exit code, time, memory and message.

        Returns:
            A description of the first that is wrong, None if all are right.
        """
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        reply = self._run(target.lay_out(data, self._work))
        exit_code = reply["exit_code"]
        # A dry run of a recipe prints warnings, which are allowed.
        lines = [line for line in reply["stderr"].splitlines() if not line.startswith("warning: ")]
        if exit_code not in (0, 1, 2):
            return f"exit code {exit_code}: {lines[-1:]}"
        if reply["seconds"] > MAX_SECONDS:
            return f"took {reply['seconds']:.0f} s"
        if reply["peak_mib"] > MAX_MIB:
            return f"took {reply['peak_mib']:.0f} MiB"
        if not lines:
            return f"exit code {exit_code} without a message" if exit_code else None
        if len(lines) > 1 or not lines[0].startswith("qwenvl: "):
            return f"not a one-line error: {lines[:3]}"
        if "internal error" in lines[0] or "out of memory" in lines[0]:
            return f"exit code {exit_code}: {lines}"
        return None

    def suspects(self, target: Target, inputs: list[bytes]) -> list[bytes]:
        """Read several inputs, parts of a model or an adapter, in one process; return those that may have a problem.

        If the process took too much memory, these are all inputs. Otherwise they are those that took more than a
        quarter of MAX_SECONDS (`qwenvl` does more than read an input) or had a wrong message, and the first one without
        a line of output, which ended the process.
        """
        shutil.rmtree(self._work, ignore_errors=True)
        folders = [self._work / str(i) for i in range(len(inputs))]
        for folder, data in zip(folders, inputs):
            target.lay_out(data, folder)
        reply = self._run([], models=[str(folder / "model") for folder in folders])
        outcomes = [json.loads(line) for line in reply["stdout"].splitlines()]
        if reply["peak_mib"] > MAX_MIB:
            return inputs
        failed = [
            data
            for data, outcome in zip(inputs, outcomes)
            if outcome["seconds"] > MAX_SECONDS / 4
            or outcome["error"].startswith("internal error")
            or len(outcome["error"].splitlines()) > 1
        ]
        ended_process = inputs[len(outcomes) : len(outcomes) + 1]
        return failed + ended_process

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def _run(self, arguments: list[str], **options: Any) -> dict[str, Any]:
        """Send a job to child.py and return the reply; child.py describes both."""
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
        job = {"arguments": arguments, "folder": str(self._work), **options}
        self._child.stdin.write(json.dumps(job) + "\n")
        self._child.stdin.flush()
        reply: dict[str, Any] = json.loads(self._child.stdout.readline())
        return reply


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("fuzz"))
    yield runner
    runner.close()


@pytest.mark.parametrize("name", NAMES)
def test_valid_inputs_and_inputs_that_once_failed(name: str, runner: Runner) -> None:
    target = runner.targets[name]
    for data in target.seeds:
        assert runner.problem(target, data) is None
    for path in sorted((FOUND / name).glob("*")):
        assert runner.problem(target, path.read_bytes()) is None, path


@pytest.mark.parametrize("name", NAMES)
def test_corrupted_inputs(name: str, runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    target = runner.targets[name]
    deadline = time.monotonic() + TOTAL_SECONDS / len(NAMES)
    n_tried = 0
    problems: dict[str, Path] = {}  # problem: the first input that has it
    while time.monotonic() < deadline and len(problems) < MAX_PROBLEMS:
        inputs = []
        for _ in range(BATCH_SIZE if name in BATCH_TARGETS else 1):
            random = Random(f"{name} {SEED} {n_tried}")
            inputs.append(corrupted(random.choice(target.seeds), random, target.words, target.is_json))
            n_tried += 1
        if name in BATCH_TARGETS:
            inputs = runner.suspects(target, inputs)
        for data in inputs:
            problem = runner.problem(target, data)
            if problem is not None and problem not in problems:
                path = FOUND / name / hashlib.sha256(data).hexdigest()[:12]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                problems[problem] = path
    with capsys.disabled():
        print(f"\n{name}: {n_tried} inputs of seed {SEED}, {len(problems)} different problems")
    assert not problems
