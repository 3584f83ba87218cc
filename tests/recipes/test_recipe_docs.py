"""docs/recipes.md: its worked example runs as printed, and its tables name every key and check."""

from __future__ import annotations

import re
from pathlib import Path

from recipe_helpers import REPO, qwenvl

from paddlemix_qwenvl_plugin.recipes import interpolate, schema

TEXT = (REPO / "docs" / "recipes.md").read_text(encoding="utf-8")
EXAMPLE = TEXT.split("## A worked example")[1]


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", EXAMPLE, re.DOTALL)
    return str(found)


def steady(text: str) -> str:
    """Remove the variable parts: dates, folders, seconds."""
    text = re.sub(r"/\S*/runs/\d{8}-\d{6}-", "RUNS/", text)
    return re.sub(r"\d+(\.\d)? s\b", "N s", text)


def test_worked_example(tmp_path: Path) -> None:
    (tmp_path / "dice.yaml").write_text(block("yaml"))
    (tmp_path / "dice.py").write_text(block("python"))
    sessions = [part.partition("\n") for part in block("console").split("$ qwenvl ")[1:]]
    assert len(sessions) == 3
    for command, _, printed in sessions:
        done = qwenvl(tmp_path, *command.split())
        assert steady(done.stdout + done.stderr) == steady(printed)


def test_tables_name_everything() -> None:
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
