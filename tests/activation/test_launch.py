"""`python -m paddlemix_qwenvl_plugin.launch`, compared with an interpreter that has the activation installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from activation_helpers import AUTO, REPO, clean_environment

# Sets a hook on a fake module, and prints what a script can see of its start. `neighbour` is in the script's folder
# and, for -m, in the working directory; the printed sys.path[0] tells which of these was used. A script's __package__
# is None or empty.
SCRIPT = f"""
import os, sys
import neighbour
import _qwenvl_activate as a
a._TABLE[{AUTO!r}] = "hooks:good"
a.state[{AUTO!r}] = "armed"
import {AUTO} as m
import hooks
from paddlemix_qwenvl_plugin.upstream import hook_states
print(__name__, __file__, __package__ or None, sys.modules["__main__"].__dict__ is globals())
print(os.path.abspath(sys.argv[0]), sys.argv[1:], sys.path[0])
print(hooks.calls, m.Auto.made_by_hook, sorted(hook_states().items()))
if __name__ == "__main__":
    sys.exit(7)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "stock.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "neighbour.py").write_text("")
    (tmp_path / "link.py").symlink_to(tmp_path / "scripts" / "stock.py")
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "stock.py").write_text(SCRIPT)
    (tmp_path / "package" / "broken.py").write_text("import missing_module")
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("import missing_module")
    return tmp_path


def run_python(
    python: Path, *arguments: str, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=60,
    )


def launch(
    python: Path, *arguments: str, cwd: Path, fakes: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    # The activation module is on PYTHONPATH, from which Python reads no .pth files.
    path = f"{fakes}:{REPO / 'activation'}"
    call = ("-m", "paddlemix_qwenvl_plugin.launch", *arguments)
    return run_python(python, *call, cwd=cwd, PYTHONPATH=path, **environment)


@pytest.mark.parametrize(
    "arguments",
    [
        ("scripts/stock.py", "--flag", "a b"),
        ("link.py",),
        ("-m", "package.stock", "--flag", "-m", "x"),
    ],
)
def test_launch_has_the_effect_of_the_installed_activation(
    active_python: Path, bare_python: Path, folder: Path, fakes: Path, arguments: tuple[str, ...]
) -> None:
    installed = run_python(active_python, *arguments, cwd=folder, PYTHONPATH=str(fakes))
    launched = launch(bare_python, *arguments, cwd=folder, fakes=fakes)
    assert installed.returncode == launched.returncode == 7, installed.stderr + launched.stderr
    assert launched.stdout == installed.stdout
    assert f"['{AUTO}'] True" in launched.stdout
    assert launched.stderr == installed.stderr == ""


def test_interpreter_without_launch_is_not_activated(bare_python: Path, folder: Path, fakes: Path) -> None:
    """Control for the comparison of launched and installed: `bare_python` alone does not find the activation module."""
    process = run_python(bare_python, "scripts/stock.py", cwd=folder, PYTHONPATH=str(fakes))
    assert "No module named '_qwenvl_activate'" in process.stderr


def test_qwenvl_plugin_0_switches_the_activation_off(bare_python: Path, folder: Path, fakes: Path) -> None:
    (folder / "print.py").write_text("import sys; print(type(sys.meta_path[0]).__module__)")
    for value, active in (("0", False), ("1", True)):
        process = launch(bare_python, "print.py", cwd=folder, fakes=fakes, QWENVL_PLUGIN=value)
        assert (process.stdout == "_qwenvl_activate\n") is active


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("no/such.py",), "error: no/such.py: no such script"),
        (("package",), "error: package: no such script"),
        (("-m", "package.no_such"), "error: package.no_such: no such module"),
        (("-m", "no_such.stock"), "error: no_such.stock: no such module"),
        (("-m",), "error: no script named; usage: python -m paddlemix_qwenvl_plugin.launch "),
        ((), "error: no script named; usage: python -m paddlemix_qwenvl_plugin.launch "),
    ],
)
def test_usage_errors(
    bare_python: Path, folder: Path, fakes: Path, arguments: tuple[str, ...], line: str
) -> None:
    process = launch(bare_python, *arguments, cwd=folder, fakes=fakes)
    assert process.returncode == 2
    assert process.stderr.startswith(line)
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["package.broken", "broken_package.stock"])
def test_import_errors_of_the_script_propagate(
    bare_python: Path, folder: Path, fakes: Path, module: str
) -> None:
    process = launch(bare_python, "-m", module, cwd=folder, fakes=fakes)
    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert "No module named 'missing_module'" in process.stderr


def test_error_if_the_activation_is_not_installed(bare_python: Path, folder: Path) -> None:
    process = run_python(bare_python, "-m", "paddlemix_qwenvl_plugin.launch", "scripts/stock.py", cwd=folder)
    assert process.returncode == 1
    assert process.stderr.startswith(
        "error: paddlemix-qwenvl-plugin is not installed where this Python looks"
    )
    assert process.stderr.count("\n") == 1
