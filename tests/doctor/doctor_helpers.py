"""Fake environments: a Python with the plugin, its requirements, and the packages that a test creates."""

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

_TABLE = (REPO / "docs" / "doctor.md").read_text("utf-8").split("## What is checked")[1].split("\n## ")[0]
# Check -> the keys of its `data`, in the order of the document.
DOCUMENTED = {
    row[0]: re.findall(r"`(\w+)`", row[1])
    for row in re.findall(r"^\| `(.+?)` \|.*\|(.*)\|$", _TABLE, re.MULTILINE)
}

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
    {adding}
    return values[0]
device = types.SimpleNamespace(cuda=types.SimpleNamespace(
    device_count=lambda: {count},
    get_device_capability=lambda i: {capability},
    get_device_name=lambda i: "A GPU",
))
"""


def validate(report: dict[str, Any]) -> None:
    """Compare a report with docs/doctor.md."""
    assert list(report) == ["schema", "plugin", "notes", "problems", "checks"]
    assert report["schema"] == 1
    order = []
    for check in report["checks"]:
        assert list(check) == ["name", "status", "message", "fix", "data"]
        assert check["status"] in ("ok", "note", "problem")
        assert check["message"]
        assert "\n" not in check["message"]
        assert check["fix"] is None or check["fix"]
        documented = re.sub(r"^(combination|entry_point)\..+", r"\1.", check["name"])
        documented = {"combination.": "combination.NAME", "entry_point.": "entry_point.GROUP"}.get(
            documented, documented
        )
        assert list(check["data"]) == DOCUMENTED[documented], check["name"]
        order.append(list(DOCUMENTED).index(documented))
    names = [check["name"] for check in report["checks"]]
    assert len(names) == len(set(names))
    assert order == sorted(order)
    for status in ("note", "problem"):
        assert report[f"{status}s"] == [check["status"] for check in report["checks"]].count(status)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class Environment:
    """Fake packages in a folder on PYTHONPATH, and programs in the only folder on PATH."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python = python
        self.packages = folder / "packages"
        self.programs = folder / "programs"
        # Hides the driver of the test machine.
        self.variables = {"CUDA_VISIBLE_DEVICES": ""}
        self.path = [self.packages]
        self.packages.mkdir()
        self.programs.mkdir()

    def module(self, name: str, text: str = "") -> None:
        """Add a module or, with `/` in the name, a file of one."""
        path = self.packages / (name if "/" in name else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def distribution(self, name: str, version: str, **files: str) -> None:
        """Add the metadata of a package; `files`: further files of its dist-info, with `__` for a dot."""
        folder = self.packages / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8"
        )
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text, "utf-8")

    def program(self, name: str, text: str) -> None:
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
        sees: tuple[int, int] | None = None,
        adding: str = "pass",
    ) -> None:
        """Add a Paddle. `archs`: result of cuda_archs(), None: no such function; `sees`: a GPU visible to it."""
        self.distribution("paddlepaddle-gpu" if gpu else "paddlepaddle", version)
        text = PADDLE.format(
            version=version,
            cuda="12.6" if gpu else "False",
            archs="" if archs is None else f", cuda_archs=lambda: {archs}",
            gpu=gpu,
            count=int(sees is not None),
            capability=sees,
            adding=adding,
        )
        self.module("paddle", text)

    def plugin(self, entry_points: str | None = None, version: str | None = None, **files: str) -> None:
        """Add the installed plugin, with entry points that need no other package."""
        from paddlemix_qwenvl_plugin.doctor.installation import ENTRY_POINTS
        from paddlemix_qwenvl_plugin.version import __version__

        if entry_points is None:
            entry_points = "".join(
                f"[{group}]\n{name} = json:loads\n" for group, name in ENTRY_POINTS.items()
            )
        self.distribution(
            "paddlemix-qwenvl-plugin", version or __version__, entry_points__txt=entry_points, **files
        )

    def well(self) -> None:
        """Add everything needed for a report without problems."""
        self.paddle()
        self.plugin()
        self.distribution("setuptools", "65.5.0")
        self.distribution("pip", "23.2.1")

    def run(self, *arguments: str) -> Result:
        done = subprocess.run(
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
        return Result(done.returncode, done.stdout, done.stderr)

    def checks(self, *arguments: str) -> dict[str, dict[str, Any]]:
        """Checks of the `--json` report by name; the report is compared with the document."""
        result = self.run("--json", *arguments)
        report = json.loads(result.out)
        validate(report)
        problems = report["problems"]
        plural = "s" if problems > 1 else ""
        said = f"qwenvl: doctor: {problems} problem{plural} found\n" if problems else ""
        assert (result.code, result.err) == (1 if problems else 0, said)
        return {check["name"]: check for check in report["checks"]}

    def problems(self) -> dict[str, dict[str, Any]]:
        return {name: check for name, check in self.checks().items() if check["status"] == "problem"}
