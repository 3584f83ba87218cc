"""The import finder and the calls of hooks, with fake upstream packages.

FAKES["hooks.py"] in activation_helpers.py defines the hooks good, bad and exits. The state of a hook is "armed" until
it is called, then "fired" or "failed: ERROR".
"""

from __future__ import annotations

from pathlib import Path

import pytest
from activation_helpers import AUTO, Run

IMPORT = f"import {AUTO} as m\nimport hooks\n"


def test_hook_is_called_once_after_the_module_is_executed(run: Run) -> None:
    code = (
        IMPORT
        + f"import importlib; importlib.import_module({AUTO!r})\nprint(hooks.calls, m.Auto.made_by_hook)"
    )
    result = run(code, "hooks:good")
    assert result.stdout == f"['{AUTO}'] True\n"
    assert result.stderr == ""


@pytest.mark.parametrize(("hook", "exists"), [("hooks:early", True), ("hooks:no_such", False)])
def test_early_hook_is_called_before_the_module_is_executed(
    run: Run, fakes: Path, hook: str, exists: bool
) -> None:
    """An early hook is called with the module still empty; one that does not exist leaves the module unchanged."""
    with (fakes / "hooks.py").open("a") as file:
        file.write("def early(module): calls.append((module.__name__, hasattr(module, 'Auto')))\n")
    set_hook = (
        "import _qwenvl_activate as a\n"
        f"a.EARLY_HOOKS[{AUTO!r}] = a._TABLE[{AUTO!r}] = {hook!r}; a.state[{AUTO!r}] = 'armed'\n"
    )
    code = f"{set_hook}{IMPORT}print(hooks.calls, m.LOADERS, m.Auto.make())"
    result = run(code, None, "-W", "always")
    calls = [(AUTO, False)] if exists else []
    assert result.stdout == f"{calls} {('SourceFileLoader',) * 2} upstream's\n"
    assert result.stderr.count("RuntimeWarning: ") == (0 if exists else 1)


def test_module_attributes_are_the_same_with_and_without_the_plugin(run: Run) -> None:
    """Loader, spec, file, source and data file are the same; LOADERS: the loaders that the module saw when it ran."""
    code = IMPORT + (
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


def test_spec_of_a_module_that_is_not_imported_is_complete(run: Run) -> None:
    result = run(
        f"import importlib.util, sys; s = importlib.util.find_spec({AUTO!r})\n"
        f"print(s.loader.get_source({AUTO!r})[:4].strip(), s.loader.is_package({AUTO!r}), s.has_location)\n"
        f"print(s.loader.get_filename() == s.origin, {AUTO!r} in sys.modules)",
        "hooks:good",
    )
    assert result.stdout == '""" False True\nTrue False\n'


def test_finder_ignores_other_modules(run: Run) -> None:
    result = run(
        "import sys, _qwenvl_activate as a; f = sys.meta_path[0]\n"
        "import paddlenlp.utils, paddlemix, json, email.message, hooks\n"
        "print(type(f).__module__, f.find_spec('json'), f.find_spec('paddlenlp'), f.find_spec('no.such'))\n"
        "print(hooks.calls, 'paddlemix_qwenvl_plugin' in sys.modules)\n"
        "try: import no_such_module\n"
        "except ModuleNotFoundError as e: print(e)"
    )
    assert result.stdout == ("_qwenvl_activate None None None\n[] False\nNo module named 'no_such_module'\n")


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        ("paddlemix.auto.modeling", "paddlemix.auto.modeling"),
        (
            "paddlenlp.experimental.transformers.fused_transformer_layers",  # has an early hook
            "paddlenlp.experimental.transformers.fused_transformer_layers",
        ),
        ("paddlemix.processors.qwen_vl_processing", "paddlemix.processors"),  # the package is missing, too
    ],
)
def test_hooked_module_that_is_not_installed_raises_the_usual_error(
    run: Run, fakes: Path, module: str, missing: str
) -> None:
    (fakes / "paddlemix/auto/modeling.py").unlink()
    package = fakes / "paddlenlp/experimental/transformers"
    package.mkdir()
    (package / "__init__.py").touch()
    result = run(
        f"try: import {module}\nexcept ModuleNotFoundError as e: print(e.name, e)\n"
        f"import _qwenvl_activate as a; print(a.state[{module!r}])"
    )
    assert result.stdout == f"{missing} No module named {missing!r}\narmed\n"
    assert result.stderr == ""


