"""The Python examples of docs/python-api.md and the README's commands run as printed."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from doc_helpers import REPO, blocks, section

import paddlemix_qwenvl_plugin as plugin
from paddlemix_qwenvl_plugin.cli.main import app

STREET = REPO / "recipes" / "images" / "street.png"


def run_block(code: str, names: dict[str, Any], where: str) -> None:
    """Run an example, and compare its output with the comments after its `print` calls."""
    promised = re.findall(r"^\s*print\(.*\)  # (.+)$", code, re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, where, "exec"), names)
    if promised:
        assert printed.getvalue().splitlines() == promised


def test_python_api(tmp_path: Path, tiny_exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_exported / "model", tmp_path / "model")
    shutil.copyfile(STREET, tmp_path / "street.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    examples = blocks((REPO / "docs" / "python-api.md").read_text("utf-8"), "python")
    assert len(examples) >= 5
    for number, code in enumerate(examples, start=1):
        run_block(code, names, f"python-api.md, example {number}")


def test_readme_real_model(tmp_path: Path, tiny_exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The four commands, on the tiny model instead of the real one."""
    (tmp_path / "recipes" / "images").mkdir(parents=True)
    shutil.copyfile(STREET, tmp_path / "recipes" / "images" / "street.png")
    monkeypatch.chdir(tmp_path)
    readme = (REPO / "README.md").read_text("utf-8")
    (commands,) = blocks(section(readme, "The real model"), "sh")
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == ".venv/bin/qwenvl"
        arguments = [str(tiny_exported / "model") if a == "/path/to/qwen-vl-7b" else a for a in arguments]
        assert not app(arguments, standalone_mode=False)
    assert (tmp_path / "out" / "answer.png").stat().st_size > 0


def shape(value: Any) -> Any:
    """Structure of a JSON value: keys and types."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return type(value).__name__


def test_batch(tmp_path: Path, tiny_exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command answers the example input with rows like the results printed below it."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(STREET, "street.png")
    for stage in ("vision", "text"):
        shutil.copytree(tiny_exported / stage, stage)
    text = (REPO / "docs" / "batch.md").read_text("utf-8")
    (command,) = blocks(text, "sh")
    program, *arguments = shlex.split(command)
    assert program == "qwenvl"
    examples = blocks(text, "jsonl")
    assert len(examples) == 4
    for asked, printed in zip(examples[::2], examples[1::2]):
        Path("in.jsonl").write_text(asked, "utf-8")
        with pytest.raises(plugin.QwenVLError, match=r"1 of . rows failed; see their errors in out\.jsonl"):
            app(arguments, standalone_mode=False)
        results = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
        promised = [json.loads(line) for line in printed.splitlines()]
        for row in (*results, *promised):
            row.pop("boxes", None)  # the random model generates no boxes; see tests/batch
        assert [shape(row) for row in results] == [shape(row) for row in promised]
        assert [row.get("error") for row in results] == [row.get("error") for row in promised]
        Path("out.jsonl").unlink()


def test_python_api_names_every_option() -> None:
    text = (REPO / "docs" / "python-api.md").read_text("utf-8")
    for name in set(plugin.__all__) - {"__version__"}:
        assert f"`{name}" in text, name
    for field in (*fields(plugin.GenerationOptions), *fields(plugin.Answer)):
        assert re.search(rf"^\| .*`{field.name}`.* \|", text, re.MULTILINE), field.name
