"""Name of the command in messages: "qwenvl" if PATH finds it by that name, or with `python -m`, else its path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = f"#!{sys.executable}\nfrom paddlemix_qwenvl_plugin.cli.main import main\nmain()\n"


@pytest.mark.parametrize(
    # The start of the command line, the folder on PATH, and the command's name in messages.
    ("command", "path_folder", "name"),
    [
        (["env/bin/qwenvl"], "", "env/bin/qwenvl"),
        (["./env/bin/qwenvl"], "elsewhere", "./env/bin/qwenvl"),
        (["env/bin/qwenvl"], "env/bin", "qwenvl"),
        (["qwenvl"], "env/bin", "qwenvl"),
        (["my env/qwenvl"], "", "'my env/qwenvl'"),
        ([sys.executable, "-m", "paddlemix_qwenvl_plugin.cli"], "", "qwenvl"),
    ],
)
def test_name_of_the_command(command: list[str], path_folder: str, name: str, tmp_path: Path) -> None:
    for folder in ("env/bin", "my env", "elsewhere"):
        script = tmp_path / folder / "qwenvl"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(SCRIPT)
        script.chmod(0o755)
    path = ["/usr/bin", "/bin"]
    if path_folder:
        path.insert(0, str(tmp_path / path_folder))
    completed = subprocess.run(
        ["/bin/sh", "-c", '"$@"', "sh", *command, "recipes", "explain"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO), "PATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.stderr == f"qwenvl: No such command 'explain'; see {name} recipes --help\n"
