"""Run a recipe: create a dated folder, run the steps, check the expectations, record the results."""

from __future__ import annotations

import os
import shlex
import signal
import statistics
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

from paddlemix_qwenvl_plugin.recipes import (
    commands,
    environment,
    expect,
    interpolate,
    preflight,
    process,
    run_folder,
)
from paddlemix_qwenvl_plugin.recipes.schema import Recipe, Step
from paddlemix_qwenvl_plugin.recipes.step_line import StepLine, seconds_text
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.files import write_text


def run(recipe: Recipe, output: Path, from_step: Optional[str] = None) -> Path:
    """Run the recipe's steps and check its expectations. Returns the run folder, `output`/DATE-TIME-NAME.

    With `from_step`, the newest run of the recipe resumes at that step in its folder; it must have been run from the
    same resolved recipe.

    Raises:
        UsageError: the recipe has no step `from_step`, or the run folder cannot be created in `output`.
        QwenVLError: a requirement is not met, an asset is missing or has another digest, no run can be resumed at
            `from_step`, a step failed or was stopped, or an expectation was missed. A failed or stopped step and missed
            expectations are in results.json.
        KeyboardInterrupt, SystemExit: re-raised (Ctrl-C, SIGTERM, SIGHUP) after the step was ended and results.json
            written.
    """
    first = _index(recipe, from_step)
    missing = preflight.problems(recipe, output)
    if missing:
        raise QwenVLError(f"recipe {recipe.name} cannot run here: {'; '.join(missing)}")
    folder = run_folder.find_resumable(recipe, output, first) if from_step else run_folder.new(recipe, output)
    earlier = run_folder.earlier_results(folder, recipe, first) if from_step else None
    write_text(folder / "recipe.resolved.yaml", run_folder.to_yaml(recipe.resolved()))
    write_text(folder / "environment.json", run_folder.to_json(environment.describe()))
    write_text(folder / "commands.txt", "\n".join(commands.shell_lines(recipe, folder)) + "\n")
    print(f"{recipe.name}: {folder}", flush=True)
    _Run(recipe, folder, first, earlier).run()
    return folder


def dry_run(recipe: Recipe, output: Path, from_step: Optional[str] = None) -> list[str]:
    """Print the commands of a run without running them. Returns the unmet requirements and asset problems.

    Raises:
        UsageError: the recipe has no step `from_step`.
        QwenVLError: no run can be resumed at `from_step`.
    """
    first = _index(recipe, from_step)
    if from_step:
        folder = run_folder.find_resumable(recipe, output, first)
        run_folder.earlier_results(folder, recipe, first)  # for its errors
    else:
        folder = run_folder.dated(recipe, output)
    print("\n".join(commands.shell_lines(recipe, folder, first)))
    return preflight.problems(recipe, output)


