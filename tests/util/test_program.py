"""Messages name the command as it was started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = f"#!{sys.executable}\nfrom paddlemix_qwenvl_plugin.cli.main import main\nmain()\n"


@pytest.mark.parametrize(
    ("typed", "on_path", "named"),
    [
        (["env/bin/qwenvl"], "", "env/bin/qwenvl"),
        (["./env/bin/qwenvl"], "elsewhere", "./env/bin/qwenvl"),
        (["env/bin/qwenvl"], "env/bin", "qwenvl"),
        (["qwenvl"], "env/bin", "qwenvl"),
        (["my env/qwenvl"], "", "'my env/qwenvl'"),
        ([sys.executable, "-m", "paddlemix_qwenvl_plugin.cli"], "", "qwenvl"),
    ],
)
def test_the_command_is_named_as_it_was_started(
    typed: list[str], on_path: str, named: str, tmp_path: Path
) -> None:
    for folder in ("env/bin", "my env", "elsewhere"):
        script = tmp_path / folder / "qwenvl"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(SCRIPT)
        script.chmod(0o755)
    path = os.pathsep.join([*([str(tmp_path / on_path)] if on_path else []), "/usr/bin", "/bin"])
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@"', "sh", *typed, "recipes", "explain"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == f"qwenvl: No such command 'explain'; see {named} recipes --help\n"
