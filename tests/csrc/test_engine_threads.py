"""The engine's threads after fork(); a container's limits: its CPU quota, which limits their number, and its memory.

Each limit is read by a function of the engine and by one of the package: both are tested.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time

import numpy as np
import pytest
from engine import FLOAT32, LANGUAGE, Engine, make_config, store

from paddlemix_qwenvl_plugin.util import control_groups


def test_an_engine_continues_in_a_child_after_fork(library, golden_model):
    """The child computes the same completion, frees the engine and exits; the parent's engine works afterwards."""
    model = golden_model("a")
    config = make_config(model.config, LANGUAGE, n_threads=3)
    prompt = np.random.default_rng(1).integers(0, 600, 300).tolist()
    with Engine(library, config, store(library, model.language_weights(), FLOAT32)) as engine:
        expected = engine.generate([prompt], 8)
        for pause in (0, 0.3):  # after 0 s the engine's threads may still spin, after 0.3 s they sleep
            time.sleep(pause)
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # a child that hangs is killed and fails the test
                equal = engine.generate([prompt], 8) == expected
                library.dll.qvl_engine_free(engine.handle)
                os._exit(0 if equal else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert engine.generate([prompt], 8) == expected


def write_groups(folder, cgroups, files):
    """Write stand-ins for /proc/self/cgroup and for files under /sys/fs/cgroup; return both paths."""
    root = folder / "cgroup"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    self_cgroup = folder / "self"
    self_cgroup.write_text(cgroups)
    return self_cgroup, root


# cgroups: content of /proc/self/cgroup; files: content of files under /sys/fs/cgroup; cpus: expected quota
# in CPUs; 0: no quota.
@pytest.mark.parametrize(
    ("cgroups", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000", "cpu.max": "max 1"}, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "400000 100000\n"}, 0.5),
        ("0::/not/there\n", {"cpu.max": "200000 100000\n"}, 2),  # in a container: the path is the host's
        (
            "5:memory:/x\n4:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0),
        ("4:cpuset:/x\n", {"cpuset/x/cpu.cfs_quota_us": "1", "cpuset/x/cpu.cfs_period_us": "1"}, 0),
        ("nonsense\n::\n", {"cpu.max": "garbage\n"}, 0),
        ("", {}, 0),
    ],
)
def test_cpu_quota(library, tmp_path, cgroups, files, cpus):
    self_cgroup, root = write_groups(tmp_path, cgroups, files)
    assert library.dll.qvlt_cpu_quota(str(self_cgroup).encode(), str(root).encode()) == cpus
    assert (control_groups.cpu_quota(self_cgroup, root) or 0) == cpus


NO_LIMIT = 2**64 - 1


def memory_limit(library, self_cgroup, root):
    """The smallest limit, and the least memory left within a limit."""
    total, free = ctypes.c_uint64(), ctypes.c_uint64()
    library.dll.qvlt_memory_limit(str(self_cgroup).encode(), str(root).encode(), total, free)
    return total.value, free.value


@pytest.mark.parametrize(
    ("cgroups", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "900\n", "memory.current": "300\n"}, (900, 600)),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "300\n"}, (NO_LIMIT, NO_LIMIT - 300)),
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": "900",
                "a/b/memory.current": "100",
                "a/memory.max": "1000",
                "a/memory.current": "700",
            },
            (900, 300),
        ),
        ("0::/not/there\n", {"memory.max": "900", "memory.current": "1000"}, (900, 0)),
        (
            "5:memory:/x\n4:cpu,cpuacct:/x\n",
            {"memory/x/memory.limit_in_bytes": "900\n", "memory/x/memory.usage_in_bytes": "300\n"},
            (900, 600),
        ),
        ("5:hugetlb,memory:/x\n", {"hugetlb,memory/x/memory.limit_in_bytes": "900\n"}, (900, 900)),
        ("", {}, (NO_LIMIT, NO_LIMIT)),
    ],
)
def test_memory_limit(library, tmp_path, cgroups, files, limit):
    groups = write_groups(tmp_path, cgroups, files)
    assert memory_limit(library, *groups) == limit
    assert control_groups.memory_limit(*groups) == (None if limit[0] == NO_LIMIT else limit[0])


def test_no_cgroups(library, tmp_path):
    missing = tmp_path / "missing"
    assert library.dll.qvlt_cpu_quota(str(missing).encode(), str(missing).encode()) == 0
    assert memory_limit(library, missing, missing) == (NO_LIMIT, NO_LIMIT)
    assert control_groups.cpu_quota(missing, missing) is None
    assert control_groups.memory_limit(missing, missing) is None
