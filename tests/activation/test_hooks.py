"""The finder and the hooks, with fake upstream packages."""

from __future__ import annotations

from pathlib import Path

import pytest
from activation_helpers import AUTO, Run

LOAD = f"import {AUTO} as m\nimport hooks\n"


def test_hook_is_called_once_after_the_module(run: Run) -> None:
    code = (
        LOAD + f"import importlib; importlib.import_module({AUTO!r})\nprint(hooks.calls, m.Auto.made_by_hook)"
    )
    done = run(code, "hooks:good")
    assert done.stdout == f"['{AUTO}'] True\n"
    assert done.stderr == ""


EARLY = "a.EARLY_HOOKS[{0!r}] = a._TABLE[{0!r}] = {1!r}; a.state[{0!r}] = 'armed'\n"


@pytest.mark.parametrize(("hook", "ran"), [("hooks:early", True), ("hooks:no_such", False)])
def test_early_hook_is_called_before_the_module(run: Run, fakes: Path, hook: str, ran: bool) -> None:
    """A hook runs before the module is executed; if it fails, the module is unchanged."""
    with (fakes / "hooks.py").open("a") as file:
        file.write("def early(module): calls.append((module.__name__, hasattr(module, 'Auto')))\n")
    arm = "import _qwenvl_activate as a\n" + EARLY.format(AUTO, hook)
    done = run(f"{arm}{LOAD}print(hooks.calls, m.LOADERS, m.Auto.make())", None, "-W", "always")
    calls = [(AUTO, False)] if ran else []
    assert done.stdout == f"{calls} {('SourceFileLoader',) * 2} upstream's\n"
    assert done.stderr.count("RuntimeWarning: ") == (not ran)


def test_module_looks_as_without_the_plugin(run: Run) -> None:
    """Loader, spec and file are the module's own, also during execution."""
    code = LOAD + (
        "from importlib.resources import files\n"
        "print(m.LOADERS, type(m.__loader__).__name__, type(m.__spec__.loader).__name__)\n"
        "print(m.__loader__ is m.__spec__.loader, m.__spec__.has_location, m.__file__ == m.__spec__.origin)\n"
        "print(m.__doc__, m.__package__, m.__spec__.name, m.__spec__.submodule_search_locations)\n"
        "import inspect; print(inspect.getsource(m.Auto.make).strip().splitlines()[0])\n"
        "print(files('paddlenlp.transformers.auto').joinpath('data.txt').read_text())\n"
    )
    with_it, without = run(code, "hooks:good"), run(code, QWENVL_PLUGIN="0")
    assert with_it.returncode == 0, with_it.stderr
    assert with_it.stdout == without.stdout
    assert "SourceFileLoader" in with_it.stdout


def test_spec_answers_as_the_real_one_before_loading(run: Run) -> None:
    done = run(
        f"import importlib.util, sys; s = importlib.util.find_spec({AUTO!r})\n"
        f"print(s.loader.get_source({AUTO!r})[:4].strip(), s.loader.is_package({AUTO!r}), s.has_location)\n"
        f"print(s.loader.get_filename() == s.origin, {AUTO!r} in sys.modules)",
        "hooks:good",
    )
    assert done.stdout == '""" False True\nTrue False\n'


def test_unrelated_imports_get_no_answer(run: Run) -> None:
    done = run(
        "import sys, _qwenvl_activate as a; f = sys.meta_path[0]\n"
        "import paddlenlp.utils, paddlemix, json, email.message, hooks\n"
        "print(type(f).__module__, f.find_spec('json'), f.find_spec('paddlenlp'), f.find_spec('no.such'))\n"
        "print(hooks.calls, 'paddlemix_qwenvl_plugin' in sys.modules)\n"
        "try: import no_such_module\n"
        "except ModuleNotFoundError as e: print(e)"
    )
    assert done.stdout == ("_qwenvl_activate None None None\n[] False\nNo module named 'no_such_module'\n")


def test_module_of_the_table_that_is_not_installed(run: Run) -> None:
    done = run("try: import paddlemix.auto.modelling\nexcept ModuleNotFoundError as e: print(e.name)")
    assert done.stdout == "paddlemix.auto.modelling\n"
    done = run("try: import paddle.inference.wrapper\nexcept ModuleNotFoundError as e: print(e.name)")
    assert done.stdout == "paddle\n"


