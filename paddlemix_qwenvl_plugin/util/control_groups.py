"""Limits of control groups on CPUs and memory, as containers and batch systems set them.

The engine has the same rules (csrc/cpu/control_groups.cc).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Optional

_CGROUP_FILE, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cpu_quota(cgroup_file: Path = _CGROUP_FILE, root: Path = _ROOT) -> Optional[float]:
    """Smallest quota of a process's control groups and of their parents, in CPUs; None without a quota.

    Args:
        cgroup_file: the process's groups.
        root: folder of the mounted hierarchies, of cgroup version 1 or 2.
    """
    quotas = [_quota_of(folder) for folder in _groups("cpu", cgroup_file, root)]
    return min((quota for quota in quotas if quota > 0), default=None)


def memory_limit(cgroup_file: Path = _CGROUP_FILE, root: Path = _ROOT) -> Optional[int]:
    """Smallest memory limit of a process's control groups and of their parents, in bytes; None without a limit.

    Version 1 reports a limit above any machine's memory where none is set. Arguments: see `cpu_quota`.
    """
    texts = [
        _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        for folder in _groups("memory", cgroup_file, root)
    ]
    return min((int(text) for text in texts if text.strip().isdecimal()), default=None)


def _groups(controller: str, cgroup_file: Path, root: Path) -> Iterator[Path]:
    """Yield the folders of a process's groups with a controller, each followed by its parents."""
    for line in _text(cgroup_file).splitlines():
        # A line is ID:CONTROLLERS:PATH; with cgroup version 2 there are no controllers.
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if (
            not colon
            or not path.startswith("/")
            or (controllers and controller not in controllers.split(","))
        ):
            continue
        hierarchy = root / controllers
        group = hierarchy / path.strip("/")
        # In a container without a cgroup namespace the path is valid only on the host, but the root of the mount is the
        # container's group.
        for folder in (group, *group.parents):
            yield folder
            if folder == hierarchy:
                break


def _quota_of(folder: Path) -> float:
    """Quota of one group in CPUs; 0 without a limit."""
    version_2 = _text(folder / "cpu.max").split()  # quota and period in microseconds
    if version_2:
        return _cpus(*version_2[:2]) if len(version_2) >= 2 else 0
    return _cpus(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _cpus(quota: str, period: str) -> float:
    try:
        quota_us, period_us = float(quota), float(period)
    except ValueError:  # "max": no limit; empty: no such file
        return 0
    return quota_us / period_us if quota_us > 0 and period_us > 0 else 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no such group, or no control groups
        return ""
