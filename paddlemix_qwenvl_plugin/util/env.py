"""Environment variables of this package, without the settings of `qwenvl serve`; see docs/environment.md.

`activation/_qwenvl_activate.py` reads QWENVL_PLUGIN and QWENVL_PLUGIN_DEBUG without this module: it runs at the start
of every Python process, where it must not import this package. C++ code also reads QWENVL_CUDA_KERNELS
(csrc/cuda/gpu.cc) and QWENVL_DEVICE (csrc/paddle/session.cc).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from paddlemix_qwenvl_plugin.util.errors import UsageError


@dataclass(frozen=True)
class Switch:
    """A boolean variable: `0` is off, any other value is on. Unset or empty: `default`."""

    name: str
    default: bool

    def read(self) -> bool:
        """Whether the variable is on."""
        text = os.environ.get(self.name, "")
        return text != "0" if text else self.default


@dataclass(frozen=True)
class Choice:
    """A variable with a fixed set of values, `words`. Unset or empty: the first one."""

    name: str
    words: tuple[str, ...]

    def read(self) -> str:
        """Read the variable; raise UsageError, which names it, for a value that is not in `words`."""
        return self.check(os.environ.get(self.name) or self.words[0], self.name)

    def check(self, word: str, flag: str) -> str:
        """Return `word` if it is an allowed value; otherwise raise UsageError, which names `flag`."""
        if word not in self.words:
            raise UsageError(f"{flag} {word}: must be one of {', '.join(self.words)}")
        return word


@dataclass(frozen=True)
class Folder:
    """A variable that names a folder. Unset or empty: None."""

    name: str

    def read(self) -> Optional[Path]:
        """Read the folder; None if the variable is unset or empty."""
        text = os.environ.get(self.name)
        return Path(text) if text else None


@dataclass(frozen=True)
class Text:
    """A variable with any text, which the code that reads it validates. Unset or empty: None."""

    name: str

    def read(self) -> Optional[str]:
        """Read the text; None if the variable is unset or empty."""
        return os.environ.get(self.name) or None


ENGINE = Choice("QWENVL_ENGINE", ("auto", "fused", "portable"))
DEVICE = Text("QWENVL_DEVICE")
CUDA_KERNELS = Folder("QWENVL_CUDA_KERNELS")
CACHE_DIR = Folder("QWENVL_CACHE_DIR")
NO_BUILD = Switch("QWENVL_NO_BUILD", default=False)
PLUGIN = Switch("QWENVL_PLUGIN", default=True)
PLUGIN_DEBUG = Switch("QWENVL_PLUGIN_DEBUG", default=False)
DEBUG = Switch("QWENVL_DEBUG", default=False)
API_KEY = Text("QWENVL_API_KEY")
REAL_TIME_SAVE_DIR = Folder("QWENVL_REAL_TIME_SAVE_DIR")
SERVE_CONFIG = Text("QWENVL_SERVE_CONFIG")
