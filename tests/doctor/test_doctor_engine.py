"""The engine checks of `qwenvl doctor` in fake environments, with a fake Paddle, compiler and CUDA."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
from doctor_helpers import Environment
from engines import needs_compiler
from fake_cuda import fake_driver, fake_nvrtc, headers

# Fake compiler: prints a version for --version, otherwise creates an empty output file.
COMPILER = """[ "$1" = --version ] && { echo made-up 1.0; exit 0; }
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
exit 0"""


@pytest.fixture
def cache(environment: Environment, tmp_path: Path) -> Path:
    """Cache folder of the engine in a healthy environment."""
    environment.add_healthy_packages()
    environment.variables["QWENVL_CACHE_DIR"] = str(tmp_path / "cache")
    return tmp_path / "cache" / "engine"


def build(
    environment: Environment,
    code: str = "from paddlemix_qwenvl_plugin.engine.build import library; library()",
) -> None:
    """Build the engine with the environment's compiler; failures are ignored."""
    # Only for the build: the checks run without this machine's programs.
    environment.variables["PATH"] = f"{environment.programs}{os.pathsep}{os.environ['PATH']}"
    variables = {**environment.variables, "PYTHONPATH": str(environment.packages)}
    subprocess.run([environment.python, "-c", code], env=variables, capture_output=True, check=False)
    del environment.variables["PATH"]


def test_no_compiler(environment: Environment, cache: Path) -> None:
    check = environment.checks()["engine"]
    assert (check["status"], check["fix"]) == ("note", "apt-get install g++")
    assert "no C++ compiler c++ found" in check["message"]
    assert check["data"]["compiler"] is check["data"]["compiler_version"] is None
    assert (check["data"]["state"], check["data"]["cache"]) == ("not built", str(cache))
    assert check["data"]["device"] == "cpu"
    assert not cache.exists()


def test_not_built(environment: Environment, cache: Path) -> None:
    environment.program("c++", COMPILER)
    check = environment.checks()["engine"]
    assert (check["status"], check["fix"]) == ("note", "qwenvl build-engine")
    assert (check["data"]["compiler"], check["data"]["compiler_version"]) == ("c++", "made-up 1.0")
    assert check["data"]["state"] == "not built"


def test_built_and_damaged(environment: Environment, cache: Path) -> None:
    environment.program("c++", COMPILER)
    build(environment)
    check = environment.checks()["engine"]
    assert (check["status"], check["data"]["state"]) == ("ok", "built")
    assert Path(check["data"]["library"]).is_file()
    Path(check["data"]["library"]).write_text("damaged")
    assert environment.checks()["engine"]["data"]["state"] == "not built"


def test_a_failed_build(environment: Environment, cache: Path) -> None:
    environment.program("c++", '[ "$1" = --version ] && { echo made-up 1.0; exit 0; }\nexit 3')
    build(environment)
    check = environment.checks()["engine"]
    assert (check["status"], check["fix"]) == ("problem", "qwenvl build-engine")
    assert "c++ ended with exit code 3" in check["message"]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's /proc/cpuinfo")
