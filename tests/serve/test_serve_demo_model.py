"""The demo model that `qwenvl serve --demo` exports into the cache folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

REPO = Path(__file__).resolve().parents[2]
ASK = """
import sys
from paddlemix_qwenvl_plugin.serve.demo_model import demo_stages
said = []
stages = demo_stages(said.append)
assert "paddle" not in sys.modules  # the front must not import Paddle
print(stages.vision, stages.language, *said, sep="|")
"""


def test_two_servers_at_once_export_it_once_and_a_third_finds_it(tmp_path: Path) -> None:
    """The engine is compiled during the export; a failed build is reported later, by the engine process."""
    compiler = tmp_path / "failing-c++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/compiled\nexit 1\n')
    compiler.chmod(0o755)
    environment = {
        **os.environ,
        "QWENVL_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(REPO),
        "CXX": str(compiler),
    }
    command = [sys.executable, "-c", ASK]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0].strip().split("|") for process in both]
    assert [process.returncode for process in both] == [0, 0]
    third = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert third.stdout.strip().split("|") == said[0][:2] == said[1][:2]
    assert sorted(len(lines) for lines in said) == [2, 3]
    (folder,) = (path for path in (tmp_path / "demo-model").iterdir() if path.is_dir())
    vision, language = map(Path, said[0][:2])
    assert folder in vision.parents
    assert folder in language.parents
    assert QwenVL.from_exported(vision, language).config.hidden_size > 0
    assert "kernels.cc" in (tmp_path / "compiled").read_text()
