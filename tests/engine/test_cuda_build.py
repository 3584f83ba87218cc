"""Building the engine for GPUs on a machine without one, with a fake CUDA driver and a fake NVRTC."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engines import needs_compiler
from fake_cuda import empty_driver, fake_driver, fake_nvrtc, headers

from paddlemix_qwenvl_plugin.engine import build, gpu, nvrtc, select, sources
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.machine import CudaDriver, Gpu

pytestmark = needs_compiler

CSRC = sources.source_folder()
INSTALL = r": pip install 'paddlemix-qwenvl-plugin\[gpu-engine\]'$"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Limit the search for NVRTC to three folders that do not exist yet: site-packages (returned), toolkit and usr."""
    monkeypatch.setattr(nvrtc, "_sites", lambda: [tmp_path / "site"])
    monkeypatch.setattr(nvrtc, "_toolkits", lambda: [tmp_path / "toolkit"])
    monkeypatch.setattr(nvrtc, "_NAMES", ())
    monkeypatch.setattr(nvrtc, "_SYSTEM", tmp_path / "usr")
    return tmp_path / "site"


@pytest.fixture
def kernels(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a fake NVRTC and a fake driver with one GPU; return the folder of kernels, with two .cu files."""
    csrc = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    folder = csrc / "cuda" / "kernels"
    for path in folder.glob("*.cu"):
        path.unlink()
    for name in ("one.cu", "two.cu"):
        (folder / name).write_text(f"// {name}")
    monkeypatch.setattr(build, "source_folder", lambda: csrc)
    monkeypatch.setenv("QWENVL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("QWENVL_NO_BUILD", raising=False)
    monkeypatch.delenv("QWENVL_CUDA_KERNELS", raising=False)
    wheel = site / "nvidia" / "cuda_nvrtc"
    fake_nvrtc(wheel / "lib" / "libnvrtc.so.12", 12, 9, 75, 80, 90)  # NVRTC 12.9 for sm_75, sm_80 and sm_90
    headers(site / "nvidia" / "cuda_runtime" / "include")
    install_gpus(monkeypatch, 90)
    return folder


def install_gpus(monkeypatch: pytest.MonkeyPatch, *architectures: int, version: int = 12090) -> None:
    """Install a fake driver with these GPUs."""
    driver = CudaDriver(version, [Gpu(f"GPU {architecture}", architecture) for architecture in architectures])
    monkeypatch.setattr(gpu, "cuda_driver", lambda: driver)


def test_the_gpus_of_the_driver(tmp_path: Path) -> None:
    fake_driver(tmp_path)
    code = "from paddlemix_qwenvl_plugin.util.machine import cuda_driver; print(cuda_driver())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "FAKE_CUDA": "12040", "FAKE_GPUS": "2"}
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    first, second = Gpu("First", 86), Gpu("Second", 96)
    assert printed.strip() == repr(CudaDriver(12040, [first, second]))
    environment["FAKE_GPUS"] = "0"
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert printed.strip() == repr(CudaDriver(12040, []))
    environment.update(FAKE_CUDA="0", FAKE_GPUS="1")
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert printed.strip() == repr(CudaDriver(0, [first]))
    empty_driver(tmp_path)
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert printed.strip() == repr(CudaDriver(0, []))


def test_kernels_are_built_once(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, 75, 90, 90, 61)  # compute capability 6.1 is too low: no kernels for it
    folder = build.built(gpu.kernels())
    names = {
        f"{stem}.{code}.cubin"
        for stem in ("one", "two")
        for code in ("sm_75.f16", "sm_90a.f16", "sm_90a.bf16")
    }
    assert {path.name for path in folder.glob("*.cubin")} == names
    assert (folder / "two.sm_90a.bf16.cubin").read_text() == "// two.cu"
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.cubin")}
    assert build.built(gpu.kernels()) == folder
    assert times == {path: path.stat().st_mtime_ns for path in folder.glob("*.cubin")}
    log = (folder / "build.log").read_text()
    assert log.count("--gpu-architecture=sm_90a -DQVL_COMPUTE_BFLOAT16") == 2
    (folder / "one.sm_75.f16.cubin").write_text("damaged")
    assert build.target_state(gpu.kernels()) == ("not built", folder)
    assert (build.built(gpu.kernels()) / "one.sm_75.f16.cubin").read_text() == "// one.cu"


def test_kernels_are_built_for_each_header_gpu_and_nvrtc(
    kernels: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [build.built(gpu.kernels())]
    (kernels / "more.cuh").write_text("")
    folders.append(build.built(gpu.kernels()))
    install_gpus(monkeypatch, 80)
    folders.append(build.built(gpu.kernels()))
    library = site / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"
    library.unlink()
    # The driver is for CUDA 12; the version is what the library reports, whatever its file name.
    fake_nvrtc(library.with_name("libnvrtc.so.13"), 12, 10, 80)
    folders.append(build.built(gpu.kernels()))
    assert len(set(folders)) == 4
    engine = build.library_state()[1]
    (kernels / "less.cuh").write_text("")
    assert build.library_state()[1] == engine  # the cache key of the engine does not cover GPU kernels


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("FAIL", r"here: one\.cu: error: NVRTC_ERROR_COMPILATION; see \S+build\.log$"),
        ("CRASH", r"here: \S+ was killed by SIGABRT; see \S+build\.log$"),
    ],
)
def test_kernels_that_do_not_compile(kernels: Path, source: str, message: str) -> None:
    (kernels / "one.cu").write_text(source)
    with pytest.raises(QwenVLError, match=rf"^the engine for GPUs does not compile {message}") as error:
        build.built(gpu.kernels())
    log = Path(str(error.value).rpartition(" ")[2])
    assert not list(log.parent.rglob("*.cubin"))
    if source == "FAIL":  # only this failure is recorded: a killed compiler may succeed later
        assert "one.cu(1): a word" in log.read_text()
        with pytest.raises(QwenVLError, match=r"\(qwenvl build-engine --device gpu tries again\)$"):
            build.built(gpu.kernels())


def test_building_is_forbidden_by_a_variable(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENVL_NO_BUILD", "1")
    message = r"^the engine for GPUs is not built, .* is set: run qwenvl build-engine --device gpu$"
    with pytest.raises(QwenVLError, match=message):
        build.built(gpu.kernels())


def test_nvrtc_finds_its_builtins(kernels: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In wheels of CUDA 13, NVRTC does not search its own folder."""
    install_gpus(monkeypatch, 90, version=13000)
    shutil.rmtree(site / "nvidia" / "cuda_nvrtc")
    library = site / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13"
    fake_nvrtc(library, 13, 0, 90, builtins="libnvrtc-builtins.so.13.0")
    headers(site / "nvidia" / "cu13" / "include")
    target = gpu.kernels()
    assert target.compiler[2] == str(library)  # after Python and its script
    assert all((build.built(target) / name).is_file() for name in target.files)


def test_given_kernels_need_no_nvrtc(kernels: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(site)
    monkeypatch.setenv("QWENVL_CUDA_KERNELS", "/there")
    monkeypatch.setattr(build, "cuda_library", lambda allowed: Path("library"))
    assert gpu.build_for(0) == (Path("library"), Path("/there"))


def test_where_nvrtc_is_found(site: Path, tmp_path: Path) -> None:
    """Of the NVRTCs in wheels, PyTorch and a toolkit, in this order, the first that fits GPU and driver is used.

    Of several wheels it is the newest that fits.
    """
    with pytest.raises(QwenVLError, match=rf"^no NVRTC .*{INSTALL}"):
        nvrtc.find([90], 13)
    headers(site / "nvidia" / "cuda_runtime" / "include")

    def find(*architectures: int, newest: int = 13) -> tuple[Path, tuple[Path, ...]]:
        library, _, _, include = nvrtc.find(architectures, newest)
        return Path(library), include

    toolkit = fake_nvrtc(tmp_path / "toolkit" / "lib64" / "libnvrtc.so.12", 12, 1, 70)
    headers(tmp_path / "toolkit" / "include")
    assert find(70) == (toolkit, (tmp_path / "toolkit" / "include",))
    torch = fake_nvrtc(site / "torch" / "lib" / "libnvrtc-0123abcd.so.12", 12, 4, 70, 90)
    assert find(70)[0] == torch
    wheel = fake_nvrtc(site / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.12", 12, 9, 70, 90, 100)
    # A library of NVRTC that must not be taken for NVRTC.
    fake_nvrtc(wheel.with_name("libnvrtc-builtins.so.12.9"), 12, 9, 120)
    assert find(90) == (wheel, (site / "nvidia" / "cuda_runtime" / "include",))
    newer = fake_nvrtc(site / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13", 13, 0, 75, 90, 120)
    include = headers(site / "nvidia" / "cu13" / "include")
    (include / "cccl").mkdir()
    assert find(120) == (newer, (include, include / "cccl"))
    assert find(70)[0] == wheel
    assert find(90)[0] == newer  # both fit
    assert find(90, newest=12)[0] == wheel

    with pytest.raises(
        QwenVLError, match=rf"libnvrtc.so.13 is NVRTC 13.0, which cannot compile for sm_130{INSTALL}"
    ):
        find(130)
    for library in (torch, wheel, toolkit):
        library.unlink()
    with pytest.raises(
        QwenVLError, match=rf"is NVRTC 13.0, and the NVIDIA driver knows CUDA 12 only{INSTALL}"
    ):
        find(90, newest=12)
    for folder in (site / "nvidia" / "cuda_runtime", include, tmp_path / "toolkit"):
        shutil.rmtree(folder)
    with pytest.raises(QwenVLError, match=rf"without its header cuda_fp16.h{INSTALL}"):
        find(90)


def test_the_cpu_is_never_a_fallback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without the engine for GPUs, the fallback is Paddle for GPUs; without both, there is an error."""
    monkeypatch.setattr(gpu, "cuda_driver", lambda: None)
    monkeypatch.setattr(build, "library", lambda: Path("library"))
    monkeypatch.setattr(select, "paddle_gpus", lambda: 1)
    assert not select.engine_available("auto", gpu=0)
    printed = capfd.readouterr().err
    assert printed.startswith("qwenvl: --device gpu: no NVIDIA driver found")
    assert printed.endswith(". Falling back to the portable graph\n")
    # The engine is required; Paddle has no second GPU; Paddle has no GPU.
    for choice, index, n_gpus in (("fused", 0, 1), ("auto", 1, 1), ("auto", 0, 0)):
        monkeypatch.setattr(select, "paddle_gpus", lambda n=n_gpus: n)
        with pytest.raises(UsageError, match="no NVIDIA driver found"):
            select.engine_available(choice, gpu=index)


def test_gpus_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cuda_driver", lambda: None)
    with pytest.raises(
        UsageError, match=r"^--device gpu: no NVIDIA driver found \(libcuda.so.1\); install it or"
    ):
        gpu.usable(0)
    install_gpus(monkeypatch, 90, version=11080)
    with pytest.raises(UsageError, match=r"knows CUDA 11\.8 only; install one for CUDA 12 or newer$"):
        gpu.usable(0)
    install_gpus(monkeypatch, 90, version=0)
    with pytest.raises(
        UsageError, match=r"does not report its CUDA version; install one for CUDA 12 or newer$"
    ):
        gpu.usable(0)
    install_gpus(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(
        UsageError, match=r"^--device gpu:0: .* shows 0 GPU\(s\) here; CUDA_VISIBLE_DEVICES is ''$"
    ):
        gpu.usable(0)
    install_gpus(monkeypatch, 61, 90)
    with pytest.raises(
        UsageError,
        match=r"^--device gpu:0: GPU 61 has compute capability 6\.1; the engine needs 7\.0$",
    ):
        gpu.usable(0)
    assert gpu.usable(1).architecture == 90
    with pytest.raises(UsageError, match=r"^--device gpu:2: the NVIDIA driver shows 2 GPU\(s\) here"):
        gpu.usable(2)


def test_the_loaded_library_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `load`, the library can be opened by its file name, as libqwenvl.so opens it."""
    monkeypatch.setenv("QWENVL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("QWENVL_NO_BUILD", raising=False)
    library = build.cuda_library()
    assert library.name == "libqwenvl_cuda.so"
    code = """
import ctypes, os
from pathlib import Path
from paddlemix_qwenvl_plugin.engine import gpu
gpu.build_for = lambda index: (Path(os.environ["LIBRARY"]), Path("/kernels"))
gpu.load(0)
assert os.environ["QWENVL_CUDA_KERNELS"] == "/kernels"
ctypes.CDLL("libqwenvl_cuda.so")
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "LIBRARY": str(library)}, check=True)
