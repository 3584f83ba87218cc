"""A cluster of local nodes, and jobs of `qwenvl batch` on it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]

ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    "CUDA_VISIBLE_DEVICES": "",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_METRICS_COLLECTION": "0",
}

# A killed node is noticed after 5 s rather than 15 s. On a busy machine less would end nodes that live.
_SYSTEM = {"health_check_period_ms": 1000}


class LocalCluster:
    """Nodes of one CPU each, on this machine; the head is not killed."""

    def __init__(self, folder: Path, n_nodes: int) -> None:
        from ray.cluster_utils import Cluster

        os.environ.update(ENVIRONMENT)
        head = {"_system_config": _SYSTEM, "temp_dir": str(folder), "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args={**_node(), **head})
        self.address: str = self._cluster.address
        self.n_nodes = n_nodes
        self.fill()

    def fill(self) -> None:
        """Add nodes until there are as many as at the beginning."""
        while len(self._cluster.list_all_nodes()) < self.n_nodes:
            with contextlib.suppress(
                Exception
            ):  # Ray gives a node on a busy machine too little time to start
                self._cluster.add_node(wait=False, **_node())

    def kill_node(self, rng: random.Random) -> None:
        """Kill a node, with its actors."""
        self._cluster.remove_node(rng.choice([*self._cluster.worker_nodes]), allow_graceful=False)

    def actors(self) -> list[int]:
        """List the process ids of the actors of jobs."""
        raylets = {
            process.process.pid
            for node in self._cluster.list_all_nodes()
            for process in node.all_processes.get("raylet", ())
        }
        return [pid for pid, parent, command in _processes() if parent in raylets and b"MapWorker" in command]

    def shutdown(self) -> None:
        self._cluster.shutdown()


def _node() -> dict[str, Any]:
    # Without the processes that nothing here needs: each takes seconds to start.
    return {"num_cpus": 1, "object_store_memory": 80 << 20, "include_log_monitor": False, "no_monitor": True}


def _processes() -> list[tuple[int, int, bytes]]:
    """List the processes of this machine as (id, id of the parent, command line)."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found.append((int(folder.name), parent, (folder / "cmdline").read_bytes()))
            except (OSError, ValueError):
                continue  # it has ended
    return found


def start(stages: Any, source: object, target: object, *flags: object) -> subprocess.Popen[str]:
    """Start a job on the demo model."""
    model = ["--first_model_path", stages.vision, "--second_model_path", stages.language]
    command = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "batch", source, target, *model, *flags]
    return subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a job; return its exit code, stdout and stderr."""
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
