"""`qwenvl patches`: the shipped patches to PaddleNLP and PaddleMIX."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from paddlemix_qwenvl_plugin.util.errors import QwenVLError

app = typer.Typer(
    name="patches", help="List, check, apply and revert the patches to PaddleNLP and PaddleMIX."
)

_TREE = typer.Option(..., "--tree", metavar="DIR", help="Top folder of a PaddleNLP or PaddleMIX checkout.")
_FORCE = typer.Option(False, "--force", help="Accept another commit than the pinned one.")


@app.command("list")
def list_(
    tree: Optional[Path] = typer.Option(None, "--tree", metavar="DIR", help="Only those for this checkout."),
) -> None:
    """List the shipped patches and the commits they are for."""
    from paddlemix_qwenvl_plugin.upstream import patches, pins

    upstreams = pins.load().upstreams if tree is None else (patches.open_tree(tree).upstream,)
    for upstream in upstreams:
        print(f"{upstream.title} {upstream.commit}")
        for patch in patches.shipped(upstream):
            print(f"  {patch.name}  {patch.description}")


@app.command()
def check(tree: Path = _TREE, force: bool = _FORCE) -> None:
    """Print the state of each patch; change nothing."""
    from paddlemix_qwenvl_plugin.upstream import patches

    report = patches.check(tree, force)
    for patch, state in report.states:
        print(f"{patch.name}: {state.value}")
    if report.refusal:
        raise QwenVLError(report.refusal)
    n_conflicts = len(report.with_state(patches.State.CONFLICT))
    if n_conflicts:
        raise QwenVLError(f"{tree}: {n_conflicts} of {len(report.states)} patches do not apply")


@app.command()
def apply(tree: Path = _TREE, force: bool = _FORCE) -> None:
    """Apply all patches, or none if one fails."""
    from paddlemix_qwenvl_plugin.upstream import patches

    # The states before the change.
    for patch, state in patches.apply(tree, force).states:
        print(f"{patch.name}: {'applied' if state is patches.State.APPLICABLE else state.value}")


@app.command()
def revert(tree: Path = _TREE, force: bool = _FORCE) -> None:
    """Revert the applied patches."""
    from paddlemix_qwenvl_plugin.upstream import patches

    # The states before the change.
    for patch, state in patches.revert(tree, force).states:
        print(f"{patch.name}: {'reverted' if state is patches.State.APPLIED else 'not applied'}")
