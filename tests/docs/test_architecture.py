"""The import rule of docs/architecture.md, checked on the sources, and the modules that an import loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_helpers import REPO, blocks

PACKAGE = "paddlemix_qwenvl_plugin"
FREE = {"version"}
# The package's __init__ exports the public interface from any folder.
MODULES = sorted(p for p in (REPO / PACKAGE).rglob("*.py") if p != REPO / PACKAGE / "__init__.py")


def rows() -> list[list[str]]:
    """Rows of the rule in the document, lowest first."""
    text = (REPO / "docs" / "architecture.md").read_text("utf-8")
    (rule,) = [block for block in blocks(text, "text") if "→" in block]
    return [[name.strip() for name in row.split(",")] for row in reversed(rule.split("→"))]


RANK = {part: rank for rank, row in enumerate(rows()) for part in row}


def part_of(path: Path) -> str:
    """Folder of a module in the package, or the module's name if it is in none."""
    return path.relative_to(REPO / PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a module imports, inside functions as well."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.split(".")[0] == PACKAGE}


def test_every_part_has_its_row() -> None:
    assert {part_of(path) for path in MODULES} == {*RANK, *FREE}


def test_imports_run_one_way() -> None:
    assert len(MODULES) > 50
    for path in MODULES:
        for other in parts_imported(path) - {part_of(path)} - FREE:
            # -1: modules free for all may import only such modules.
            assert RANK[other] <= RANK.get(part_of(path), -1), f"{path} imports {other}"


def test_no_import_cycles() -> None:
    graph = {part: set[str]() for part in RANK}
    for path in MODULES:
        if part_of(path) in graph:
            graph[part_of(path)] |= parts_imported(path) - {part_of(path)} - FREE
    while leaves := [part for part, others in graph.items() if not others & set(graph)]:
        for part in leaves:
            del graph[part]
    assert not graph


def test_no_module_needs_paddlenlp_to_load() -> None:
    for path in MODULES:
        upstream = {name.split(".")[0] for name in imports(path, top_level_only=True)}
        assert not upstream & {"paddlenlp", "paddlemix", "ppdiffusers"}, path


def test_processing_and_recipes_know_nothing_of_paddle() -> None:
    for path in MODULES:
        if part_of(path) in ("processing", "recipes"):
            assert "paddle" not in {name.split(".")[0] for name in imports(path)}, path


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.cli.main"])
def test_import_loads_neither_paddle_nor_numpy(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert PACKAGE in loaded
    assert not loaded & {"paddle", "paddlenlp", "paddlemix", "numpy", "PIL", "tiktoken", "httpx"}


def test_document_declares_the_inputs_of_the_contracts() -> None:
    """Every input's name, and the stock ones in their order."""
    from paddlemix_qwenvl_plugin.artifact.contract import step_inputs, stock_inputs
    from paddlemix_qwenvl_plugin.checkpoint.config import parse_config
    from paddlemix_qwenvl_plugin.tiny.make import tiny_config

    config = parse_config(tiny_config(700, 600), "tiny model")
    text = (REPO / "docs" / "architecture.md").read_text("utf-8")
    stock, step = (text.split(f"## The {name} contract")[1].split("\n## ")[0] for name in ("stock", "step"))
    names = [i.name for i in stock_inputs(config, "float32", "float32")][:23]
    rows_of_table = re.findall(r"^\| [\d,… L+]+\| (.*?) \| \[|^\| 3 \| (.*?) \|", stock, re.MULTILINE)
    listed = re.findall(r"`([a-z_]+(?:_0)?)`", " ".join(a or b for a, b in rows_of_table))
    assert [name for name in listed if name != "max_len"] == names
    for declared in step_inputs(config, "float32", "float32")[:10]:
        assert f"`{declared.name}`" in step, declared.name


def test_document_lists_the_manifest() -> None:
    from paddlemix_qwenvl_plugin.artifact.manifest import Manifest

    text = (REPO / "docs" / "architecture.md").read_text("utf-8")
    fields = text.split("### The manifest")[1].split("\n## ")[0]
    listed = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", fields, re.MULTILINE)))
    assert listed == list(Manifest.model_fields)
