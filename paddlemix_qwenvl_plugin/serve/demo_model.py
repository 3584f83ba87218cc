"""Exported demo model in the user's cache folder, for `qwenvl serve --demo` and the scripts in examples/.

`demo_stages` runs this module in a child process, to keep Paddle, which the export imports, out of its caller:
`python -m paddlemix_qwenvl_plugin.serve.demo_model FOLDER`. That process also starts another one, which compiles the
engine during the export: on a new machine, export and compilation take most of the startup time.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from paddlemix_qwenvl_plugin.artifact.contract import CONTRACT_VERSION
from paddlemix_qwenvl_plugin.demo import MODEL
from paddlemix_qwenvl_plugin.engine.build import cache_folder, library
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, line_of, make_folder
from paddlemix_qwenvl_plugin.util.files import new_folder
from paddlemix_qwenvl_plugin.version import __version__

_KEY_CHARACTERS = 16


class DemoStages(NamedTuple):
    """Prefixes of the demo model's two exported stages."""

    vision: Path
    language: Path


def demo_stages(say: Callable[[str], None]) -> DemoStages:
    """Return the demo model's exported stages; export them unless they are in the cache folder.

    Args:
        say: called with a progress line before the export.

    Raises:
        UsageError, QwenVLError: the cache folder cannot be created; or the export failed, whose stderr has the reason.
    """
    folder = cache_folder().with_name("demo-model") / _key()
    stages = DemoStages(folder / "vision" / "vision", folder / "text" / "qwen")
    make_folder(folder.parent)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            say("Exporting the demo model, once.")
            command = [sys.executable, "-m", __name__, str(folder)]
            # stdout=2 is stderr: the output of the export must not mix with the server's stdout.
            if subprocess.run(command, stdout=2, check=False).returncode:
                raise QwenVLError("the demo model cannot be exported; see the lines above")
    return stages


def _key() -> str:
    """Hash of the model's files and of the versions that determine its export."""
    digest = hashlib.sha256(f"{__version__} {CONTRACT_VERSION}".encode())
    for path in sorted(MODEL.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:_KEY_CHARACTERS]


def _export(target: Path) -> None:
    from paddlemix_qwenvl_plugin.export.export import export_language, export_vision

    with new_folder(target) as folder:
        # "portable": without the engine programs (`.fused.*`), through which Paddle would call the engine. QwenVL needs
        # none: it opens the weights in the engine itself, or falls back to the portable programs.
        export_vision(MODEL, folder / "vision" / "vision", engine="portable")
        export_language(MODEL, folder / "text", "qwen", engine="portable")


def _compile_engine() -> None:
    # Errors are ignored: the engine process gets them again from `library`, and reports them. Ctrl-C reaches the
    # exporting process too.
    with contextlib.suppress(QwenVLError, OSError, KeyboardInterrupt):
        library()


if __name__ == "__main__":
    compiler = multiprocessing.get_context("spawn").Process(target=_compile_engine)
    compiler.start()
    try:
        _export(Path(sys.argv[1]))
    except (QwenVLError, OSError) as error:
        sys.exit(f"qwenvl: {line_of(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        compiler.join()
