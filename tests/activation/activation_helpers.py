"""Fake upstream packages, and the environment of the tests' interpreters."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def clean_environment(**more: str) -> dict[str, str]:
    """Environment without variables of Python or the plugin."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("PYTHON", "QWENVL_"))}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **more}


# Path -> text.
FAKES = {
    "paddlenlp/__init__.py": "",
    "paddlenlp/transformers/__init__.py": "",
    "paddlenlp/transformers/auto/__init__.py": "",
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
    "paddlenlp/experimental/models.py": "def run(code): exec(code, globals())\n",
    "paddlemix/__init__.py": "",
    "paddlemix/auto/__init__.py": "",
    "paddlemix/auto/modeling.py": "NAME = 'upstream'\n",
    # Replace the plugin's hooks, so that a test sees only the machinery, not the real hooks.
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
AUTO = "paddlenlp.transformers.auto.modeling"
