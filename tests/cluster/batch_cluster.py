"""Ray cluster with all nodes on this machine, and processes of `qwenvl batch`, for test_cluster_batch.py."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]

ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    "CUDA_VISIBLE_DEVICES": "",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_METRICS_COLLECTION": "0",
    "RAY_worker_niceness": "0",  # with Ray's default, a lower priority, other programs starve the actors
}

# With this period Ray declares a killed node dead after 5 s instead of 15 s. With a shorter period, it would also
# declare live nodes of a busy machine dead.
_SYSTEM_CONFIG = {"health_check_period_ms": 1000}


class LocalCluster:
    """Ray cluster on this machine: `n_nodes` nodes with one CPU each, one of them the head, which is never killed."""

    def __init__(self, folder: Path, n_nodes: int) -> None:
        import ray
        from ray.cluster_utils import Cluster

        os.environ.update(ENVIRONMENT)
        # Given the folder as an argument, older versions of Ray would also write outside it.
        os.environ["RAY_TMPDIR"] = str(folder)
        # Make Ray start only the agents of its minimal installation: a node waits at most 15 s for the agents of a
        # full installation, which is too short on a busy machine.
        ray._private.utils.get_dashboard_dependency_error = lambda: ImportError("not needed here")
        head_arguments = {**_node_arguments(), "_system_config": _SYSTEM_CONFIG, "include_dashboard": False}
        self._cluster = _with_retries(lambda: Cluster(initialize_head=True, head_node_args=head_arguments))
        self.address: str = self._cluster.address
        self.n_nodes = n_nodes
        self.fill()

    def fill(self) -> None:
        """Add nodes until the cluster has `n_nodes` nodes."""
        while len(self._cluster.list_all_nodes()) < self.n_nodes:
            _with_retries(lambda: self._cluster.add_node(wait=False, **_node_arguments()))

    def kill_node(self, rng: random.Random) -> None:
        """Kill a random worker node with its actors."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: str(node.unique_id))
        self._cluster.remove_node(rng.choice(nodes), allow_graceful=False)

    def actors(self) -> list[int]:
        """List the process ids of the jobs' actors: children of Ray's node processes (raylets), class MapWorker."""
        raylets = {
            process.process.pid
            for node in self._cluster.list_all_nodes()
            for process in node.all_processes.get("raylet", ())
        }
        return [pid for pid, parent, command in _processes() if parent in raylets and b"MapWorker" in command]

    def shutdown(self) -> None:
        self._cluster.shutdown()
        del os.environ["RAY_TMPDIR"]


def _node_arguments() -> dict[str, Any]:
    return {"num_cpus": 1, "object_store_memory": 80 << 20, "include_log_monitor": False, "no_monitor": True}


def _with_retries(start: Callable[[], Any]) -> Any:
    """Start a node, with three retries: Ray's timeout is too short for a busy machine."""
    for _ in range(3):
        with contextlib.suppress(Exception):
            return start()
    return start()


def _processes() -> list[tuple[int, int, bytes]]:
    """List the processes of this machine as (process id, parent's process id, command line)."""
    processes = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # The text is "PID (PROGRAM) STATE PARENT ..."; the program's name may contain spaces.
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                processes.append((int(folder.name), parent, (folder / "cmdline").read_bytes()))
            except (OSError, ValueError):
                continue  # the process has ended
    return processes


class BatchProcess:
    """Process of `qwenvl batch` with the demo model; stdout and stderr go to `log` with the suffix .out and .err."""

    def __init__(self, stages: Any, log: Path, source: object, target: object, *flags: object) -> None:
        model = ["--first_model_path", stages.vision, "--second_model_path", stages.language]
        command = [
            sys.executable,
            "-m",
            "paddlemix_qwenvl_plugin.cli",
            "batch",
            source,
            target,
            *model,
            *flags,
        ]
        self._streams = log.with_suffix(".out"), log.with_suffix(".err")
        out, err = (path.open("w") for path in self._streams)
        self.process = subprocess.Popen(
            [str(argument) for argument in command],
            env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=err,
        )

    def finish(self) -> tuple[int, str, str]:
        """Wait for the exit; return the exit code, stdout and stderr."""
        code = self.process.wait(timeout=300)
        out, err = (path.read_text() for path in self._streams)
        return code, out, err


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
