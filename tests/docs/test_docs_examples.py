"""Run Python examples and cheap shell commands of the documents on the tiny model.

They run as printed, except that tests run this checkout's `qwenvl`, replace the path of the real model, limit the new
tokens of a chat, and omit commands that need a checkout of upstream.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from doc_helpers import REPO, blocks, section
from PIL import Image
from shell_commands import typed_lines

import paddlemix_qwenvl_plugin as plugin
from paddlemix_qwenvl_plugin.cli.main import app

STREET = REPO / "recipes" / "images" / "street.png"


def run_block(code: str, namespace: dict[str, Any], title: str) -> None:
    """Run an example, and compare its output with the comments after its `print` calls, if there are any."""
    expected = re.findall(r"^\s*print\(.*\)  # (.+)$", code, re.MULTILINE)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, title, "exec"), namespace)
    if expected:
        assert output.getvalue().splitlines() == expected


def test_python_api(tmp_path: Path, tiny_exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_exported / "model", tmp_path / "model")
    shutil.copyfile(STREET, tmp_path / "street.png")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}  # the examples are consecutive parts of a program
    examples = blocks((REPO / "docs" / "python-api.md").read_text("utf-8"), "python")
    assert len(examples) >= 5
    for number, code in enumerate(examples, start=1):
        run_block(code, namespace, f"python-api.md, example {number}")


def test_readme_real_model(tmp_path: Path, tiny_exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of "The real model", on the tiny model."""
    (tmp_path / "recipes" / "images").mkdir(parents=True)
    shutil.copyfile(STREET, tmp_path / "recipes" / "images" / "street.png")
    monkeypatch.chdir(tmp_path)
    readme = (REPO / "README.md").read_text("utf-8")
    (commands,) = blocks(section(readme, "The real model"), "sh")
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == ".venv/bin/qwenvl"
        tiny_model = str(tiny_exported / "model")
        arguments = [tiny_model if word == "/path/to/qwen-vl-7b" else word for word in arguments]
        assert not app(arguments, standalone_mode=False)  # the exit code, 0 or None
    assert (tmp_path / "out" / "answer.png").stat().st_size > 0


def shape(value: Any) -> Any:
    """Structure of a JSON value: its keys and types; a list counts as its first item."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return type(value).__name__


def test_batch(tmp_path: Path, tiny_exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of the example input have the keys, types and errors of the results in the document.

    In the document, a block of results follows each block of input.
    """
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
    for requests, documented in zip(examples[::2], examples[1::2]):
        Path("in.jsonl").write_text(requests, "utf-8")
        # One row of each example has an error.
        with pytest.raises(plugin.QwenVLError, match=r"1 of . rows failed; see their errors in out\.jsonl"):
            app(arguments, standalone_mode=False)
        results = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
        expected = [json.loads(line) for line in documented.splitlines()]
        for row in (*results, *expected):
            row.pop("boxes", None)  # the random model generates no boxes; see tests/batch
        assert [shape(row) for row in results] == [shape(row) for row in expected]
        assert [row.get("error") for row in results] == [row.get("error") for row in expected]
        Path("out.jsonl").unlink()


Run = Callable[[str], str]
"""Function that runs a shell script and returns its standard output."""


@pytest.fixture
def run(tmp_path: Path, tiny_exported: Path) -> Run:
    """Function that runs scripts in a folder with the bundled image and the exported stages of the tiny model."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "qwenvl").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m paddlemix_qwenvl_plugin.cli "$@"\n'
    )
    (programs / "qwenvl").chmod(0o755)
    work = tmp_path / "work"
    (work / "out").mkdir(parents=True)
    (work / "recipes" / "images").mkdir(parents=True)
    for folder in (work, work / "recipes" / "images"):
        shutil.copyfile(STREET, folder / "street.png")
    for name in ("vision", "text"):
        (work / name).symlink_to(tiny_exported / name)
        (work / "out" / name).symlink_to(tiny_exported / name)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }

    def run(script: str) -> str:
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{script}\n{result.stdout}{result.stderr}"
        return result.stdout

    return run


def test_chat_in_a_script(run: Run, tmp_path: Path) -> None:
    (script,) = [
        block for block in blocks((REPO / "docs" / "chat.md").read_text("utf-8"), "sh") if "|" in block
    ]
    run(f"{script.rstrip()} --max_new_tokens 4")
    conversation = json.loads((tmp_path / "work" / "talk.json").read_text("utf-8"))
    assert len(conversation["turns"]) == 2


def test_eval(run: Run, tmp_path: Path) -> None:
    """The commands of the three tasks run on the example rows in the document, and count one row."""
    text = (REPO / "docs" / "eval.md").read_text("utf-8")
    sessions = [typed_lines(block) for block in blocks(text, "console") if "data.jsonl" in block]
    rows = blocks(text, "json")
    assert len(sessions) == len(rows) == 3
    for script, row in zip(sessions, rows):
        image = tmp_path / "work" / json.loads(row)["image"]
        image.parent.mkdir(exist_ok=True)
        Image.new("RGB", (256, 256), "white").save(image)
        (tmp_path / "work" / "data.jsonl").write_text(row, "utf-8")
        if "eval captions" in script:
            pytest.importorskip("pycocoevalcap", reason="pip install -e '.[eval]' to score captions")
        output = run(script)
        assert re.search(r" of 1\b|\(1 (questions|images)\)$", output, re.MULTILINE), output


def test_recipes_patches_and_the_tiny_model(run: Run, tmp_path: Path) -> None:
    """The first console session of each of recipes.md, patches.md and python-api.md.

    The commands with `--tree` are omitted: they need a checkout of upstream.
    """
    recipes, patches, api = (
        typed_lines(blocks((REPO / "docs" / f"{name}.md").read_text("utf-8"), "console")[0])
        for name in ("recipes", "patches", "python-api")
    )
    shutil.copyfile(REPO / "recipes" / "tiny-cpu.yaml", tmp_path / "work" / "my.yaml")
    patches = re.sub("^.* --tree .*$", "", patches, flags=re.MULTILINE)
    output = run("\n".join([recipes, patches, api]))
    assert "ok: 4 steps, 2 expectations" in output
    assert "PaddleNLP" in output
    assert (tmp_path / "work" / "model" / "config.json").is_file()


def test_python_api_documents_all_names_and_fields() -> None:
    """All public names, and the fields of generation options and answers."""
    text = (REPO / "docs" / "python-api.md").read_text("utf-8")
    for name in set(plugin.__all__) - {"__version__"}:
        assert f"`{name}" in text, name
    for field in (*fields(plugin.GenerationOptions), *fields(plugin.Answer)):
        assert re.search(rf"^\| .*`{field.name}`.* \|", text, re.MULTILINE), field.name
