"""Run folders: creation, search for the run to resume, and their files."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from paddlemix_qwenvl_plugin.recipes.schema import Recipe
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

_LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 16384


def dated(recipe: Recipe, output: Path) -> Path:
    """Path of the run folder for a run that starts now."""
    return output.absolute() / f"{datetime.now():%Y%m%d-%H%M%S}-{recipe.name}"


def new(recipe: Recipe, output: Path) -> Path:
    """Create the folder of a run that starts now.

    Raises:
        UsageError: it cannot be created.
    """
    while True:
        folder = dated(recipe, output)
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            if not folder.is_dir():
                raise UsageError(
                    f"--output {output}: {error.filename} is a file or a broken link; name a folder"
                ) from None
            time.sleep(0.1)  # another run has this second's name; retry with the next second
        except OSError as error:
            raise UsageError(f"--output {output}: cannot make {folder} ({error.strerror})") from error
        else:
            return folder


def find_resumable(recipe: Recipe, output: Path, first: int) -> Path:
    """Find the recipe's newest run folder, to resume at step `first`; it must have the same resolved recipe.

    Raises:
        QwenVLError: no earlier run exists, or the newest was run from another recipe, is damaged or cannot be read.
    """
    name_pattern = re.compile(rf"\d{{8}}-\d{{6}}-{re.escape(recipe.name)}")
    folders = sorted(p for p in output.absolute().glob("*") if name_pattern.fullmatch(p.name) and p.is_dir())
    step = recipe.steps[first].name
    if not folders:
        raise QwenVLError(f"--from_step {step}: {output} has no earlier run of {recipe.name}")
    folder, resolved = folders[-1], recipe.resolved()
    try:
        earlier = dict(yaml.safe_load(_read(folder / "recipe.resolved.yaml")))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise QwenVLError(f"{folder / 'recipe.resolved.yaml'}: damaged; run without --from_step") from error
    differing = [key for key in {**earlier, **resolved} if earlier.get(key) != resolved.get(key)]
    if differing:
        raise QwenVLError(
            f"--from_step {step}: {folder} was run from another recipe (different: {', '.join(differing)});"
            " run without --from_step, or with the same recipe and overrides"
        )
    return folder


def earlier_results(folder: Path, recipe: Recipe, first: int) -> dict[str, Any]:
    """Read results.json of the run to resume at step `first`.

    Raises:
        QwenVLError: a step before `first` did not succeed, or the file is damaged or cannot be read.
    """
    path = folder / "results.json"
    try:
        results: dict[str, Any] = json.loads(_read(path))
        statuses = {result["name"]: result["status"] for result in results["steps"]}
        # The two look-ups raise KeyError if the file lacks the key or a step.
        results["bench"]
        for step in recipe.steps[:first]:
            statuses[step.name]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise QwenVLError(f"{path}: damaged; run without --from_step") from error
    for step in recipe.steps[:first]:
        if statuses[step.name] != "ok":
            raise QwenVLError(
                f"--from_step {recipe.steps[first].name}: in {folder} the step {step.name} before it is"
                f" '{statuses[step.name]}'; continue from {step.name}"
            )
    return results


def to_json(data: dict[str, Any]) -> str:
    """Format `data` as the text of a JSON file."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def to_yaml(data: dict[str, Any]) -> str:
    """Format `data` as the text of a YAML file; the order of keys is kept."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def tail(log: Path, start: int) -> str:
    """The last 20 lines (at most 16 KiB) of a step's output, which begins at byte `start` of the log."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-_LOG_TAIL_LINES:])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise QwenVLError(f"{path}: cannot be read ({error.strerror}); run without --from_step") from error
