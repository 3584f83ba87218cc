"""`qwenvl batch --ray`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.sources import without_password

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.cluster.batch.pool import Actors
    from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions


def batch_on_ray(
    options: GenerationOptions,
    open_model: Callable[[], Any],
    source: str,
    target: str,
    batch_size: int,
    prompt: Optional[str],
    address: str,
    ray_actors: Optional[str],
    ray_cpus: Optional[float],
    ray_gpus: Optional[float],
) -> None:
    """Answer every row of the input on a Ray cluster, into a folder.

    `open_model` is a functools.partial whose keywords are the values of the model's flags (options.with_flags).

    Raises:
        UsageError: a flag is invalid, or as for `run`.
        QwenVLError: at least one row failed, or as for `run`.
        OSError: as for `run`.
    """
    from paddlemix_qwenvl_plugin.cluster.batch.files import absolute
    from paddlemix_qwenvl_plugin.cluster.batch.job import ERRORS, Job, run

    if "-" in (source, target):
        raise UsageError("--ray: standard input and output (-) are not supported; name a file or folder")
    opener = _with_absolute_paths(open_model)
    actors = _actors(ray_actors, ray_cpus, ray_gpus, str(opener.keywords["device"]))
    job = Job(
        source=absolute(source),
        target=absolute(target),
        source_name=without_password(source),
        name=without_password(target),
        prompt=prompt,
        options=options,
        window=batch_size,
    )
    result = run(job, opener, actors, address)
    if result.ran:
        print(f"{job.name}: wrote {result.n_rows} rows in {result.n_parts} parts")
    else:
        print(f"{job.name}: has all {result.n_rows} rows already")
    if result.n_failed:
        errors = f"{job.name}/{ERRORS}"
        raise QwenVLError(f"{result.n_failed} of {result.n_rows} rows failed; see their errors in {errors}")


def _with_absolute_paths(open_model: Callable[[], Any]) -> functools.partial[Any]:
    """Make `open_model` independent of the working directory, for the processes of other machines.

    Raises:
        UsageError: the model is a server, a stage is not named, or --adapter is malformed.
    """
    assert isinstance(open_model, functools.partial)
    flags = dict(open_model.keywords)
    if flags.get("url") is not None:
        raise UsageError("--ray: applies to exported stages only; remove it, or remove --url")
    if flags["first_model_path"] is None or flags["second_model_path"] is None:
        raise UsageError("--ray: give --first_model_path and --second_model_path")
    for name, value in flags.items():
        if isinstance(value, Path):
            flags[name] = value.absolute()
    if flags["adapter"]:
        from paddlemix_qwenvl_plugin.runtime.adapters import split_adapters

        flags["adapter"] = [
            f"{key}={Path(value).absolute()}" for key, value in split_adapters(flags["adapter"]).items()
        ]
    return functools.partial(open_model.func, **flags)


def _actors(bounds: Optional[str], cpus: Optional[float], gpus: Optional[float], device: str) -> Actors:
    """Parse --ray_actors (`bounds`) and the resources per actor: by default a CPU, and with --device gpu a GPU.

    Raises:
        UsageError: a value is invalid.
    """
    from paddlemix_qwenvl_plugin.cluster.batch.pool import Actors

    minimum = 0
    maximum: Optional[int] = None
    match = re.fullmatch(r"(\d+)(:(\d+)?)?", bounds if bounds is not None else "1:")  # MIN, MIN: or MIN:MAX
    if match:
        minimum = int(match[1])
        if not match[2]:
            maximum = minimum
        elif match[3]:
            maximum = int(match[3])
    if not minimum or (maximum is not None and maximum < minimum):
        raise UsageError(f"--ray_actors: {bounds!r} is not MIN:MAX, as in 1:8; MIN must be 1 or more")
    if gpus is None:
        gpus = 1.0 if device.startswith("gpu") else 0.0
    if cpus is None:
        cpus = 1.0
    for flag, share in (("--ray_cpus", cpus), ("--ray_gpus", gpus)):
        if not (0 <= share <= 1 or (share > 1 and share.is_integer())):
            raise UsageError(f"{flag}: {share:g} is neither a share below 1 nor a whole number")
    return Actors(minimum, maximum, cpus, gpus)