class _Run:
    """A run in progress.

    `results`: contents of results.json, which is written at the start of each step and at the end of the run.
    """

    def __init__(self, recipe: Recipe, folder: Path, first: int, earlier: Optional[dict[str, Any]]) -> None:
        self.recipe = recipe
        self.folder = folder
        self.first = first
        self.values = commands.values(recipe, folder)
        # Unbuffered, so that the log of a killed step is complete.
        self.env = {**os.environ, "PYTHONUNBUFFERED": "1", **commands.env(recipe, self.values)}
        pending = [_step_result(step.name) for step in recipe.steps[first:]]
        self.results: dict[str, Any] = {
            "recipe": recipe.name,
            "status": "running",
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "resumed_from": recipe.steps[first].name if earlier else None,
            "seconds": 0.0,
            "steps": [*(earlier["steps"][:first] if earlier else []), *pending],
            "expect": [],
            # Earlier timings of a step from `first` on are discarded, even if this run does not complete the step.
            "bench": earlier["bench"] if earlier and self._bench_is_skipped() else None,
        }

    def run(self) -> None:
        try:
            for index in range(self.first, len(self.recipe.steps)):
                self._step(index)
            self._check_expectations()
        except (KeyboardInterrupt, SystemExit):
            self._save("interrupted")
            raise
        except QwenVLError:
            self._save("failed")
            raise
        self._save("ok")
        print(f"ok: {len(self.recipe.steps)} steps, {len(self.recipe.expect)} expectations", flush=True)

    def _bench_is_skipped(self) -> bool:
        """Whether the benchmarked step is before the first step to run."""
        bench = self.recipe.bench
        return bench is not None and bench.step in [step.name for step in self.recipe.steps[: self.first]]

    def _save(self, status: str) -> None:
        self.results["status"] = status
        self.results["seconds"] = round(sum(step["seconds"] for step in self.results["steps"]), 3)
        write_text(self.folder / "results.json", run_folder.to_json(self.results))

    def _step(self, index: int) -> None:
        step, result = self.recipe.steps[index], self.results["steps"][index]
        label = f"[{index + 1}/{len(self.recipe.steps)}] {step.name}"
        result["status"] = "running"
        self._save("running")
        start = time.monotonic()
        log_path = self.folder / "log.txt"
        with StepLine(label) as line, log_path.open("ab") as log:
            log_start = log.tell()
            try:
                finished, seconds = self._repeat(step, line, log)
            except (KeyboardInterrupt, SystemExit):
                result.update(status="interrupted", seconds=round(time.monotonic() - start, 3))
                raise
            except QwenVLError as error:
                result["status"] = "failed"
                line.done("FAILED")
                raise QwenVLError(f"step {step.name}: {error}") from error
            total = round(time.monotonic() - start, 3)
            result.update(exit_code=finished.exit_code, seconds=total)
            problem = _problem(step, finished)
            if problem is None:
                result["status"] = "ok"
                line.done(f"ok {seconds_text(total)}{_bench_text(seconds)}")
            else:
                result["status"] = "timeout" if finished.timed_out else "failed"
                line.done(f"FAILED {seconds_text(total)}")
        if problem is not None:
            print(run_folder.tail(log_path, log_start), flush=True)
            raise QwenVLError(f"step {step.name} {problem}; log: {log_path}")

    def _repeat(self, step: Step, line: StepLine, log: Any) -> tuple[process.Finished, list[float]]:
        """Run a step once, or as often as `bench` requires; a run that fails is the last.

        Returns the outcome of the last run, and the seconds of each counted run (none without `bench` or if a run
        failed).
        """
        bench = self.recipe.bench if self.recipe.bench and self.recipe.bench.step == step.name else None
        argv = commands.argv(step, self.values)
        seconds: list[float] = []
        for _ in range(bench.warmup + bench.repeat if bench else 1):
            log.write(f"==== {step.name}: {shlex.join(argv)}\n".encode())
            log.flush()
            finished = process.run(argv, self.env, log, step.timeout_seconds, line.tick)
            seconds.append(finished.seconds)
            if finished.exit_code or finished.timed_out or finished.log_full:
                return finished, []
        if bench is None:
            return finished, []
        counted = seconds[bench.warmup :]
        self.results["bench"] = {
            **bench.model_dump(),
            "median_seconds": round(statistics.median(counted), 3),
            "min_seconds": round(min(counted), 3),
            "seconds": [round(value, 3) for value in counted],
        }
        return finished, counted

    def _check_expectations(self) -> None:
        n_missed = 0
        for item in self.recipe.expect:
            result = expect.evaluate(item, Path(interpolate.fill(item.file, self.values)))
            self.results["expect"].append(result)
            verdict = "ok" if result["ok"] else f"MISSED: {result['problem'] or repr(result['actual'])}"
            print(f"expect {expect.describe(result)} … {verdict}", flush=True)
            n_missed += not result["ok"]
        if n_missed:
            results = self.folder / "results.json"
            raise QwenVLError(f"{n_missed} of {len(self.recipe.expect)} expectations missed; see {results}")


def _step_result(name: str) -> dict[str, Any]:
    return {"name": name, "status": "not run", "seconds": 0.0, "exit_code": None}


def _bench_text(seconds: list[float]) -> str:
    if not seconds:
        return ""
    median, minimum = seconds_text(statistics.median(seconds)), seconds_text(min(seconds))
    return f" (median {median}, min {minimum} of {len(seconds)})"


def _problem(step: Step, finished: process.Finished) -> Optional[str]:
    if finished.timed_out:
        return f"was stopped after timeout_seconds {step.timeout_seconds:g}"
    if finished.log_full:
        return f"was stopped: the log is larger than {process.LOG_MIB} MiB"
    if finished.exit_code < 0:
        number = -finished.exit_code
        has_name = number in [int(s) for s in signal.Signals]
        return f"was ended by {signal.Signals(number).name if has_name else f'signal {number}'}"
    return f"failed with exit code {finished.exit_code}" if finished.exit_code else None


def _index(recipe: Recipe, from_step: Optional[str]) -> int:
    names = [step.name for step in recipe.steps]
    if from_step is not None and from_step not in names:
        raise UsageError(
            f"--from_step {from_step}: {recipe.name} has no such step; steps: {', '.join(names)}"
        )
    return 0 if from_step is None else names.index(from_step)
