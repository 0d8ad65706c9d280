"""``fedvfm evidence``: thin, as every verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedvfm import errors
from fedvfm.report import quantity


def evidence(
    state: Annotated[Path, typer.Argument(help="The server's state folder.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A new folder for the pages.")] = None,
    verify: Annotated[Path | None, typer.Option(help="A folder that was written: check each line it cites.")] = None,
    recipe: Annotated[
        str, typer.Option(help="Beginning of a recipe's hash; by default the last one of which a round is done.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")] = False,
) -> None:
    """Write a model card, a data-protection annex and a technical file, each figure with the line it comes from.

    With --verify: check them against the record as it is now; exits with 14 where a line or a page was changed.
    """
    from fedvfm.server import evidence as pages
    from fedvfm.server import state_folder

    if (output is None) == (verify is None):
        raise errors.ConfigError("evidence", ["give one of --output FOLDER and --verify FOLDER"])
    where = state_folder.open_state(state)
    shown = pages.write(where, output, recipe) if output is not None else pages.verify(where, verify or Path())
    if as_json:
        print(json.dumps({"folder": str(output or verify), **shown.model_dump(mode="json")}, indent=2))
        return
    done = "written" if output is not None else "verified"
    cited = f"{quantity.of(len(shown.lines), 'line')} cited, recipe {shown.recipe[:12]}"
    print(f"{done}: {', '.join(shown.pages)} in {output or verify}, {cited}")
