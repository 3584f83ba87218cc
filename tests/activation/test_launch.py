"""`python -m paddlemix_qwenvl_plugin.launch` against plain Python with the activation installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from activation_helpers import AUTO, REPO, clean_environment

SCRIPT = f"""
import os, sys
import beside
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
    (tmp_path / "scripts" / "beside.py").write_text("")
    (tmp_path / "link.py").symlink_to(tmp_path / "scripts" / "stock.py")
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "stock.py").write_text(SCRIPT)
    (tmp_path / "package" / "broken.py").write_text("import is_not_there")
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("import is_not_there")
    return tmp_path


def start(python: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
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
    path = f"{fakes}:{REPO / 'activation'}"  # no .pth is read from PYTHONPATH
    call = ("-m", "paddlemix_qwenvl_plugin.launch", *arguments)
    return start(python, *call, cwd=cwd, PYTHONPATH=path, **environment)


@pytest.mark.parametrize(
    "arguments",
    [
        ("scripts/stock.py", "--flag", "a b"),
        ("link.py",),
        ("-m", "package.stock", "--flag", "-m", "x"),
    ],
)
def test_same_as_with_the_pth(
    active_python: Path, bare_python: Path, folder: Path, fakes: Path, arguments: tuple[str, ...]
) -> None:
    plain = start(active_python, *arguments, cwd=folder, PYTHONPATH=str(fakes))
    launched = launch(bare_python, *arguments, cwd=folder, fakes=fakes)
    assert plain.returncode == launched.returncode == 7, plain.stderr + launched.stderr
    assert launched.stdout == plain.stdout
    assert f"['{AUTO}'] True" in launched.stdout
    assert launched.stderr == plain.stderr == ""


def test_plain_start_would_not_have_been_active(bare_python: Path, folder: Path, fakes: Path) -> None:
    """Control for the test above: a bare Python behaves differently."""
    done = start(bare_python, "scripts/stock.py", cwd=folder, PYTHONPATH=str(fakes))
    assert "No module named '_qwenvl_activate'" in done.stderr


def test_off_switch(bare_python: Path, folder: Path, fakes: Path) -> None:
    (folder / "print.py").write_text("import sys; print(type(sys.meta_path[0]).__module__)")
    for value, active in (("0", False), ("1", True)):
        done = launch(bare_python, "print.py", cwd=folder, fakes=fakes, QWENVL_PLUGIN=value)
        assert (done.stdout == "_qwenvl_activate\n") is active


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
    done = launch(bare_python, *arguments, cwd=folder, fakes=fakes)
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["package.broken", "broken_package.stock"])
def test_errors_of_the_script_are_its_own(bare_python: Path, folder: Path, fakes: Path, module: str) -> None:
    done = launch(bare_python, "-m", module, cwd=folder, fakes=fakes)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "No module named 'is_not_there'" in done.stderr


def test_not_installed(bare_python: Path, folder: Path) -> None:
    done = start(bare_python, "-m", "paddlemix_qwenvl_plugin.launch", "scripts/stock.py", cwd=folder)
    assert done.returncode == 1
    assert done.stderr.startswith("error: paddlemix-qwenvl-plugin is not installed where this Python looks")
    assert done.stderr.count("\n") == 1
