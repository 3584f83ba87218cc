"""Activation at interpreter start: loaded modules, the installed finder, the activation files."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from activation_helpers import REPO, Run, clean_environment

PRINT_MODULES = "import sys; print(*sorted(sys.modules), sep='\\n')"


def modules_at_start(python: Path, *flags: str) -> set[str]:
    result = subprocess.run(
        [python, *flags, "-c", PRINT_MODULES],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("flags", [[], ["-I"], ["-E", "-s"]])
def test_activation_loads_only_its_module(active_python: Path, bare_python: Path, flags: list[str]) -> None:
    assert modules_at_start(active_python, *flags) - modules_at_start(bare_python, *flags) == {
        "_qwenvl_activate"
    }


def test_no_activation_without_site_packages(active_python: Path) -> None:
    assert "_qwenvl_activate" not in modules_at_start(active_python, "-S")


def test_repeated_init_installs_one_finder(run: Run) -> None:
    result = run(
        "import sys, _qwenvl_activate as a; before = list(sys.meta_path); a.init(); a.init()\n"
        "print(before == sys.meta_path, sum(type(f).__module__ == a.__name__ for f in sys.meta_path))"
    )
    assert result.stdout == "True 1\n"


def test_reading_the_pth_file_again_has_no_effect(run: Run) -> None:
    result = run(
        "import site, sys, _qwenvl_activate as a; before = list(sys.meta_path); state = a.state\n"
        "site.addsitedir(next(p for p in sys.path if p.endswith('site-packages')), set())\n"
        "print(before == sys.meta_path, a.state is state)"
    )
    assert result.stdout == "True True\n"


@pytest.mark.parametrize(("value", "n_finders"), [("0", 0), ("1", 1), ("", 1)])
def test_qwenvl_plugin_0_switches_the_activation_off(run: Run, value: str, n_finders: int) -> None:
    result = run(
        "import sys, paddlenlp.transformers.auto.modeling\n"
        "from paddlemix_qwenvl_plugin.upstream import hook_states\n"
        "print(sum(type(f).__module__ == '_qwenvl_activate' for f in sys.meta_path), bool(hook_states()))",
        QWENVL_PLUGIN=value,
    )
    assert result.stdout == f"{n_finders} {bool(n_finders)}\n"


def test_pth_and_start_name_the_same_function() -> None:
    folder = REPO / "activation"
    (line,) = (folder / "qwenvl_activate.start").read_text("ascii").splitlines()
    module, function = line.split(":")
    (pth,) = (folder / "qwenvl_activate.pth").read_text("ascii").splitlines()
    assert pth == f"import {module}; {module}.{function}()"
    assert (folder / f"{module}.py").is_file()


def test_all_hooks_exist() -> None:
    # The hooks are the string constants that begin with ".upstream."; the source is parsed, not imported.
    tree = ast.parse((REPO / "activation" / "_qwenvl_activate.py").read_text("utf-8"))
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    hooks = {value for value in constants if isinstance(value, str) and value.startswith(".upstream.")}
    assert hooks
    for hook in hooks:
        module, _, function = hook.partition(":")
        assert callable(getattr(import_module(f"paddlemix_qwenvl_plugin{module}"), function))


def test_start_up_benchmark_runs() -> None:
    result = subprocess.run(
        [sys.executable, REPO / "benchmarks" / "startup.py", "--runs", "4"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "| with it | " in result.stdout
