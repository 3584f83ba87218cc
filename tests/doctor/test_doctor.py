"""`qwenvl doctor` in fake environments."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from doctor_helpers import DOCUMENTED, REPO, Environment

from paddlemix_qwenvl_plugin.doctor.installation import ENTRY_POINTS
from paddlemix_qwenvl_plugin.upstream import pins
from paddlemix_qwenvl_plugin.version import __version__

# The fixes that the report gives for Paddle.
INSTALL_CPU = "pip install 'paddlepaddle>=3.0,<3.4' setuptools"
INSTALL_GPU = (
    "pip uninstall -y paddlepaddle paddlepaddle-gpu; "
    "pip install --extra-index-url \"$PADDLE_INDEX\" 'paddlepaddle-gpu>=3.0,<3.4' setuptools"
)
# Names and compute capabilities, as nvidia-smi prints them.
H100, A100, L4, B200 = "NVIDIA H100, 9.0", "NVIDIA A100, 8.0", "NVIDIA L4, 8.9", "NVIDIA B200, 10.0"
HOOKED_MODULE = "paddlenlp.experimental.transformers.qwen.modeling"


def test_report_without_problems(environment: Environment) -> None:
    environment.add_healthy_packages()
    checks = environment.checks()
    assert [name for name, check in checks.items() if check["status"] != "ok"] == [
        "engine",  # no compiler on PATH
        "paddlenlp",
        "paddlemix",
        "hooks",
        "ops",
    ]
    assert {check["status"] for check in checks.values()} == {"ok", "note"}
    # The doctor checks a model only if it is given one.
    always = {name for name in DOCUMENTED if "." not in name} - {"model"}
    assert set(checks) == {*always, *(f"entry_point.{group}" for group in ENTRY_POINTS)}
    assert checks["paddle"]["message"] == "paddlepaddle 3.3.1, CPU build"
    assert checks["paddle"]["data"]["distributions"] == {"paddlepaddle": "3.3.1"}
    assert checks["gpu"]["message"] == "no NVIDIA GPU seen"


def test_text_report(environment: Environment) -> None:
    environment.add_healthy_packages()
    environment.distribution("pyarrow", "26.0.0")
    environment.distribution("numpy", "1.26.4")
    result = environment.run()
    assert (result.code, result.err) == (1, "qwenvl: doctor: 1 problem found\n")
    lines = result.out.splitlines()
    assert "\x1b" not in result.out
    # A status with a message, or an indented fix.
    assert all(re.match(r"(ok|note|problem) +\S| {8}\S", line) for line in lines)
    (index,) = [i for i, line in enumerate(lines) if line.startswith("problem ")]
    assert "pyarrow 26.0.0, numpy 1.26.4: import pyarrow fails, which paddlenlp imports" in lines[index]
    assert lines[index + 1] == "        pip install 'pyarrow==17.0.0'"


def test_the_report_is_coloured_on_a_terminal_only(environment: Environment) -> None:
    environment.add_healthy_packages()
    plain = environment.run()
    environment.variables["FORCE_COLOR"] = "1"  # rich then treats the pipe as a terminal
    coloured = environment.run()
    assert coloured.out != plain.out
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured.out) == plain.out


# Paddle


def test_no_paddle(environment: Environment) -> None:
    environment.plugin(
        entry_points="[paddlenlp.plugins]\nqwenvl = json:loads\n[paddlemix.predictors]\nqwen_vl = paddle:x\n"
    )
    checks = environment.checks()
    assert (checks["paddle"]["status"], checks["paddle"]["fix"]) == ("problem", INSTALL_CPU)
    assert checks["paddle"]["message"] == "Paddle is not installed"
    # Checks that need Paddle report no separate problem.
    assert checks["entry_point.paddlemix.predictors"]["status"] == "note"
    assert checks["entry_point.paddlenlp.plugins"]["status"] == "ok"
    result = environment.run()
    assert result.code == 1
    assert f"problem Paddle is not installed\n        {INSTALL_CPU}\n" in result.out


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("raise RuntimeError('two\\nlines \\x1b[31m')", "RuntimeError: two lines ?[31m"),
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        (
            "import os, sys; print('the reason', file=sys.stderr, flush=True); os.abort()",
            "the process was killed by SIGABRT: the reason",
        ),
        ("import os; os._exit(7)", "the process ended with exit code 7"),
    ],
)
def test_paddle_does_not_import(environment: Environment, text: str, cause: str) -> None:
    environment.add_healthy_packages()
    # The printed JSON must not be taken for the child process's answer.
    environment.module("paddle", f"print('{{}}', flush=True)\n{text}\n")
    environment.module("paddlenlp/__init__.py", "import paddle\n")
    checks = environment.checks()
    assert [name for name, check in checks.items() if check["status"] == "problem"] == ["paddle"]
    assert f"paddlepaddle 3.3.1: import paddle fails: {cause}" in checks["paddle"]["message"]
    assert checks["paddle"]["data"]["cause"] in checks["paddle"]["message"]
    assert checks["paddle"]["fix"] == INSTALL_CPU.replace("install", "install --force-reinstall")
    # The failing import of PaddleNLP has the same cause and is no separate problem.
    assert checks["paddlenlp"]["status"] == "note"


def test_paddle_too_old(environment: Environment) -> None:
    environment.add_healthy_packages()
    shutil.rmtree(environment.packages / "paddlepaddle-3.3.1.dist-info")
    environment.paddle("2.6.2", archs=None)
    (problem,) = environment.problems().values()
    assert problem["message"] == "paddlepaddle 2.6.2 is too old, 3.0 or newer is needed"
    assert problem["fix"] == INSTALL_CPU


def test_paddle_newer_than_tested(environment: Environment) -> None:
    environment.plugin()
    environment.distribution("setuptools", "65.5.0")
    environment.paddle("3.4.0")
    checks = environment.checks()
    assert checks["paddle"]["status"] == "note"
    assert "newer than the tested versions" in checks["paddle"]["message"]


def test_paddle_twice(environment: Environment) -> None:
    environment.add_healthy_packages()
    environment.distribution("paddlepaddle-gpu", "3.3.1")
    (problem,) = environment.problems().values()
    assert problem["name"] == "paddle"
    assert "installed together" in problem["message"]
    assert problem["fix"] == INSTALL_GPU


# GPUs


@pytest.mark.parametrize(
    ("gpu", "is_problem"),
    [(H100, True), (B200, True), (A100, False), (L4, False), ("NVIDIA P100, 6.0", True)],
)
def test_machine_code_of_the_pypi_wheel(environment: Environment, gpu: str, is_problem: bool) -> None:
    """The GPU build on PyPI has machine code for some GPUs only.

    Machine code runs on the same major and the same or a higher minor compute capability: code for 8.6 runs on 8.9,
    code for 6.1 does not run on 6.0.
    """
    environment.add_healthy_packages()
    shutil.rmtree(environment.packages / "paddlepaddle-3.3.1.dist-info")
    # In this fake the doctor's trial addition succeeds, as it could with the real wheel: addition may be one of its few
    # kernels with PTX.
    environment.paddle("2.6.2", gpu=True, archs=None, visible_gpu=(9, 0))
    environment.nvidia_smi(gpu)
    problems = environment.problems()
    # "paddle": this version is too old.
    assert set(problems) == ({"paddle", "gpu"} if is_problem else {"paddle"})
    if is_problem:
        name, capability = gpu.split(", ")
        assert problems["gpu"]["message"].startswith(
            f"{name} (sm_{capability.replace('.', '')}): this Paddle has no machine code for it; "
            "it has code for sm_61, 70, 75, 80, 86"
        )
        assert problems["gpu"]["fix"] == INSTALL_GPU
        assert problems["gpu"]["data"]["architectures"] == [61, 70, 75, 80, 86]


def test_machine_code_of_a_wheel_that_does_not_import(environment: Environment) -> None:
    environment.add_healthy_packages()
    shutil.rmtree(environment.packages / "paddlepaddle-3.3.1.dist-info")
    environment.distribution("paddlepaddle-gpu", "2.6.2")
    environment.module("paddle", "raise ImportError('libcudnn.so.8: cannot open shared object file')")
    environment.nvidia_smi(H100)
    problems = environment.problems()
    assert "libcudnn.so.8" in problems["paddle"]["message"]
    assert "no machine code" in problems["gpu"]["message"]


def test_a_cpu_build_on_a_machine_with_gpus(environment: Environment) -> None:
    environment.add_healthy_packages()
    environment.nvidia_smi(H100, H100)
    gpu = environment.checks()["gpu"]
    assert (gpu["status"], gpu["fix"]) == ("ok", None)
    assert gpu["message"].startswith(
        "NVIDIA H100 (sm_90), NVIDIA H100 (sm_90), used by the engine only: this Paddle is no GPU build"
    )
    assert gpu["data"]["gpus"][0] == {"name": "NVIDIA H100", "architecture": 90, "driver": "550.54.15"}


def check_gpu_build(environment: Environment, **arguments: object) -> dict[str, object]:
    """Add a GPU build (arguments of Environment.paddle), run the doctor and return its check "gpu"."""
    environment.plugin()
    environment.distribution("setuptools", "65.5.0")
    environment.paddle("3.3.0", gpu=True, **arguments)  # type: ignore[arg-type]
    return environment.checks()["gpu"]


def test_a_gpu_build_with_machine_code_for_the_gpu(environment: Environment) -> None:
    environment.nvidia_smi(H100)
    gpu = check_gpu_build(environment, visible_gpu=(9, 0))
    assert (gpu["status"], gpu["message"]) == ("ok", "NVIDIA H100 (sm_90), and Paddle runs on it")


def test_gpus_without_nvidia_smi(environment: Environment) -> None:
    gpu = check_gpu_build(environment, visible_gpu=(8, 0))
    assert (gpu["status"], gpu["message"]) == ("ok", "A GPU (sm_80), and Paddle runs on it")


def test_a_gpu_build_with_ptx(environment: Environment) -> None:
    environment.nvidia_smi(B200)
    gpu = check_gpu_build(environment, archs="['80', '90a']", visible_gpu=(10, 0))
    assert (gpu["status"], gpu["fix"]) == ("note", None)
    assert "code for sm_80, 90 and runs on it from PTX" in str(gpu["message"])


def test_a_gpu_build_without_ptx(environment: Environment) -> None:
    environment.nvidia_smi(B200)
    gpu = check_gpu_build(
        environment, visible_gpu=(10, 0), addition="raise OSError('no kernel image is available')"
    )
    assert (gpu["status"], gpu["fix"]) == ("problem", INSTALL_GPU)
    assert "no machine code" in str(gpu["message"])


def test_a_gpu_on_which_an_addition_fails(environment: Environment) -> None:
    environment.nvidia_smi(H100)
    gpu = check_gpu_build(environment, visible_gpu=(9, 0), addition="raise OSError('driver is too old')")
    assert gpu["status"] == "problem"
    assert "a test addition on the GPU fails: OSError: driver is too old" in str(gpu["message"])


def test_a_hidden_gpu(environment: Environment) -> None:
    environment.nvidia_smi(H100)
    environment.variables["CUDA_VISIBLE_DEVICES"] = "-1"
    gpu = check_gpu_build(environment)
    assert gpu["status"] == "note"
    assert str(gpu["message"]).endswith("which Paddle does not see; CUDA_VISIBLE_DEVICES is '-1'")


def test_a_failing_nvidia_smi(environment: Environment) -> None:
    environment.add_healthy_packages()
    environment.program("nvidia-smi", "echo could not talk to the driver; exit 9")
    gpu = environment.checks()["gpu"]
    assert gpu["status"] == "note"
    assert "nvidia-smi: could not talk to the driver" in str(gpu["data"]["cause"])


# Broken combinations of packages, the rows `broken` of pins.yaml

# Row -> packages that make it apply, with their versions; "": not installed.
BROKEN_PACKAGES = {
    "aistudio-sdk": {"paddlenlp": "3.0.0b0", "aistudio-sdk": "0.3.8"},
    "huggingface-hub-ppdiffusers": {"ppdiffusers": "0.29.0", "huggingface_hub": "0.26.0"},
    "huggingface-hub-paddlenlp": {"paddlenlp": "3.0.0b0", "huggingface_hub": "2.0.1"},
    "visualdl-beta": {"visualdl": "3.0.0b2"},
    "pyarrow-numpy": {"pyarrow": "26.0.0", "numpy": "1.26.4"},
    "setuptools": {"setuptools": ""},
    "setuptools-gpu": {"setuptools": "", "paddlepaddle": "", "paddlepaddle-gpu": "3.3.1"},
    "pip": {"paddlenlp": "3.0.0b0", "pip": ""},
    "paddle-too-old": {"paddlenlp": "3.0.0b0", "paddlepaddle": "2.6.2"},
}


def test_every_broken_combination_has_a_case() -> None:
    assert set(BROKEN_PACKAGES) == {row.name for row in pins.load().broken}


@pytest.mark.parametrize("row", pins.load().broken, ids=lambda row: row.name)
def test_broken_combinations(environment: Environment, row: pins.Broken) -> None:
    environment.plugin()
    healthy = {"paddlepaddle": "3.3.1", "setuptools": "65.5.0", "pip": "23.2.1"}
    for name, version in {**healthy, **BROKEN_PACKAGES[row.name]}.items():
        if version:
            environment.distribution(name, version)
    environment.module("paddle", "raise ImportError('any')")
    problems = environment.problems()
    assert [name for name in problems if name.startswith("combination.")] == [f"combination.{row.name}"]
    problem = problems[f"combination.{row.name}"]
    assert problem["fix"] == row.fix
    assert row.symptom in problem["message"]
    # The check "paddle", which finds that the import fails, leaves the fix to the combination. With paddle-too-old it
    # has a fix of its own, since it finds the version first.
    if row.name != "paddle-too-old":
        assert problems["paddle"]["fix"] is None


def test_a_checkout_counts_as_installed(environment: Environment) -> None:
    """A checkout on PYTHONPATH has no package metadata."""
    environment.add_healthy_packages()
    environment.module("paddlenlp/__init__.py")
    environment.distribution("aistudio_sdk", "0.3.0")
    assert set(environment.problems()) == {"combination.aistudio-sdk"}


# Upstreams, hooks, operators


def activate(environment: Environment, hook: str) -> None:
    """Activate the plugin as its .pth file does: its stand-ins, and hooks for HOOKED_MODULE and for a missing module.

    `hook`: "hooks:good", or "hooks:bad" for a hook that fails.
    """
    environment.path.append(REPO / "activation")
    table = {HOOKED_MODULE: hook, "paddlenlp.not_in_this_version": hook}
    code = (
        "import _qwenvl_activate as a\n"
        f"a._TABLE.clear(); a._TABLE.update({{**a.STAND_INS, **{table!r}}})\n"
        "a.init()\n"
    )
    environment.module("sitecustomize", code)
    environment.module(
        "hooks", "def good(module): module.done = True\ndef bad(module): raise ValueError('not this one')\n"
    )


def add_paddlenlp(environment: Environment, text: str = "import paddlenlp_ops\n") -> None:
    """Add a fake PaddleNLP; `text`: content of HOOKED_MODULE."""
    for package in ("", "experimental/", "experimental/transformers/", "experimental/transformers/qwen/"):
        environment.module(f"paddlenlp/{package}__init__.py")
    environment.module("paddlenlp/experimental/transformers/qwen/modeling.py", text)
    environment.distribution("paddlenlp", "3.0.0b0")


def test_hooks_fire(environment: Environment) -> None:
    environment.add_healthy_packages()
    add_paddlenlp(environment)
    activate(environment, "hooks:good")
    checks = environment.checks()
    assert checks["paddlenlp"]["message"] == "PaddleNLP 3.0.0b0"
    assert checks["hooks"]["status"] == "ok"
    assert checks["hooks"]["data"] == {
        "modules": {
            "paddlenlp_ops": "fired",
            HOOKED_MODULE: "fired",
            "paddlenlp.not_in_this_version": "armed",
        },
        "not_imported": {},
    }
    assert checks["ops"]["data"]["state"] == "stand-in"


def test_hooks_without_upstream(environment: Environment) -> None:
    environment.add_healthy_packages()
    activate(environment, "hooks:good")
    hooks = environment.checks()["hooks"]
    assert hooks["status"] == "ok"
    assert set(hooks["data"]["modules"].values()) == {"armed"}


def test_a_failing_hook(environment: Environment) -> None:
    environment.add_healthy_packages()
    add_paddlenlp(environment)
    activate(environment, "hooks:bad")
    (problem,) = environment.problems().values()
    assert problem["name"] == "hooks"
    assert f"{HOOKED_MODULE} failed: ValueError: not this one" in problem["message"]


def test_a_hooked_module_does_not_import(environment: Environment) -> None:
    environment.add_healthy_packages()
    add_paddlenlp(environment, "raise ImportError('gone in this version')")
    activate(environment, "hooks:good")
    (problem,) = environment.problems().values()
    assert problem["data"]["not_imported"] == {HOOKED_MODULE: "ImportError: gone in this version"}


def test_hooks_off(environment: Environment) -> None:
    environment.add_healthy_packages()
    checks = environment.checks()
    assert "paddlemix_qwenvl_plugin.launch" in checks["hooks"]["message"]
    assert checks["ops"]["data"]["state"] == "missing"
    activate(environment, "hooks:good")
    environment.variables["QWENVL_PLUGIN"] = "0"
    hooks = environment.checks()["hooks"]
    assert (hooks["status"], hooks["message"]) == ("note", "hooks: switched off by QWENVL_PLUGIN=0")


@pytest.mark.parametrize(
    ("text", "status"), [("", "ok"), ("raise ImportError('undefined symbol: _ZN3phi')", "problem")]
)
def test_built_operators(environment: Environment, text: str, status: str) -> None:
    environment.add_healthy_packages()
    environment.module("paddlenlp_ops", text)
    ops = environment.checks()["ops"]
    assert (ops["status"], ops["data"]["state"]) == (status, "built")
    if text:
        assert "undefined symbol: _ZN3phi" in ops["message"]
        assert ops["fix"] == "python setup_cuda.py install"


def test_paddlenlp_does_not_import(environment: Environment) -> None:
    environment.add_healthy_packages()
    add_paddlenlp(environment)
    environment.module("paddlenlp/__init__.py", "raise ImportError('no name of this kind')")
    (problem,) = environment.problems().values()
    assert (
        problem["message"] == "PaddleNLP 3.0.0b0: import paddlenlp fails: ImportError: no name of this kind"
    )
    assert problem["fix"] == "pip install 'paddlemix-qwenvl-plugin[paddlenlp]'"


def test_an_untested_paddlenlp(environment: Environment) -> None:
    environment.add_healthy_packages()
    environment.module("paddlenlp/__init__.py")
    environment.distribution("paddlenlp", "2.8.1")
    check = environment.checks()["paddlenlp"]
    assert check["status"] == "note"
    assert check["message"] == "PaddleNLP 2.8.1 is untested; tested versions: 3.0.0b0, 3.0.0b4"


def test_a_folder_named_paddlenlp_is_not_a_package(environment: Environment) -> None:
    environment.add_healthy_packages()
    (environment.packages / "paddlenlp" / "docs").mkdir(parents=True)
    assert environment.checks()["paddlenlp"]["message"].startswith("PaddleNLP is not installed")


# The plugin's own installation


def test_an_old_editable_install(environment: Environment, tmp_path: Path) -> None:
    environment.paddle()
    environment.distribution("setuptools", "65.5.0")
    checkout = tmp_path / "a checkout"
    url = f'{{"url": "{checkout.as_uri()}", "dir_info": {{"editable": true}}}}'
    environment.plugin("[console_scripts]\nqwenvl = json:loads\n", direct_url__json=url)
    problems = environment.problems()
    assert set(problems) == {f"entry_point.{group}" for group in ENTRY_POINTS}
    assert {problem["fix"] for problem in problems.values()} == {f"pip install --no-deps -e '{checkout}'"}


def test_another_version_is_installed(environment: Environment) -> None:
    environment.paddle()
    environment.distribution("setuptools", "65.5.0")
    environment.plugin(version="0.0.1")
    (problem,) = environment.problems().values()
    assert problem["message"] == f"plugin {__version__} in {REPO}, but the installed version is 0.0.1"
    assert problem["fix"] == f"pip install {REPO}"


def test_not_installed(environment: Environment) -> None:
    environment.paddle()
    environment.distribution("setuptools", "65.5.0")
    checks = environment.checks()
    assert (checks["plugin"]["status"], checks["plugin"]["fix"]) == ("note", f"pip install {REPO}")
    assert not [name for name in checks if name.startswith("entry_point.")]


def test_an_entry_point_that_does_not_load(environment: Environment) -> None:
    environment.paddle()
    environment.distribution("setuptools", "65.5.0")
    lines = [f"[{group}]\n{name} = json:gone\n" for group, name in ENTRY_POINTS.items()]
    environment.plugin("".join(lines))
    problems = environment.problems()
    assert set(problems) == {f"entry_point.{group}" for group in ENTRY_POINTS}
    assert all("AttributeError" in problem["message"] for problem in problems.values())
