"""docs/architecture.md, compared with the sources: figure of imports, import rule, two contracts, and the manifest.

A part is a folder of the package, or a module that is in no folder.
"""

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
# Parts that every module may import.
UNRESTRICTED = {"version"}
# Without the package's __init__, which exports the public interface and may import any part.
MODULES = sorted(path for path in (REPO / PACKAGE).rglob("*.py") if path != REPO / PACKAGE / "__init__.py")

DOCUMENT = (REPO / "docs" / "architecture.md").read_text("utf-8")


def groups() -> list[list[str]]:
    """The groups of parts in the document's import rule, `A, B → C → D`, from right to left."""
    (rule,) = [block for block in blocks(DOCUMENT, "text") if "→" in block]
    return [[name.strip() for name in group.split(",")] for group in reversed(rule.split("→"))]


RANK = {part: rank for rank, group in enumerate(groups()) for part in group}


def part_of(path: Path) -> str:
    """The part that a module belongs to."""
    return path.relative_to(REPO / PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a module imports: at its top level only, or also inside functions."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.split(".")[0] == PACKAGE}


def import_graph() -> dict[str, set[str]]:
    """Map parts to the other parts that their modules import, without the unrestricted parts."""
    graph = {part: set[str]() for part in RANK}
    for path in MODULES:
        if part_of(path) in graph:
            graph[part_of(path)] |= parts_imported(path) - {part_of(path)} - UNRESTRICTED
    return graph


def reachable(graph: dict[str, set[str]], part: str) -> set[str]:
    """Collect the parts that `part` imports, directly or through other parts."""
    visited: set[str] = set()
    queue = [*graph[part]]
    while queue:
        other = queue.pop()
        if other not in visited:
            visited.add(other)
            queue += graph[other]
    return visited


def figure(graph: dict[str, set[str]]) -> str:
    """Draw an acyclic import graph in Mermaid, in the order of the import rule, without imports that others imply."""
    lines = ["graph TD"]
    for part in sorted(graph, key=lambda part: (-RANK[part], part)):
        indirect = set().union(*(reachable(graph, other) for other in graph[part]))
        lines += [f"    {part} --> {other}" for other in sorted(graph[part] - indirect)]
    return "\n".join(lines) + "\n"


def test_figure_shows_the_imports() -> None:
    (documented,) = blocks(DOCUMENT, "mermaid")
    expected = figure(import_graph())
    assert documented == expected, (
        f"the imports have changed; the figure of docs/architecture.md is now:\n{expected}"
    )


def test_figure_leaves_out_indirect_imports() -> None:
    graph = {"cli": {"runtime", "util"}, "runtime": {"util"}, "util": set[str]()}
    assert figure(graph) == "graph TD\n    cli --> runtime\n    runtime --> util\n"


def test_every_part_has_a_group() -> None:
    assert {part_of(path) for path in MODULES} == {*RANK, *UNRESTRICTED}


def test_imports_run_in_one_direction() -> None:
    assert len(MODULES) > 50
    for path in MODULES:
        for other in parts_imported(path) - {part_of(path)} - UNRESTRICTED:
            # Rank -1: an unrestricted part may import only unrestricted parts.
            assert RANK[other] <= RANK.get(part_of(path), -1), f"{path} imports {other}"


def test_no_import_cycles() -> None:
    graph = import_graph()
    # Remove parts that import no remaining part; each part of a cycle imports one.
    while leaves := [part for part, others in graph.items() if not others & set(graph)]:
        for part in leaves:
            del graph[part]
    assert not graph


def test_no_module_imports_upstream_when_it_is_loaded() -> None:
    for path in MODULES:
        packages = {name.split(".")[0] for name in imports(path, top_level_only=True)}
        assert not packages & {"paddlenlp", "paddlemix", "ppdiffusers"}, path


def test_processing_and_recipes_do_not_import_paddle() -> None:
    for path in MODULES:
        if part_of(path) in ("processing", "recipes"):
            assert "paddle" not in {name.split(".")[0] for name in imports(path)}, path


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.cli.main"])
def test_import_loads_neither_paddle_nor_numpy(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert PACKAGE in loaded
    assert not loaded & {"paddle", "paddlenlp", "paddlemix", "numpy", "PIL", "tiktoken", "httpx"}


def test_document_lists_the_inputs_of_the_contracts() -> None:
    """The names of the inputs up to the first caches; those of the stock contract also in their order."""
    from paddlemix_qwenvl_plugin.artifact.contract import step_inputs, stock_inputs
    from paddlemix_qwenvl_plugin.checkpoint.config import parse_config
    from paddlemix_qwenvl_plugin.tiny.make import tiny_config

    config = parse_config(tiny_config(n_vocab=700, image_start_id=600), "tiny model")
    stock, step = (
        DOCUMENT.split(f"## The {name} contract")[1].split("\n## ")[0] for name in ("stock", "step")
    )
    # 22 inputs and the first layer's cache: the table names no other cache.
    names = [tensor.name for tensor in stock_inputs(config, "float32", "float32")][:23]
    # The second cell of rows `| 5, 6, 7 | names | [shape] |`; the third cell of row 3 is not a shape in brackets.
    name_cells = re.findall(r"^\| [\d,… L+]+\| (.*?) \| \[|^\| 3 \| (.*?) \|", stock, re.MULTILINE)
    listed = re.findall(
        r"`([a-z_]+(?:_0)?)`", " ".join(cell or row_3_cell for cell, row_3_cell in name_cells)
    )
    assert listed == names
    # Seven inputs, and the first three caches.
    for tensor in step_inputs(config, "float32", "float32")[:10]:
        assert f"`{tensor.name}`" in step, tensor.name


def test_document_lists_the_manifest() -> None:
    from paddlemix_qwenvl_plugin.artifact.manifest import Manifest

    fields = DOCUMENT.split("### The manifest")[1].split("\n## ")[0]
    listed = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", fields, re.MULTILINE)))
    assert listed == list(Manifest.model_fields)
