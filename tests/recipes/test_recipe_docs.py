"""docs/recipes.md: its example prints what it shows; it lists checks, references, and keys except those of `expect`."""

from __future__ import annotations

import re
from pathlib import Path

from recipe_helpers import REPO, qwenvl

from paddlemix_qwenvl_plugin.recipes import interpolate, schema

TEXT = (REPO / "docs" / "recipes.md").read_text(encoding="utf-8")
EXAMPLE = TEXT.split("## A worked example")[1]


def code_block(language: str) -> str:
    """Return the example's code block in a language."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", EXAMPLE, re.DOTALL)
    return str(block)


def without_variable_parts(text: str) -> str:
    """Replace what differs between runs: the paths and dates of run folders, and numbers of seconds."""
    text = re.sub(r"/\S*/runs/\d{8}-\d{6}-", "RUNS/", text)
    return re.sub(r"\d+(\.\d)? s\b", "N s", text)


def test_worked_example(tmp_path: Path) -> None:
    (tmp_path / "dice.yaml").write_text(code_block("yaml"))
    (tmp_path / "dice.py").write_text(code_block("python"))
    commands = code_block("console").split("$ qwenvl ")[1:]
    assert len(commands) == 3
    for command_and_output in commands:
        arguments, _, output = command_and_output.partition("\n")
        completed = qwenvl(tmp_path, *arguments.split())
        printed = completed.stdout + completed.stderr
        assert without_variable_parts(printed) == without_variable_parts(output)


def test_the_tables_list_all_keys_checks_and_references() -> None:
    for name, field in schema.Recipe.model_fields.items():
        assert re.search(rf"^\| `{field.alias or name}(\.[^`]*)?` \|", TEXT, re.MULTILINE), name
    for prefix, model in (
        ("requires", schema.Requires),
        ("assets.*", schema.Asset),
        ("steps.*", schema.Step),
    ):
        for name in model.model_fields:
            assert f"| `{prefix}.{name}` |" in TEXT
    for name in schema.Bench.model_fields:
        assert f"| `bench.{name}` |" in TEXT
    for name in schema.CHECKS:
        assert f"`{name}: " in TEXT
    for name in (*interpolate.RUN_NAMES, *interpolate.LOAD_NAMES, "assets.NAME"):
        assert f"`${{{name}}}`" in TEXT
