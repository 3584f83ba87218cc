"""Cost and effects of the activation at interpreter start."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from activation_helpers import REPO, Run, clean_environment

NAMES = "import sys; print(*sorted(sys.modules), sep='\\n')"


def modules_at_start(python: Path, *flags: str) -> set[str]:
    done = subprocess.run(
        [python, *flags, "-c", NAMES], env=clean_environment(), capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("flags", [[], ["-I"], ["-E", "-s"]])
def test_start_loads_the_activation_and_nothing_else(
    active_python: Path, bare_python: Path, flags: list[str]
) -> None:
    assert modules_at_start(active_python, *flags) - modules_at_start(bare_python, *flags) == {
        "_qwenvl_activate"
    }


def test_no_site_no_activation(active_python: Path) -> None:
    assert "_qwenvl_activate" not in modules_at_start(active_python, "-S")


def test_runs_twice_and_is_there_once(run: Run) -> None:
    done = run(
        "import sys, _qwenvl_activate as a; before = list(sys.meta_path); a.init(); a.init()\n"
        "print(before == sys.meta_path, sum(type(f).__module__ == a.__name__ for f in sys.meta_path))"
    )
    assert done.stdout == "True 1\n"


def test_second_reading_of_the_pth_changes_nothing(run: Run) -> None:
    done = run(
        "import site, sys, _qwenvl_activate as a; before = list(sys.meta_path); state = a.state\n"
        "site.addsitedir(next(p for p in sys.path if p.endswith('site-packages')), set())\n"
        "print(before == sys.meta_path, a.state is state)"
    )
    assert done.stdout == "True True\n"


@pytest.mark.parametrize(("value", "finders"), [("0", 0), ("1", 1), ("", 1)])
def test_off_switch(run: Run, value: str, finders: int) -> None:
    done = run(
        "import sys, paddlenlp.transformers.auto.modeling\n"
        "from paddlemix_qwenvl_plugin.upstream import hook_states\n"
        "print(sum(type(f).__module__ == '_qwenvl_activate' for f in sys.meta_path), bool(hook_states()))",
        QWENVL_PLUGIN=value,
    )
    assert done.stdout == f"{finders} {bool(finders)}\n"


def test_pth_and_start_name_the_same_function() -> None:
    folder = REPO / "activation"
    (line,) = (folder / "qwenvl_activate.start").read_text("ascii").splitlines()
    module, function = line.split(":")
    (pth,) = (folder / "qwenvl_activate.pth").read_text("ascii").splitlines()
    assert pth == f"import {module}; {module}.{function}()"
    assert (folder / f"{module}.py").is_file()


def test_every_hook_of_the_table_exists() -> None:
    tree = ast.parse((REPO / "activation" / "_qwenvl_activate.py").read_text("utf-8"))
    names = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    hooks = {name for name in names if isinstance(name, str) and name.startswith(".upstream.")}
    assert hooks
    for hook in hooks:
        module, _, function = hook.partition(":")
        assert callable(getattr(import_module(f"paddlemix_qwenvl_plugin{module}"), function))


def test_benchmark_runs() -> None:
    done = subprocess.run(
        [sys.executable, REPO / "benchmarks" / "startup.py", "--runs", "4"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "| with it | " in done.stdout
