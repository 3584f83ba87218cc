"""The environment variables that this package reads, in one table; docs/environment.md shows it.

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
    meaning: str
    values = "`0` or `1`"

    def read(self) -> bool:
        text = os.environ.get(self.name, "")
        return text != "0" if text else self.default

    @property
    def shown_default(self) -> str:
        return f"`{int(self.default)}`"


@dataclass(frozen=True)
class Choice:
    """A variable that is one of a few words. Unset or empty: the first of them."""

    name: str
    words: tuple[str, ...]
    meaning: str

    def read(self) -> str:
        """UsageError, which names the variable, for another word."""
        return self.check(os.environ.get(self.name) or self.words[0], self.name)

    def check(self, word: str, flag: str) -> str:
        """`word`, which `flag` gave, if it is one of them; UsageError else."""
        if word not in self.words:
            raise UsageError(f"{flag} {word}: must be one of {', '.join(self.words)}")
        return word

    @property
    def values(self) -> str:
        return ", ".join(f"`{word}`" for word in self.words)

    @property
    def shown_default(self) -> str:
        return f"`{self.words[0]}`"


@dataclass(frozen=True)
class Folder:
    """A variable that names a folder. Unset or empty: None, which means what `shown_default` says."""

    name: str
    shown_default: str
    meaning: str
    values = "a folder"

    def read(self) -> Optional[Path]:
        text = os.environ.get(self.name)
        return Path(text) if text else None


@dataclass(frozen=True)
class Text:
    """A variable with a word of any kind; who reads it checks it. Unset or empty: None."""

    name: str
    values: str
    shown_default: str
    meaning: str

    def read(self) -> Optional[str]:
        return os.environ.get(self.name) or None


ENGINE = Choice(
    "QWENVL_ENGINE",
    ("auto", "fused", "portable"),
    "whether exports have programs of the engine and predictors take them: where it can be built, always (or an "
    "error), or never; a flag `--engine` goes before it",
)
DEVICE = Text(
    "QWENVL_DEVICE",
    "`cpu`, `gpu` or `gpu:N`",
    "`cpu`",
    "where the engine's operators for Paddle compute, in programs that do not say it; of the stock scripts: instead of "
    "their `--device`",
)
CUDA_KERNELS = Folder(
    "QWENVL_CUDA_KERNELS",
    "built on first use",
    "a folder of GPU kernels (`*.cubin`) that are taken as they are",
)
CACHE_DIR = Folder("QWENVL_CACHE_DIR", "the user's cache folder", "where the built engine is kept")
NO_BUILD = Switch(
    "QWENVL_NO_BUILD", False, "`1`: never compile the engine on first use; `qwenvl build-engine` still does"
)
PLUGIN = Switch("QWENVL_PLUGIN", True, "`0`: no hooks into PaddleNLP and PaddleMIX")
PLUGIN_DEBUG = Switch("QWENVL_PLUGIN_DEBUG", False, "`1`: tell on stderr what the hooks do")
DEBUG = Switch("QWENVL_DEBUG", False, "`1`: show the traceback of an error, as `qwenvl --debug` does")
REAL_TIME_SAVE_DIR = Folder(
    "QWENVL_REAL_TIME_SAVE_DIR",
    "a folder of the process's own",
    "where the stock predictor's `real_time_save.*` files are written and read",
)

VARIABLES = (
    ENGINE,
    DEVICE,
    CUDA_KERNELS,
    CACHE_DIR,
    NO_BUILD,
    PLUGIN,
    PLUGIN_DEBUG,
    DEBUG,
    REAL_TIME_SAVE_DIR,
)