def test_instruction_set(environment: Environment, cache: Path) -> None:
    """The reported ISA is the best one whose CPU flags are in /proc/cpuinfo."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = "generic"
    if platform.machine() == "x86_64" and {"avx2", "fma", "f16c"} <= flags:
        expected = "avx2"
        if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"} <= flags:
            expected = "avx512_bf16" if {"avx512_bf16", "avx512vbmi"} <= flags else "avx512"
    assert environment.checks()["engine"]["data"]["instruction_set"] == expected


@needs_compiler
def test_gpus_that_are_too_old(environment: Environment, cache: Path, tmp_path: Path) -> None:
    """A GPU that is too old is reported, and does not hide another GPU.

    FAKE_MAJOR is the major compute capability of the GPU "First"; that of "Second" is one higher, and both have the
    minor one 6.
    """
    environment.variables.update(
        LD_LIBRARY_PATH=str(fake_driver(tmp_path).parent), FAKE_CUDA="12080", FAKE_GPUS="2", FAKE_MAJOR="6"
    )
    wheel = environment.packages / "nvidia" / "cuda_nvrtc"
    fake_nvrtc(wheel / "lib" / "libnvrtc.so.12", 12, 7, 76)
    headers(wheel / "include")
    check = environment.checks()["gpu_engine"]
    too_old = "--device gpu:0: First has compute capability 6.6; the engine needs 7.0"
    assert (check["status"], check["data"]["state"]) == ("note", "not built")
    assert f"CUDA 12.8; {too_old}; NVRTC 12.7; not built yet" in check["message"]
    environment.program("c++", COMPILER)
    build(environment, "from paddlemix_qwenvl_plugin.engine.gpu import build_for; build_for(1)")
    check = environment.checks()["gpu_engine"]
    assert (check["status"], check["data"]["state"], check["fix"]) == ("note", "built", None)
    assert f"{too_old}; NVRTC 12.7, built in " in check["message"]
    environment.variables["FAKE_MAJOR"] = "5"
    check = environment.checks()["gpu_engine"]
    assert check["status"] == "note"
    assert check["message"].endswith(
        "--device gpu:0: First has compute capability 5.6; the engine needs 7.0; "
        "--device gpu:1: Second has compute capability 6.6; the engine needs 7.0"
    )
    environment.variables["FAKE_CUDA"] = (
        "11080"  # the cause, which both GPUs have in common, is reported once
    )
    assert environment.checks()["gpu_engine"]["message"].count("the NVIDIA driver knows CUDA 11.8 only") == 1


@needs_compiler
def test_gpus(environment: Environment, cache: Path, tmp_path: Path) -> None:
    """The check for GPUs with a fake driver: no GPU, no usable NVRTC, not built, built, damaged, failed.

    The fake GPU has the compute capability 99.6, so that an installed real NVRTC cannot compile for it.
    """
    environment.variables.update(
        LD_LIBRARY_PATH=str(fake_driver(tmp_path).parent), FAKE_CUDA="12080", FAKE_MAJOR="99"
    )

    def run_check(n_gpus: int = 1) -> dict[str, Any]:
        environment.variables["FAKE_GPUS"] = str(n_gpus)
        check: dict[str, Any] = environment.checks()["gpu_engine"]
        return check

    check = run_check(n_gpus=0)
    assert (check["status"], check["data"]["driver"]) == ("ok", "12.8")
    assert check["message"] == "engine on GPUs: driver for CUDA 12.8, which shows no GPU"
    environment.variables["FAKE_CUDA"] = "0"
    check = run_check(n_gpus=0)
    assert check["data"]["driver"] is None
    assert check["message"] == "engine on GPUs: driver for an unknown version of CUDA, which shows no GPU"
    environment.variables["FAKE_CUDA"] = "12080"
    check = run_check()
    assert check["data"]["gpus"] == [{"name": "First", "architecture": 996}]
    wheel = environment.packages / "nvidia" / "cuda_nvrtc"
    library = fake_nvrtc(wheel / "lib" / "libnvrtc.so.12", 12, 0, 80)  # NVRTC 12.0, only for sm_80
    check = run_check()
    assert (check["status"], check["fix"]) == ("note", "pip install 'paddlemix-qwenvl-plugin[gpu-engine]'")
    assert check["message"].endswith(f"{library} is NVRTC 12.0, which cannot compile for sm_996")
    fake_nvrtc(library, 12, 7, 996)  # NVRTC 12.7, for the fake GPU
    headers(wheel / "include")
    check = run_check()
    assert (check["status"], check["fix"]) == ("note", "qwenvl build-engine --device gpu")
    assert (check["data"]["nvrtc"], check["data"]["state"]) == ("NVRTC 12.7", "not built")

    environment.program("c++", COMPILER)
    build(environment, "from paddlemix_qwenvl_plugin.engine.gpu import build_for; build_for(0)")
    check = run_check()
    assert (check["status"], check["data"]["state"]) == ("ok", "built")
    Path(check["data"]["library"]).write_text("damaged")
    assert run_check()["data"]["state"] == "not built"
    Path(check["data"]["library"]).with_name("failed").write_text("so it failed")
    check = run_check()
    assert check["data"]["state"] == "failed"
    assert check["message"].endswith("so it failed")