@pytest.mark.parametrize("place", [0, 1])
def test_finder_that_asks_all_finders(run: Run, place: int) -> None:
    """Another import hook before or after this one; the hook still runs once."""
    done = run(
        "import sys, importlib.util\n"
        "class Asking:\n"
        "    busy = False\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if self.busy or not name.endswith('modeling'): return None\n"
        "        self.busy = True\n"
        "        try: return importlib.util.find_spec(name)\n"
        "        finally: self.busy = False\n"
        f"sys.meta_path.insert({place}, Asking())\n" + LOAD + "print(hooks.calls)",
        "hooks:good",
    )
    assert done.stdout == f"['{AUTO}']\n", done.stderr[-500:]


@pytest.mark.parametrize("hook", ["hooks:bad", "no_such_hooks:f", "hooks:no_such"])
def test_failing_hook_warns_once_and_upstream_stays(run: Run, hook: str) -> None:
    code = LOAD + (
        "print(m.LOADERS, hasattr(m, 'added'), m.Auto.make(), isinstance(vars(m.Auto)['make'], classmethod))\n"
        "import importlib; importlib.reload(m)\n"
        "from paddlemix_qwenvl_plugin.upstream import hook_states\n"
        f"print(hook_states()[{AUTO!r}][:6], hook_states()['paddlenlp_ops'])"
    )
    done = run(code, hook, "-W", "always")
    assert done.returncode == 0
    loaders = ("SourceFileLoader",) * 2
    assert done.stdout == f"{loaders} False upstream's True\nfailed armed\n"
    (warning,) = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert f"paddlemix_qwenvl_plugin: {AUTO} is left unchanged, its hook failed (" in warning
    if hook == "hooks:bad":
        assert "(ValueError: not the version that this hook knows)" in warning


def test_warnings_as_errors_do_not_break_the_import(run: Run) -> None:
    done = run(LOAD + "print(m.Auto.make())", "hooks:bad", "-W", "error")
    assert done.stdout == "upstream's\n"
    assert done.stderr.count("is left unchanged") == 1


def test_upstream_that_fails_fails_as_ever(run: Run) -> None:
    """The module's own error propagates, and the next import is hooked again."""
    done = run(
        f"import sys, hooks; path = __import__('paddlenlp.transformers.auto').transformers.auto.__path__[0]\n"
        "text = open(path + '/modeling.py').read()\n"
        "open(path + '/modeling.py', 'w').write('raise ImportError(\"upstream is broken\")')\n"
        f"try: import {AUTO}\n"
        "except ImportError as e: print(e, hooks.calls)\n"
        "open(path + '/modeling.py', 'w').write(text + '#' * 99); import importlib; importlib.invalidate_caches()\n"
        f"import {AUTO}; print(hooks.calls)",
        "hooks:good",
    )
    assert done.stdout == f"upstream is broken []\n['{AUTO}']\n"


def test_interrupt_in_a_hook_is_not_swallowed(run: Run) -> None:
    done = run(LOAD, "hooks:exits")
    assert done.returncode != 0
    assert "KeyboardInterrupt" in done.stderr


def test_debug_output_and_registry(run: Run) -> None:
    code = LOAD + (
        "from paddlemix_qwenvl_plugin.upstream import hook_states\nprint(*sorted(hook_states().items()), sep='\\n')"
    )
    done = run(code, "hooks:good", QWENVL_PLUGIN_DEBUG="1")
    first, second = done.stderr.splitlines()
    assert first.startswith("qwenvl: armed for ")
    assert second == f"qwenvl: hook {AUTO} fired"
    assert f"('{AUTO}', 'fired')" in done.stdout
    assert done.stdout.count("'armed'") == done.stdout.count("\n") - 1 > 0


def test_debug_output_names_the_set_attributes(run: Run) -> None:
    done = run(LOAD, "hooks:bad", QWENVL_PLUGIN_DEBUG="1")
    assert f"qwenvl: hook {AUTO} set make of Auto\n" in done.stderr
    assert f"qwenvl: hook {AUTO} failed: ValueError: not the version that this hook knows\n" in done.stderr
