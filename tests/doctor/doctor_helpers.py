"""Fake environments for `qwenvl doctor`: the plugin, its requirements, and fake packages and programs of a test."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]

_SECTION = (REPO / "docs" / "doctor.md").read_text("utf-8").split("## What is checked")[1].split("\n## ")[0]
# Name of each check in the document's table -> the keys of its `data`, in the document's order.
DOCUMENTED = {
    name: re.findall(r"`(\w+)`", data)
    for name, data in re.findall(r"^\| `(.+?)` \|.*\|(.*)\|$", _SECTION, re.MULTILINE)
}

# Module `paddle`, formatted by Environment.paddle. It prints a line, which must not get into the doctor's output.
PADDLE = """
import types
print("noise on stdout", flush=True)
__version__ = {version!r}
version = types.SimpleNamespace(cuda=lambda: {cuda!r}{archs})
def is_compiled_with_cuda():
    return {gpu}
class CUDAPlace:
    def __init__(self, index): pass
def to_tensor(values, place=None):
    {addition}
    return values[0]
device = types.SimpleNamespace(cuda=types.SimpleNamespace(
    device_count=lambda: {count},
    get_device_capability=lambda i: {capability},
    get_device_name=lambda i: "A GPU",
))
"""


def validate(report: dict[str, Any]) -> None:
    """Check that the names, order, keys and counts of a report are as in docs/doctor.md."""
    assert list(report) == ["schema", "plugin", "notes", "problems", "checks"]
    assert report["schema"] == 1
    order = []
    for check in report["checks"]:
        assert list(check) == ["name", "status", "message", "fix", "data"]
        assert check["status"] in ("ok", "note", "problem")
        assert check["message"]
        assert "\n" not in check["message"]
        assert check["fix"] is None or check["fix"]
        documented = re.sub(r"^combination\..+", "combination.NAME", check["name"])
        documented = re.sub(r"^entry_point\..+", "entry_point.GROUP", documented)
        assert list(check["data"]) == DOCUMENTED[documented], check["name"]
        order.append(list(DOCUMENTED).index(documented))
    names = [check["name"] for check in report["checks"]]
    assert len(names) == len(set(names))
    assert order == sorted(order)
    for status in ("note", "problem"):
        assert report[f"{status}s"] == [check["status"] for check in report["checks"]].count(status)


@dataclass(frozen=True)
class Result:
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str


class Environment:
    """Fake packages in a folder on PYTHONPATH, and programs in the only folder on PATH.

    `python` has this package and the installed modules, but no Paddle and no package metadata (conftest.py).
    """

    def __init__(self, python: Path, folder: Path) -> None:
        self.python = python
        self.packages = folder / "packages"
        self.programs = folder / "programs"
        # Hide the GPUs of this machine.
        self.variables = {"CUDA_VISIBLE_DEVICES": ""}
        self.path = [self.packages]
        self.packages.mkdir()
        self.programs.mkdir()

    def module(self, name: str, text: str = "") -> None:
        """Add a module, or a file if the name contains `/`, as in "package/__init__.py"."""
        path = self.packages / (name if "/" in name else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def distribution(self, name: str, version: str, **files: str) -> None:
        """Add the metadata of a package; `files`: other files of its dist-info folder, with `__` for a dot."""
        folder = self.packages / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8"
        )
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text, "utf-8")

    def program(self, name: str, text: str) -> None:
        """Add a shell script to PATH."""
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def nvidia_smi(self, *gpus: str) -> None:
        """Add an nvidia-smi that lists GPUs, each `NAME, COMPUTE CAPABILITY`."""
        lines = "\n".join(f"{gpu}, 550.54.15" for gpu in gpus)
        self.program(
            "nvidia-smi", f'[ "$1" = --query-gpu=name,compute_cap,driver_version ] || exit 6\necho "{lines}"'
        )

    def paddle(
        self,
        version: str = "3.3.1",
        gpu: bool = False,
        archs: str | None = "[80, 90]",
        visible_gpu: tuple[int, int] | None = None,
        addition: str = "pass",
    ) -> None:
        """Add a fake Paddle.

        Args:
            version: version of the package.
            gpu: whether it is the package for GPUs, compiled with CUDA.
            archs: code of the result of cuda_archs(); None: Paddle has no such function.
            visible_gpu: compute capability of the GPU that Paddle sees, if any.
            addition: code that a test addition on the GPU runs.
        """
        self.distribution("paddlepaddle-gpu" if gpu else "paddlepaddle", version)
        text = PADDLE.format(
            version=version,
            cuda="12.6" if gpu else "False",
            archs="" if archs is None else f", cuda_archs=lambda: {archs}",
            gpu=gpu,
            count=int(visible_gpu is not None),
            capability=visible_gpu,
            addition=addition,
        )
        self.module("paddle", text)

    def plugin(self, entry_points: str | None = None, version: str | None = None, **files: str) -> None:
        """Add the metadata of the installed plugin; by default, its entry points refer to the standard library."""
        from paddlemix_qwenvl_plugin.doctor.installation import ENTRY_POINTS
        from paddlemix_qwenvl_plugin.version import __version__

        if entry_points is None:
            entry_points = "".join(
                f"[{group}]\n{name} = json:loads\n" for group, name in ENTRY_POINTS.items()
            )
        self.distribution(
            "paddlemix-qwenvl-plugin", version or __version__, entry_points__txt=entry_points, **files
        )

    def add_healthy_packages(self) -> None:
        """Add the packages of a report without problems."""
        self.paddle()
        self.plugin()
        self.distribution("setuptools", "65.5.0")
        self.distribution("pip", "23.2.1")

    def run(self, *arguments: str) -> Result:
        """Run `qwenvl doctor` in this environment."""
        completed = subprocess.run(
            [self.python, "-m", "paddlemix_qwenvl_plugin.cli", "doctor", *arguments],
            env={
                "PATH": str(self.programs),
                "PYTHONPATH": os.pathsep.join(map(str, self.path)),
                "PYTHONDONTWRITEBYTECODE": "1",
                "HOME": os.environ.get("HOME", "/"),
                **self.variables,
            },
            cwd=self.packages.parent,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Result(completed.returncode, completed.stdout, completed.stderr)

    def checks(self, *arguments: str) -> dict[str, dict[str, Any]]:
        """Run the doctor with `--json`, check report, exit code and stderr, and return the report's checks by name."""
        result = self.run("--json", *arguments)
        report = json.loads(result.out)
        validate(report)
        problems = report["problems"]
        plural = "s" if problems > 1 else ""
        error = f"qwenvl: doctor: {problems} problem{plural} found\n" if problems else ""
        assert (result.code, result.err) == (1 if problems else 0, error)
        return {check["name"]: check for check in report["checks"]}

    def problems(self) -> dict[str, dict[str, Any]]:
        """Run the doctor and return the checks with the status "problem", by name."""
        return {name: check for name, check in self.checks().items() if check["status"] == "problem"}
