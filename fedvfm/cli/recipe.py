"""``fedvfm recipe ...``: begin a recipe, and lock it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedvfm.cli import drafts

NAME = "recipe"
app = typer.Typer(help="Recipes: what is trained.", no_args_is_help=True)
app.command("new")(drafts.recipe)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]


@app.command()
def lock(
    recipe: Annotated[Path, typer.Argument(help="A recipe's or an experiment's TOML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Locked recipe; the adapter lies beside it.")] = Path(
        "recipe.json"
    ),
    start: Annotated[Path | None, typer.Option("--from", help="Adapter of an earlier recipe to go on from.")] = None,
    as_json: Json = False,
) -> None:
    """Pin the backbone, write the manifest and the initial adapter. A server without torch starts from these files."""
    from fedvfm.model import locking
    from fedvfm.state import factors

    locked = locking.open_recipe(recipe, start)
    trainable = factors.ever(locked.manifest, locked.recipe.adapter.factors)
    paths = locking.write(output.with_suffix(".json"), locked)
    if as_json:
        values = {"recipe": locked.hash, "initial": locked.initial, "files": [str(path) for path in paths]}
        print(json.dumps({**values, "trainable_parameters": trainable}, indent=2))
        return
    print(f"recipe {locked.hash}\n{trainable:,} numbers train\nfiles: {paths[0]}, {paths[1]}")
