"""Stand-in for paddlenlp_ops if it is not installed."""

from __future__ import annotations

from pathlib import Path

from activation_helpers import Run


def inside(code: str) -> str:
    """Code that runs `code` as a PaddleNLP model, which imports operators unconditionally."""
    return f"import paddlenlp.experimental.models as m\nm.run({code!r})\n"


def test_there_for_those_that_need_it_only(run: Run) -> None:
    """Other code checks for the operators and falls back as without the plugin."""
    look = (
        "import importlib.util\n"
        "print(importlib.util.find_spec('paddlenlp_ops'))\n"
        "try: import paddlenlp_ops\n"
        "except ModuleNotFoundError as e: print(e)\n"
    )
    done = run(f"{look}import paddlenlp\n{look}" + inside("import paddlenlp_ops; print('now')"))
    assert done.stdout == "None\nNo module named 'paddlenlp_ops'\n" * 2 + "now\n"


def test_there_by_way_of_another_finder(run: Run) -> None:
    done = run(
        "import sys, importlib.util\n"
        "class Asking:\n"
        "    busy = False\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if self.busy: return None\n"
        "        self.busy = True\n"
        "        try: return importlib.util.find_spec(name)\n"
        "        finally: self.busy = False\n"
        "sys.meta_path.insert(0, Asking())\n" + inside("import paddlenlp_ops; print('now')")
    )
    assert done.stdout == "now\n", done.stderr[-500:]


def test_not_there_when_switched_off(run: Run) -> None:
    done = run(inside("import paddlenlp_ops"), QWENVL_PLUGIN="0")
    assert "No module named 'paddlenlp_ops'" in done.stderr


def test_any_operator_exists_and_names_the_missing_library(run: Run) -> None:
    code = (
        "from paddlenlp_ops import rebuild_padding_v2, whatever\n"
        "from paddlemix_qwenvl_plugin import QwenVLError\n"
        "try: rebuild_padding_v2(1, seq_len=2)\n"
        "except QwenVLError as e: print(isinstance(e, RuntimeError), e)\n"
        "import paddlenlp_ops; print(paddlenlp_ops.rebuild_padding_v2 is rebuild_padding_v2)\n"
        "paddlenlp_ops.whatever = lambda: 'supplied'\n"
        "from paddlenlp_ops import whatever; print(whatever())\n"
    )
    done = run(inside(code))
    assert done.returncode == 0, done.stderr
    error, same, supplied = done.stdout.splitlines()
    assert error.startswith("True paddlenlp_ops.rebuild_padding_v2 is missing")
    assert "python setup_cuda.py install" in error
    assert (same, supplied) == ("True", "supplied")
    assert done.stderr == ""


def test_upstreams_way_to_load_operators(run: Run) -> None:
    """PaddleNLP imports the parent of a dotted name and gets the last part as an attribute."""
    code = (
        "import importlib, inspect\n"
        "module = importlib.import_module('paddlenlp_ops')\n"
        "print(callable(getattr(module, 'encode_rotary_qk', None)), hasattr(module, '__path__'))\n"
        "print(inspect.unwrap(module.write_cache_kv).__name__, module.__spec__.has_location)\n"
        "try: import paddlenlp_ops.encode_rotary_qk\n"
        "except ModuleNotFoundError as e: print(e)"
    )
    assert run(inside(code)).stdout == (
        "True False\nwrite_cache_kv False\n"
        "No module named 'paddlenlp_ops.encode_rotary_qk'; 'paddlenlp_ops' is not a package\n"
    )


def test_real_operators_win(run: Run, fakes: Path) -> None:
    (fakes / "paddlenlp_ops.py").write_text("def rebuild_padding_v2(): return 'real'\n")
    code = (
        "from paddlenlp_ops import rebuild_padding_v2; print(rebuild_padding_v2())\n"
        "try: from paddlenlp_ops import other\n"
        "except ImportError: print('no other')\n"
        "import paddlenlp_ops, sys; print(type(paddlenlp_ops.__loader__).__name__)\n"
        "from paddlemix_qwenvl_plugin.upstream import hook_states; print(hook_states()['paddlenlp_ops'])"
    )
    done = run(inside(code))
    assert done.stdout == "real\nno other\nSourceFileLoader\narmed\n"


def test_stand_in_that_cannot_be_made(run: Run) -> None:
    code = (
        "import sys, _qwenvl_activate as a\n"
        "a._TABLE['paddlenlp_ops'] = 'no_such:f'\n"
        "try: import paddlenlp_ops\n"
        "except ModuleNotFoundError as e: print(e, 'paddlenlp_ops' in sys.modules)"
    )
    done = run(inside(code))
    assert done.stdout == "No module named 'paddlenlp_ops' False\n"
    assert done.stderr.count("its hook failed (ModuleNotFoundError: No module named 'no_such')") == 1
