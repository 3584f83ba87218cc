"""Messages for a missing, old or broken Paddle; a working Paddle prints nothing on stderr."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paddlemix_qwenvl_plugin import QwenVLError
from paddlemix_qwenvl_plugin.util import paddle_version

REPO = Path(__file__).resolve().parents[2]
STREET = str(REPO / "recipes" / "images" / "street.png")


def test_missing(monkeypatch):
    monkeypatch.setattr(paddle_version.util, "find_spec", lambda name: None)
    with pytest.raises(QwenVLError, match="Paddle is not installed; run: pip install"):
        paddle_version.require_paddle()


def test_too_old(monkeypatch):
    monkeypatch.setattr(paddle_version.metadata, "version", lambda name: "2.6.2")
    with pytest.raises(QwenVLError, match=r"paddlepaddle 2\.6\.2 is too old; install 3\.0 or newer"):
        paddle_version.require_paddle()


def test_broken(tmp_path):
    """If the import of Paddle prints text and fails, a command prints one line, which refers to `qwenvl doctor`."""
    (tmp_path / "paddle").mkdir()
    source = "import sys\nprint('Mac: DYLD_LIBRARY_PATH', file=sys.stderr)\nimport libcublas\n"
    (tmp_path / "paddle" / "__init__.py").write_text(source)
    for command in (
        ["export-vision", "--model_name_or_path", ".", "--save_path", "v"],
        ["demo", str(tmp_path)],
    ):
        completed = python_with(tmp_path, "-m", "paddlemix_qwenvl_plugin.cli", *command)
        message = (
            "Paddle cannot be imported (ModuleNotFoundError: No module named 'libcublas'); see qwenvl doctor"
        )
        assert (completed.returncode, completed.stderr) == (1, f"qwenvl: {message}\n")


def test_paddle_prints_nothing_on_stderr(tiny_exported, tmp_path):
    """In a program that exports and opens a model with the Python interface."""
    program = f"""
from paddlemix_qwenvl_plugin import QwenVL, export_vision
export_vision({str(tiny_exported / "model")!r}, {str(tmp_path / "v")!r}, engine="portable")
vl = QwenVL.from_exported({str(tiny_exported / "vision" / "vision")!r}, {str(tiny_exported / "text" / "qwen")!r})
print(len(vl.generate([{{"image": {STREET!r}}}], max_new_tokens=2).token_ids))
"""
    completed = python_with(tmp_path, "-c", program)
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "2\n", "")


def python_with(folder, *arguments):
    """Run Python on portable graphs, with `folder` as the first folder on PYTHONPATH."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{REPO}", "QWENVL_ENGINE": "portable"}
    environment.pop("GLOG_minloglevel", None)  # the level of Paddle's log, which the plugin must set
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_new_enough():
    paddle_version.require_paddle()
