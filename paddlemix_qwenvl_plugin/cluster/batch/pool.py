"""Execution of parts on a Ray Data actor pool, which scales, restarts actors, repeats lost parts and limits queues."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from paddlemix_qwenvl_plugin.cluster.batch.parts import Part
from paddlemix_qwenvl_plugin.cluster.batch.worker import Work, Worker, open_with
from paddlemix_qwenvl_plugin.runtime.model import Model
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError, first_line

# The user gets a notice if `describe_model` has no result after this time.
_SECONDS_UNTIL_NOTICE = 30.0


@dataclass(frozen=True)
class Actors:
    """Size of the actor pool, and resources per actor.

    Attributes:
        minimum, maximum: number of actors; maximum None: as many as fit on the cluster.
        cpus, gpus: number per actor, possibly fractional.
    """

    minimum: int = 1
    maximum: Optional[int] = None
    cpus: float = 1.0
    gpus: float = 0.0

    @property
    def resources(self) -> dict[str, float]:
        """Resources of an actor as arguments of Ray: num_cpus, num_gpus."""
        return {"num_cpus": self.cpus, **({"num_gpus": self.gpus} if self.gpus else {})}


def describe_model(open_model: Callable[[], Model[Any]], actors: Actors) -> tuple[list[str], str]:
    """Open the model on a node with room for an actor; return the identifiers of its weights and its picture label.

    Both are part of the job's identity, which is written, or compared with that of the job to resume, before any actor
    starts.

    Raises:
        UsageError, QwenVLError, OSError: the model cannot be opened there.
    """
    import ray

    def describe() -> tuple[Any, Any]:
        try:
            model = open_with(open_model, actors.cpus)
            return model.weights, model.picture_label
        except (QwenVLError, OSError) as error:
            return error, None  # Ray would wrap an exception

    result = ray.remote(**actors.resources)(describe).remote()
    if not ray.wait([result], timeout=_SECONDS_UNTIL_NOTICE)[0]:
        needs = f"{actors.cpus:g} CPUs" + (f" and {actors.gpus:g} GPUs" if actors.gpus else "")
        print(
            f"waiting for a node with {needs}, or for its worker to start and open the model", file=sys.stderr
        )
    try:
        weights, picture_label = ray.get(result)
    except ray.exceptions.RayError as error:
        raise QwenVLError(f"the model cannot be opened on the cluster ({_last_line(error)})") from error
    if isinstance(weights, Exception):
        raise weights
    return weights, picture_label


def answered(work: Work, parts: Sequence[Part], actors: Actors) -> Iterator[int]:
    """Answer parts on the actor pool; yield the number of rows of each part as it completes.

    Raises:
        UsageError, QwenVLError: an actor reported an error, or the cluster failed; this ends the job.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # One block per part: Ray schedules and repeats whole blocks.
    items = ray.data.from_items([{"part": part.dump()} for part in parts], override_num_blocks=len(parts))
    results = items.map_batches(
        Worker,
        fn_constructor_args=(work,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=actors.minimum, max_size=actors.maximum),
        **actors.resources,
    )
    try:
        for row in results.iter_rows():
            if row["error"]:
                raise (UsageError if row["exit_code"] == UsageError.exit_code else QwenVLError)(row["error"])
            yield row["rows"]
    # ConnectionError: the node of this machine has ended.
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise QwenVLError(
            f"the job failed on the cluster ({_last_line(error)}); run the command again to resume"
        ) from error


def _last_line(error: Exception) -> str:
    """Return the last line of Ray's message, which is the cause at the end of a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else first_line(error)