@pytest.mark.parametrize("position", [0, 1])
def test_hook_is_called_once_with_a_finder_that_calls_all_finders(run: Run, position: int) -> None:
    """The other finder is before or after the plugin's on sys.meta_path."""
    result = run(
        "import sys, importlib.util\n"
        "class CallingFinder:\n"
        "    busy = False\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if self.busy or not name.endswith('modeling'): return None\n"
        "        self.busy = True\n"
        "        try: return importlib.util.find_spec(name)\n"
        "        finally: self.busy = False\n"
        f"sys.meta_path.insert({position}, CallingFinder())\n" + IMPORT + "print(hooks.calls)",
        "hooks:good",
    )
    assert result.stdout == f"['{AUTO}']\n", result.stderr[-500:]


@pytest.mark.parametrize("hook", ["hooks:bad", "no_such_hooks:f", "hooks:no_such"])
def test_failing_hook_warns_once_and_leaves_the_module_unchanged(run: Run, hook: str) -> None:
    """A reload does not warn again, and other hooks, such as that of paddlenlp_ops, stay armed."""
    code = IMPORT + (
        "print(m.LOADERS, hasattr(m, 'added'), m.Auto.make(), isinstance(vars(m.Auto)['make'], classmethod))\n"
        "import importlib; importlib.reload(m)\n"
        "from paddlemix_qwenvl_plugin.upstream import hook_states\n"
        f"print(hook_states()[{AUTO!r}][:6], hook_states()['paddlenlp_ops'])"
    )
    result = run(code, hook, "-W", "always")
    assert result.returncode == 0
    loaders = ("SourceFileLoader",) * 2
    assert result.stdout == f"{loaders} False upstream's True\nfailed armed\n"
    (warning,) = [line for line in result.stderr.splitlines() if "Warning" in line]
    assert f"paddlemix_qwenvl_plugin: {AUTO} is left unchanged, its hook failed (" in warning
    if hook == "hooks:bad":
        assert "(ValueError: not the version that this hook knows)" in warning


def test_warnings_as_errors_do_not_break_the_import(run: Run) -> None:
    result = run(IMPORT + "print(m.Auto.make())", "hooks:bad", "-W", "error")
    assert result.stdout == "upstream's\n"
    assert result.stderr.count("is left unchanged") == 1


def test_error_of_the_module_propagates_and_the_next_import_calls_the_hook(run: Run) -> None:
    result = run(
        f"import sys, hooks; path = __import__('paddlenlp.transformers.auto').transformers.auto.__path__[0]\n"
        "text = open(path + '/modeling.py').read()\n"
        "open(path + '/modeling.py', 'w').write('raise ImportError(\"upstream is broken\")')\n"
        f"try: import {AUTO}\n"
        "except ImportError as e: print(e, hooks.calls)\n"
        "open(path + '/modeling.py', 'w').write(text); import importlib; importlib.invalidate_caches()\n"
        f"import {AUTO}; print(hooks.calls)",
        "hooks:good",
    )
    assert result.stdout == f"upstream is broken []\n['{AUTO}']\n"


def test_keyboard_interrupt_in_a_hook_propagates(run: Run) -> None:
    result = run(IMPORT, "hooks:exits")
    assert result.returncode != 0
    assert "KeyboardInterrupt" in result.stderr


def test_debug_output_and_state_of_the_hooks(run: Run) -> None:
    code = IMPORT + (
        "from paddlemix_qwenvl_plugin.upstream import hook_states\nprint(*sorted(hook_states().items()), sep='\\n')"
    )
    result = run(code, "hooks:good", QWENVL_PLUGIN_DEBUG="1")
    first, second = result.stderr.splitlines()
    assert first.startswith("qwenvl: armed for ")
    assert second == f"qwenvl: hook {AUTO} fired"
    assert f"('{AUTO}', 'fired')" in result.stdout
    assert result.stdout.count("'armed'") == result.stdout.count("\n") - 1 > 0  # all others


@pytest.mark.parametrize(("value", "logs"), [("", False), ("0", False), ("yes", True)])
def test_one_rule_for_all_debug_output(run: Run, value: str, logs: bool) -> None:
    """Empty and 0 are off, other values on. The activation has its own copy: it must not import the plugin at start."""
    printed = run(IMPORT, "hooks:bad", QWENVL_PLUGIN_DEBUG=value).stderr
    for line in (
        "qwenvl: armed for ",
        f"qwenvl: hook {AUTO} set make of Auto",
        f"qwenvl: hook {AUTO} failed",
    ):
        assert (line in printed) is logs


def test_debug_output_names_the_attributes_that_a_hook_sets(run: Run) -> None:
    result = run(IMPORT, "hooks:bad", QWENVL_PLUGIN_DEBUG="1")
    assert f"qwenvl: hook {AUTO} set make of Auto\n" in result.stderr
    assert f"qwenvl: hook {AUTO} failed: ValueError: not the version that this hook knows\n" in result.stderr
