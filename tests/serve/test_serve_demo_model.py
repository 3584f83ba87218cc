"""The demo model that `qwenvl serve --demo` exports into the cache folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

REPO = Path(__file__).resolve().parents[2]
# Prints the paths of both stages, and the lines that demo_stages reported.
EXPORT_SCRIPT = """
import sys
from paddlemix_qwenvl_plugin.serve.demo_model import demo_stages
lines = []
stages = demo_stages(lines.append)
assert "paddle" not in sys.modules  # the front must not import Paddle
print(stages.vision, stages.language, *lines, sep="|")
"""


def test_demo_model_is_exported_once_for_several_servers(tmp_path: Path) -> None:
    """Two processes start at the same time, as two servers may: one exports, the other waits.

    A third one finds the exported model. The engine is compiled during the export. Here the compilation fails, which
    does not stop the export: the engine process of a server would report it.
    """
    compiler = tmp_path / "failing-c++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/compiled\nexit 1\n')
    compiler.chmod(0o755)
    environment = {
        **os.environ,
        "QWENVL_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(REPO),
        "CXX": str(compiler),
    }
    command = [sys.executable, "-c", EXPORT_SCRIPT]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0].strip().split("|") for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    third = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert third.stdout.strip().split("|") == outputs[0][:2] == outputs[1][:2]
    assert sorted(map(len, outputs)) == [2, 3]  # one of the two reported the export
    (folder,) = (path for path in (tmp_path / "demo-model").iterdir() if path.is_dir())
    vision, language = map(Path, outputs[0][:2])
    assert folder in vision.parents
    assert folder in language.parents
    assert QwenVL.from_exported(vision, language).config.hidden_size > 0
    assert "kernels.cc" in (tmp_path / "compiled").read_text()  # the compilation was tried
