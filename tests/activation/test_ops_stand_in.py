"""Stand-in for paddlenlp_ops in environments without it."""

from __future__ import annotations

from pathlib import Path

from activation_helpers import Run


def in_model(code: str) -> str:
    """Code that runs `code` in the fake module paddlenlp.experimental.models, which gets the stand-in."""
    return f"import paddlenlp.experimental.models as m\nm.run({code!r})\n"


def test_only_paddlenlp_models_get_the_stand_in(run: Run) -> None:
    """All other code finds no operators, as without the plugin, and can use its fallback."""
    check = (
        "import importlib.util\n"
        "print(importlib.util.find_spec('paddlenlp_ops'))\n"
        "try: import paddlenlp_ops\n"
        "except ModuleNotFoundError as e: print(e)\n"
    )
    result = run(f"{check}import paddlenlp\n{check}" + in_model("import paddlenlp_ops; print('imported')"))
    assert result.stdout == "None\nNo module named 'paddlenlp_ops'\n" * 2 + "imported\n"


def test_stand_in_is_found_through_a_finder_that_calls_all_finders(run: Run) -> None:
    result = run(
        "import sys, importlib.util\n"
        "class CallingFinder:\n"
        "    busy = False\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if self.busy: return None\n"
        "        self.busy = True\n"
        "        try: return importlib.util.find_spec(name)\n"
        "        finally: self.busy = False\n"
        "sys.meta_path.insert(0, CallingFinder())\n" + in_model("import paddlenlp_ops; print('imported')")
    )
    assert result.stdout == "imported\n", result.stderr[-500:]


def test_no_stand_in_if_the_plugin_is_switched_off(run: Run) -> None:
    result = run(in_model("import paddlenlp_ops"), QWENVL_PLUGIN="0")
    assert "No module named 'paddlenlp_ops'" in result.stderr


def test_every_operator_exists_and_raises_an_error_that_names_the_missing_library(run: Run) -> None:
    code = (
        "from paddlenlp_ops import rebuild_padding_v2, any_name\n"
        "from paddlemix_qwenvl_plugin import QwenVLError\n"
        "try: rebuild_padding_v2(1, seq_len=2)\n"
        "except QwenVLError as e: print(isinstance(e, RuntimeError), e)\n"
        "import paddlenlp_ops; print(paddlenlp_ops.rebuild_padding_v2 is rebuild_padding_v2)\n"
        "paddlenlp_ops.any_name = lambda: 'replaced'\n"
        "from paddlenlp_ops import any_name; print(any_name())\n"
    )
    result = run(in_model(code))
    assert result.returncode == 0, result.stderr
    error, is_same_object, replaced = result.stdout.splitlines()
    assert error.startswith("True paddlenlp_ops.rebuild_padding_v2 is missing")
    assert "python setup_cuda.py install" in error
    assert (is_same_object, replaced) == ("True", "replaced")
    assert result.stderr == ""


def test_operators_load_as_attributes_and_not_as_submodules(run: Run) -> None:
    """For a dotted name, PaddleNLP imports the parent module and then gets the last part as an attribute."""
    code = (
        "import importlib, inspect\n"
        "module = importlib.import_module('paddlenlp_ops')\n"
        "print(callable(getattr(module, 'encode_rotary_qk', None)), hasattr(module, '__path__'))\n"
        "print(inspect.unwrap(module.write_cache_kv).__name__, module.__spec__.has_location)\n"
        "try: import paddlenlp_ops.encode_rotary_qk\n"
        "except ModuleNotFoundError as e: print(e)"
    )
    assert run(in_model(code)).stdout == (
        "True False\nwrite_cache_kv False\n"
        "No module named 'paddlenlp_ops.encode_rotary_qk'; 'paddlenlp_ops' is not a package\n"
    )


def test_installed_operators_are_used_instead_of_the_stand_in(run: Run, fakes: Path) -> None:
    (fakes / "paddlenlp_ops.py").write_text("def rebuild_padding_v2(): return 'real'\n")
    code = (
        "from paddlenlp_ops import rebuild_padding_v2; print(rebuild_padding_v2())\n"
        "try: from paddlenlp_ops import other\n"
        "except ImportError: print('no other')\n"
        "import paddlenlp_ops, sys; print(type(paddlenlp_ops.__loader__).__name__)\n"
        "from paddlemix_qwenvl_plugin.upstream import hook_states; print(hook_states()['paddlenlp_ops'])"
    )
    result = run(in_model(code))
    assert result.stdout == "real\nno other\nSourceFileLoader\narmed\n"


def test_import_fails_if_the_stand_in_cannot_be_filled(run: Run) -> None:
    code = (
        "import sys, _qwenvl_activate as a\n"
        "a._TABLE['paddlenlp_ops'] = 'no_such:f'\n"
        "try: import paddlenlp_ops\n"
        "except ModuleNotFoundError as e: print(e, 'paddlenlp_ops' in sys.modules)"
    )
    result = run(in_model(code))
    assert result.stdout == "No module named 'paddlenlp_ops' False\n"
    warning = (
        "paddlenlp_ops is missing and gets no stand-in, "
        "its hook failed (ModuleNotFoundError: No module named 'no_such')"
    )
    assert result.stderr.count(warning) == 1
