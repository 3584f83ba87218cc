"""The environment variables that this package reads, in one table; docs/environment.md says what they mean.

`activation/_qwenvl_activate.py` reads QWENVL_PLUGIN and QWENVL_PLUGIN_DEBUG by itself: it runs at the start of every
Python and imports nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from paddlemix_qwenvl_plugin.util.errors import UsageError


@dataclass(frozen=True)
class Switch:
    """A variable that is `0` for off and `1`, or anything else, for on. Unset or empty: `default`."""

    name: str
    default: bool

    def read(self) -> bool:
        text = os.environ.get(self.name, "")
        return text != "0" if text else self.default


@dataclass(frozen=True)
class Choice:
    """A variable that is one of a few words. Unset or empty: the first of them."""

    name: str
    words: tuple[str, ...]

    def read(self) -> str:
        """UsageError, which names the variable, for another word."""
        return self.check(os.environ.get(self.name) or self.words[0], self.name)

    def check(self, word: str, flag: str) -> str:
        """`word`, which `flag` gave, if it is one of them; UsageError else."""
        if word not in self.words:
            raise UsageError(f"{flag} {word}: must be one of {', '.join(self.words)}")
        return word


@dataclass(frozen=True)
class Folder:
    """A variable that names a folder. Unset or empty: None."""

    name: str

    def read(self) -> Optional[Path]:
        text = os.environ.get(self.name)
        return Path(text) if text else None


@dataclass(frozen=True)
class Text:
    """A variable with a word of any kind; who reads it checks it. Unset or empty: None."""

    name: str

    def read(self) -> Optional[str]:
        return os.environ.get(self.name) or None


ENGINE = Choice("QWENVL_ENGINE", ("auto", "fused", "portable"))
DEVICE = Text("QWENVL_DEVICE")
CUDA_KERNELS = Folder("QWENVL_CUDA_KERNELS")
CACHE_DIR = Folder("QWENVL_CACHE_DIR")
NO_BUILD = Switch("QWENVL_NO_BUILD", False)
PLUGIN = Switch("QWENVL_PLUGIN", True)
PLUGIN_DEBUG = Switch("QWENVL_PLUGIN_DEBUG", False)
DEBUG = Switch("QWENVL_DEBUG", False)
API_KEY = Text("QWENVL_API_KEY")
REAL_TIME_SAVE_DIR = Folder("QWENVL_REAL_TIME_SAVE_DIR")
SERVE_CONFIG = Text("QWENVL_SERVE_CONFIG")
