"""Shipped recipes in recipes/, and the commands `qwenvl recipes`."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from recipe_helpers import REPO, qwenvl, recipe, write

from paddlemix_qwenvl_plugin.cli import main
from paddlemix_qwenvl_plugin.recipes import commands, loader

SHIPPED = sorted((REPO / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in SHIPPED]
# The last three steps of these recipes export the vision stage, export the language stage, and predict.
EXPORTING = [name for name in NAMES if name != "demo-cpu"]


def test_recipes_are_shipped() -> None:
    assert {"demo-cpu", "tiny-cpu", "qwen-vl-7b", "qwen-vl-chat-7b", "qwen-vl-chat-int4"} <= set(NAMES)


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_a_shipped_recipe_is_valid_and_begins_with_its_command(path: Path) -> None:
    assert loader.load(path).name == path.stem
    comment = path.read_text().split("schema:")[0]
    assert "# Prerequisites: " in comment
    assert f"qwenvl run {path.stem}" in comment


@pytest.mark.parametrize("name", EXPORTING)
def test_dry_run_of_a_shipped_recipe(tmp_path: Path, name: str) -> None:
    completed = qwenvl(tmp_path, "run", name, "--dry_run", "dtype=bfloat16")
    assert completed.returncode == 0
    assert "${" not in completed.stdout
    printed_commands = [
        shlex.split(line) for line in completed.stdout.splitlines() if line.startswith(sys.executable)
    ]
    assert len(printed_commands) == len(loader.load(loader.find(name)).steps)
    export_vision, export_language, predict = printed_commands[-3:]
    assert predict[3] == "predict"

    def value(command: list[str], flag: str) -> str:
        return command[command.index(flag) + 1]

    # `predict` reads the files that the exports write.
    assert value(predict, "--first_model_path") == value(export_vision, "--save_path")
    assert value(predict, "--second_model_path") == f"{value(export_language, '--output_path')}/qwen"
    assert value(export_vision, "--dtype") == value(export_language, "--dtype") == "bfloat16"
    assert value(predict, "--image") == str(REPO / "recipes" / "images" / "street.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_flags_in_a_shipped_recipe_exist(tmp_path: Path, name: str) -> None:
    cli_commands = typer.main.get_command(main.app).commands  # type: ignore[attr-defined]
    shipped = loader.load(loader.find(name))
    for step in shipped.steps:
        program, command, *arguments = commands.argv(step, commands.values(shipped, tmp_path))[2:]
        assert program == "paddlemix_qwenvl_plugin.cli"
        # Parse the arguments without running the command: an unknown flag raises.
        cli_commands[command].make_context(command, arguments)


def test_an_override_of_the_checkpoint_applies_to_every_step(tmp_path: Path) -> None:
    completed = qwenvl(tmp_path, "run", "qwen-vl-chat-7b", "--dry_run", "assets.checkpoint.path=/models/chat")
    assert completed.stdout.count("--model_name_or_path /models/chat") == 3
    assert "--chat" in completed.stdout


def test_list(tmp_path: Path) -> None:
    completed = qwenvl(tmp_path, "recipes", "list")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert [line.split()[0] for line in completed.stdout.splitlines()] == NAMES
    assert "no GPU" in completed.stdout


def test_show(tmp_path: Path) -> None:
    completed = qwenvl(tmp_path, "recipes", "show", "tiny-cpu")
    assert (completed.returncode, completed.stdout) == (0, (REPO / "recipes" / "tiny-cpu.yaml").read_text())
    assert qwenvl(tmp_path, "recipes", "show", "nope").returncode == 2


def test_validate(tmp_path: Path) -> None:
    write(tmp_path, recipe())
    write(tmp_path, recipe(extra=1), "bad.yaml")
    valid = qwenvl(tmp_path, "recipes", "validate", "fake.yaml", *NAMES)
    assert (valid.returncode, valid.stdout.count("ok   ")) == (0, 1 + len(NAMES))
    mixed = qwenvl(tmp_path, "recipes", "validate", "bad.yaml", "fake.yaml")
    assert mixed.returncode == 2
    assert mixed.stdout.splitlines()[0].startswith("bad  bad.yaml: extra: unknown key; known keys: ")
    assert mixed.stdout.splitlines()[1].startswith("ok   fake.yaml")
    assert mixed.stderr == "qwenvl: 1 of 2 recipes are not valid\n"


def test_the_command_modules_import_no_large_modules() -> None:
    code = (
        "import sys; from paddlemix_qwenvl_plugin.cli import recipes, run;"
        " print([m for m in ('pydantic', 'yaml', 'packaging', 'numpy', 'paddle') if m in sys.modules])"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert completed.stdout == "[]\n"
