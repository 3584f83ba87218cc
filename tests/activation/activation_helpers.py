"""Fake upstream packages, and the environment variables of the processes that the tests start."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def clean_environment(**variables: str) -> dict[str, str]:
    """Return this process's environment variables without those of Python and of the plugin, and with `variables`.

    A Python process with this environment writes no bytecode files.
    """
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "QWENVL_"))
    }
    return {**inherited, "PYTHONDONTWRITEBYTECODE": "1", **variables}


# Files of the fake packages: path -> text.
FAKES = {
    "paddlenlp/__init__.py": "",
    "paddlenlp/transformers/__init__.py": "",
    "paddlenlp/transformers/auto/__init__.py": "",
    # LOADERS: the loaders that the module sees when it runs.
    "paddlenlp/transformers/auto/modeling.py": '''
"""Auto classes."""
import sys
LOADERS = (type(__loader__).__name__, type(__spec__.loader).__name__)
class Auto:
    @classmethod
    def make(cls):
        return "upstream's"
''',
    "paddlenlp/transformers/auto/data.txt": "some data",
    "paddlenlp/utils/__init__.py": "",
    "paddlenlp/experimental/__init__.py": "",
    # Runs a test's code as code of paddlenlp.experimental, whose modules get the stand-in for paddlenlp_ops.
    "paddlenlp/experimental/models.py": "def run(code): exec(code, globals())\n",
    "paddlemix/__init__.py": "",
    "paddlemix/auto/__init__.py": "",
    "paddlemix/auto/modeling.py": "NAME = 'upstream'\n",
    # Hooks for tests of the finder, in place of the plugin's.
    "hooks.py": """
import sys
calls = []
def good(module):
    calls.append(module.__name__)
    module.Auto.made_by_hook = True
def bad(module):
    from paddlemix_qwenvl_plugin.upstream.patching import patching
    calls.append(module.__name__)
    with patching(module) as patch:
        patch.set(module, "LOADERS", "changed")
        patch.set(module, "added", 1)
        patch.set(module.Auto, "make", classmethod(lambda cls: "the hook's"))
        assert module.Auto.make() == "the hook's"
        raise ValueError("not the version\\nthat this hook knows")
def exits(module):
    raise KeyboardInterrupt
""",
}
# Module of a fake package on which the tests set their hooks.
AUTO = "paddlenlp.transformers.auto.modeling"
