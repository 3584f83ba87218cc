"""The recipes in recipes/ and the `qwenvl recipes` commands."""

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
# Recipes that export both stages and predict, in separate steps.
FLOWS = [name for name in NAMES if name != "demo-cpu"]


def test_recipes_are_shipped() -> None:
    assert {"demo-cpu", "tiny-cpu", "qwen-vl-7b", "qwen-vl-chat-7b", "qwen-vl-chat-int4"} <= set(NAMES)


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_shipped_recipe_is_valid_and_heads_with_its_command(path: Path) -> None:
    assert loader.load(path).name == path.stem
    head = path.read_text().split("schema:")[0]
    assert "# Prerequisites: " in head
    assert f"qwenvl run {path.stem}" in head


@pytest.mark.parametrize("name", FLOWS)
def test_dry_run_of_a_shipped_recipe(tmp_path: Path, name: str) -> None:
    done = qwenvl(tmp_path, "run", name, "--dry_run", "dtype=bfloat16")
    assert done.returncode == 0
    assert "${" not in done.stdout
    commands = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith(sys.executable)]
    assert len(commands) == len(loader.load(loader.find(name)).steps)
    predict = commands[-1]
    assert predict[3] == "predict"
    # predict reads the files that the exports before it write.
    vision, language = commands[-3], commands[-2]
    value = lambda command, flag: command[command.index(flag) + 1]  # noqa: E731
    assert value(predict, "--first_model_path") == value(vision, "--save_path")
    assert value(predict, "--second_model_path") == f"{value(language, '--output_path')}/qwen"
    assert value(vision, "--dtype") == value(language, "--dtype") == "bfloat16"
    assert value(predict, "--image") == str(REPO / "recipes" / "images" / "street.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_a_shipped_recipe_take_its_flags(tmp_path: Path, name: str) -> None:
    known = typer.main.get_command(main.app).commands  # type: ignore[attr-defined]
    recipe = loader.load(loader.find(name))
    for step in recipe.steps:
        program, command, *arguments = commands.argv(step, commands.values(recipe, tmp_path))[2:]
        assert program == "paddlemix_qwenvl_plugin.cli"
        # Parses the arguments as the command would, without running it; an unknown flag raises.
        known[command].make_context(command, arguments)


def test_checkpoint_override_reaches_every_step(tmp_path: Path) -> None:
    done = qwenvl(tmp_path, "run", "qwen-vl-chat-7b", "--dry_run", "assets.checkpoint.path=/models/chat")
    assert done.stdout.count("--model_name_or_path /models/chat") == 3
    assert "--chat" in done.stdout


def test_list(tmp_path: Path) -> None:
    done = qwenvl(tmp_path, "recipes", "list")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == NAMES
    assert "no GPU" in done.stdout


def test_show(tmp_path: Path) -> None:
    done = qwenvl(tmp_path, "recipes", "show", "tiny-cpu")
    assert (done.returncode, done.stdout) == (0, (REPO / "recipes" / "tiny-cpu.yaml").read_text())
    assert qwenvl(tmp_path, "recipes", "show", "nope").returncode == 2


def test_validate(tmp_path: Path) -> None:
    write(tmp_path, recipe())
    write(tmp_path, recipe(extra=1), "bad.yaml")
    good = qwenvl(tmp_path, "recipes", "validate", "fake.yaml", *NAMES)
    assert (good.returncode, good.stdout.count("ok   ")) == (0, 1 + len(NAMES))
    both = qwenvl(tmp_path, "recipes", "validate", "bad.yaml", "fake.yaml")
    assert both.returncode == 2
    assert both.stdout.splitlines()[0].startswith("bad  bad.yaml: extra: unknown key; known keys: ")
    assert both.stdout.splitlines()[1].startswith("ok   fake.yaml")
    assert both.stderr == "qwenvl: 1 of 2 recipes are not valid\n"


def test_the_command_modules_import_nothing_heavy() -> None:
    code = (
        "import sys; from paddlemix_qwenvl_plugin.cli import recipes, run;"
        " print([m for m in ('pydantic', 'yaml', 'packaging', 'numpy', 'paddle') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
