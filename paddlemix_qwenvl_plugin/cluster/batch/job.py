"""A batch job on a cluster, with a folder of parts as output; a later run resumes it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Optional

from paddlemix_qwenvl_plugin.batch.job import identity
from paddlemix_qwenvl_plugin.batch.journal import difference
from paddlemix_qwenvl_plugin.batch.rows import dump, result_id
from paddlemix_qwenvl_plugin.cluster.batch.files import (
    PARTIAL,
    join,
    listed,
    opened,
    remove,
    write,
)
from paddlemix_qwenvl_plugin.cluster.batch.inputs import find, index
from paddlemix_qwenvl_plugin.cluster.batch.parts import Part, cut, digest_of_ids
from paddlemix_qwenvl_plugin.cluster.batch.pool import Actors, answered, describe_model
from paddlemix_qwenvl_plugin.cluster.batch.worker import Work
from paddlemix_qwenvl_plugin.cluster.connect import connect
from paddlemix_qwenvl_plugin.runtime.model import Model
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.progress import track
from paddlemix_qwenvl_plugin.util.sources import without_password

MANIFEST, ERRORS = "job.json", "errors.jsonl"

# Parts are sized for the maximum number of actors (_ACTORS if there is no maximum) and for _PARTS_PER_ACTOR parts per
# actor. A part has at most _MAX_WINDOWS * window rows.
_ACTORS, _PARTS_PER_ACTOR = 16, 4
_MAX_WINDOWS = 32


@dataclass(frozen=True)
class Job:
    """Arguments of a batch job.

    Attributes:
        source, target: absolute paths or URLs of the input and of the output folder.
        source_name, name: names of the input and of the output folder in messages.
        prompt: prompt for rows without one, or None.
        options: default generation options of rows.
        window: number of concurrent rows per actor.
    """

    source: str
    target: str
    source_name: str
    name: str
    prompt: Optional[str]
    options: GenerationOptions
    window: int


@dataclass(frozen=True)
class Result:
    """Row, part and error counts of a complete job; `ran` is False if all parts existed before the run."""

    n_rows: int
    n_parts: int
    n_failed: int
    ran: bool


def run(job: Job, open_model: Callable[[], Model[Any]], actors: Actors, address: str) -> Result:
    """Answer every row of an input into a folder of parts; resume if the folder has parts of an earlier run.

    Raises:
        UsageError: the input, the folder or the model cannot be used, or Ray is not installed.
        QwenVLError: the folder belongs to another job, or the job cannot continue. The folder keeps its parts.
        OSError: a file of the input, the model or the folder cannot be read or written.
    """
    files = find(job.source, job.source_name)
    if job.source == job.target:
        raise UsageError(f"{job.name}: is the input; name another output")
    format = files.format(job.prompt, job.options)
    rows = [*index(files, format)]
    present = listed(job.target)
    if not _is_ours(present):
        raise UsageError(f"{job.name}: exists, and this command did not write it; name another folder")
    manifest = _manifest(job, MANIFEST in present)
    # Weights and picture label are the manifest's until `describe_model`: a complete job is recognized without opening
    # the model. The division into parts stays the manifest's, also with another window or number of actors.
    expected = {
        **identity(
            files.digest(), job.options, manifest.get("weights", []), manifest.get("picture_label", "")
        ),
        "prompt": job.prompt,
        "part_rows": manifest.get("part_rows") or _part_rows(len(rows), job.window, actors.maximum),
    }
    if manifest:
        _check(job, expected, manifest)
    parts = [*cut(rows, expected["part_rows"])]
    remaining = [part for part in parts if part.name not in present]
    if remaining or not manifest:
        with connect(address):
            expected["weights"], expected["picture_label"] = describe_model(open_model, actors)
            if manifest:
                _check(job, expected, manifest)
                done = sum(part.n_rows for part in parts) - sum(part.n_rows for part in remaining)
                print(f"resuming: {done} of {len(rows)} rows are answered", file=sys.stderr)
            else:
                write(join(job.target, MANIFEST), dump(expected))
            # `expected` without the keys that only jobs on a cluster have.
            job_identity = {key: expected[key] for key in identity("", job.options, [], "")}
            work = Work(open_model, job_identity, files.folder, format, job.target, job.window, actors.cpus)
            _answer(work, remaining, actors)
    return Result(len(rows), len(parts), _collect_errors(job, parts), bool(remaining))


def _answer(work: Work, parts: Sequence[Part], actors: Actors) -> None:
    """Answer parts, with progress in rows."""

    def rows() -> Iterator[None]:
        for n_rows in answered(work, parts, actors) if parts else ():
            yield from [None] * n_rows

    for _ in track(rows(), "rows answered", sum(part.n_rows for part in parts)):
        pass


def _part_rows(n_rows: int, window: int, n_actors: Optional[int]) -> int:
    """Choose the number of rows per part: several parts per actor, each of at least `window` rows.

    Short parts lower the concurrency, which is below `window` at the beginning and end of a part; long parts increase
    the work that a killed actor loses.
    """
    n_parts = (n_actors or _ACTORS) * _PARTS_PER_ACTOR
    return max(window, min(_MAX_WINDOWS * window, math.ceil(n_rows / n_parts)))


def _is_ours(present: Iterable[str]) -> bool:
    """Whether a folder is empty or has a job's manifest, apart from temporary files of killed processes."""
    names = [name for name in present if not name.startswith(PARTIAL)]
    return not names or MANIFEST in names


def _manifest(job: Job, exists: bool) -> dict[str, Any]:
    """Read the manifest of the output folder; empty if it has none."""
    if not exists:
        return {}
    with opened(join(job.target, MANIFEST)) as file:
        content = file.read()
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise QwenVLError(
            f"{join(job.name, MANIFEST)}: not valid JSON; remove the folder or name another"
        ) from error


def _check(job: Job, expected: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raise QwenVLError unless the manifest equals `expected` as it is after writing and reading JSON."""
    if json.loads(dump(expected)) != manifest:
        change = difference(json.loads(dump(expected)), dump(manifest), "manifest")
        raise QwenVLError(f"{join(job.name, MANIFEST)}: {change}; remove the folder or name another")


def _collect_errors(job: Job, parts: Sequence[Part]) -> int:
    """Copy the failed rows of all parts into ERRORS, if any; remove stale files; return the number of failed rows.

    Stale are temporary files, and ERRORS of an earlier run if no row has failed.

    Raises:
        QwenVLError: a part does not contain the results of exactly its rows.
    """
    with ThreadPoolExecutor(16) as pool:
        errors = [line for lines in pool.map(lambda part: [*_errors(job, part)], parts) for line in lines]
    present = listed(job.target)
    if errors:
        write(join(job.target, ERRORS), b"".join(errors))
    stale = [name for name in present if name.startswith(PARTIAL) or (name == ERRORS and not errors)]
    remove([join(job.target, name) for name in stale])
    return len(errors)


def _errors(job: Job, part: Part) -> Iterator[bytes]:
    name = join(job.target, part.name)
    with opened(name) as file:
        lines = file.readlines()
    results = [result_id(line) for line in lines]
    if digest_of_ids(result[0] if result else "" for result in results) != part.ids:
        raise QwenVLError(
            f"{without_password(name)}: does not have the results of its rows; remove it and run the command again"
        )
    yield from (line for line, result in zip(lines, results) if result and result[1])
