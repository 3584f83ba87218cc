"""CPU quotas of control groups, which limit containers. The engine has the same rules (csrc/cpu/control_groups.cc)."""

from __future__ import annotations

from pathlib import Path
from typing import Optional


def cpu_quota(
    cgroup_file: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Optional[float]:
    """Smallest quota of a process's control groups and of their parents, in CPUs; None without a quota.

    Args:
        cgroup_file: the process's groups.
        root: folder of the mounted hierarchies, of cgroup version 1 or 2.
    """
    quotas: list[float] = []
    for line in _text(cgroup_file).splitlines():
        # A line is ID:CONTROLLERS:PATH; with cgroup version 2 there are no controllers.
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon or not path.startswith("/") or (controllers and "cpu" not in controllers.split(",")):
            continue
        hierarchy = root / controllers
        group = hierarchy / path.strip("/")
        # In a container without a cgroup namespace the path is valid only on the host, but the root of the mount is the
        # container's group.
        for folder in (group, *group.parents):
            quotas.append(_quota_of(folder))
            if folder == hierarchy:
                break
    return min((quota for quota in quotas if quota > 0), default=None)


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
