"""The exported demo model in the user's cache folder, for `qwenvl serve --demo`.

`python -m paddlemix_qwenvl_plugin.serve.demo_model FOLDER` exports it: in a process of its own, which has Paddle.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from paddlemix_qwenvl_plugin.artifact.contract import CONTRACT_VERSION
from paddlemix_qwenvl_plugin.demo import MODEL
from paddlemix_qwenvl_plugin.engine.build import cache_folder
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, line_of, make_folder
from paddlemix_qwenvl_plugin.util.files import new_folder
from paddlemix_qwenvl_plugin.version import __version__

_KEY_CHARACTERS = 16


class DemoStages(NamedTuple):
    """Prefixes of the demo model's exported stages."""

    vision: Path
    language: Path


def demo_stages(say: Callable[[str], None]) -> DemoStages:
    """The demo model's stages, exported now unless an earlier call has.

    Args:
        say: called with a line before the export.

    Raises:
        QwenVLError: it cannot be exported; the export has said why on stderr.
    """
    folder = cache_folder().with_name("demo-model") / _key()
    stages = DemoStages(folder / "vision" / "vision", folder / "text" / "qwen")
    make_folder(folder.parent)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            say("Exporting the demo model, once.")
            command = [sys.executable, "-m", __name__, str(folder)]
            # Its stdout is for what native code prints.
            if subprocess.run(command, stdout=2, check=False).returncode:
                raise QwenVLError("the demo model cannot be exported; see the lines above")
    return stages


def _key() -> str:
    """A name for the export of this model by this version."""
    digest = hashlib.sha256(f"{__version__} {CONTRACT_VERSION}".encode())
    for path in sorted(MODEL.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:_KEY_CHARACTERS]


def _export(target: Path) -> None:
    from paddlemix_qwenvl_plugin.export.export import export_language, export_vision

    with new_folder(target) as folder:
        # The engine needs the weights of an export only, not Paddle programs that call it.
        export_vision(MODEL, folder / "vision" / "vision", engine="portable")
        export_language(MODEL, folder / "text", "qwen", engine="portable")


if __name__ == "__main__":
    try:
        _export(Path(sys.argv[1]))
    except (QwenVLError, OSError) as error:
        sys.exit(f"qwenvl: {line_of(error)}")
