"""The engine's threads: after fork(), and their number under a container's quota."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from engine import FLOAT32, LANGUAGE, Engine, make_config, store


def test_an_engine_continues_in_a_child_after_fork(library, golden_model):
    """The child gets the parent's answer, frees the engine and ends; the parent's threads go on as well."""
    model = golden_model("a")
    config = make_config(model.config, LANGUAGE, n_threads=3)
    prompt = np.random.default_rng(1).integers(0, 600, 300).tolist()
    with Engine(library, config, store(library, model.language_weights(), FLOAT32)) as engine:
        expected = engine.generate([prompt], 8)
        for pause in (0, 0.3):  # while the threads look for work, and when they sleep
            time.sleep(pause)
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # a child that hangs is killed and fails the test
                right = engine.generate([prompt], 8) == expected
                library.dll.qvl_engine_free(engine.handle)
                os._exit(0 if right else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert engine.generate([prompt], 8) == expected


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000", "cpu.max": "max 1"}, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "400000 100000\n"}, 0.5),
        ("0::/not/there\n", {"cpu.max": "200000 100000\n"}, 2),  # the host's path
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
def test_cpu_quota(library, tmp_path, groups, files, cpus):
    root = tmp_path / "cgroup"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    listed = tmp_path / "self"
    listed.write_text(groups)
    assert library.dll.qvlt_cpu_quota(str(listed).encode(), str(root).encode()) == cpus


def test_no_control_groups(library, tmp_path):
    missing = str(tmp_path / "missing").encode()
    assert library.dll.qvlt_cpu_quota(missing, missing) == 0
