"""`qwenvl recipes`: list, show and check recipes."""

from __future__ import annotations

import sys

import typer

from paddlemix_qwenvl_plugin.util.errors import UsageError, line_of

app = typer.Typer(name="recipes", help="List, show and check recipes.")


@app.command("list")
def list_() -> None:
    """List the shipped recipes."""
    from paddlemix_qwenvl_plugin.recipes import loader

    rows = [(name, " ".join(loader.load(path).why.split())) for name, path in loader.shipped().items()]
    if sys.stdout is None or not sys.stdout.isatty():
        width = max((len(name) for name, _ in rows), default=0)
        for name, why in rows:
            print(f"{name:<{width}}  {why}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "why")
    for name, why in rows:
        table.add_row(name, why)
    Console().print(table)


@app.command()
def show(name: str = typer.Argument(..., help="A shipped recipe's name, or a path.")) -> None:
    """Print a recipe file."""
    from paddlemix_qwenvl_plugin.recipes import loader

    print(loader.find(name).read_text(encoding="utf-8"), end="")


@app.command()
def validate(
    paths: list[str] = typer.Argument(..., metavar="PATH...", help="Recipe files, or names of shipped ones."),
) -> None:
    """Check recipes against the schema."""
    from paddlemix_qwenvl_plugin.recipes import loader

    n_invalid = 0
    for path in paths:
        try:
            recipe = loader.load(loader.find(path))
        except UsageError as error:
            print(f"bad  {line_of(error)}")
            n_invalid += 1
        else:
            print(f"ok   {path}: {recipe.name}, {len(recipe.steps)} steps")
    if n_invalid:
        raise UsageError(f"{n_invalid} of {len(paths)} recipes are not valid")
