"""``fedvfm survey``: statistics of virtual hospitals before training. Thin, as every verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedvfm import errors
from fedvfm.report import quantity
from fedvfm.runtime import extras

Largest = Annotated[int, typer.Option(min=64, max=4096, help="Pixels: bound of the proposed input's sides.")]
LARGEST = 512


def survey(
    experiment: Annotated[str, typer.Argument(help="A bundled experiment's name or a TOML file.")],
    asked: Annotated[
        Path | None, typer.Option("--survey", help="What is asked; all that fits the experiment where left out.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=VALUE of the experiment; the value is TOML. Repeatable.")
    ] = None,
    largest: Largest = LARGEST,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the result; must not exist or be empty.")
    ] = Path("survey"),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")] = False,
) -> None:
    """Ask an experiment's virtual hospitals for statistics, as 'server survey' asks real ones; propose a recipe."""
    extras.require()
    from fedvfm.config import schema
    from fedvfm.config import survey as surveys
    from fedvfm.simulation import experiment as experiments
    from fedvfm.simulation import survey as simulated
    from fedvfm.simulation.engines import live

    what = experiments.load(experiment, sets or [])
    document = None if asked is None else schema.parse(surveys.Survey, schema.read_toml(asked), str(asked))
    try:
        with live.watch(quiet or as_json) as observer:
            result, proposed, files = simulated.run(what, output, document, largest, observer)
    except KeyboardInterrupt:
        raise errors.Interrupted("stopped; nothing was written") from None
    if as_json:
        values = {"survey": result.survey.hash, "sites": result.sites, "patients": result.patients}
        print(json.dumps({**values, "proposed": proposed.values, "files": [str(path) for path in files]}, indent=2))
        return
    print("\n".join(lines(result.sites, proposed.values, files)))


def lines(sites: tuple[str, ...], proposed: dict[str, object], files: list[Path]) -> list[str]:
    """What a person is told of a result."""
    from fedvfm.templates import drafts

    return [
        f"{quantity.of(len(sites), 'site')} answered: {', '.join(sites)}",
        *(f"proposed: {key} = {drafts.literal(value)}" for key, value in proposed.items()),  # type: ignore[arg-type]
        f"read: {files[1]}; then, changed as you like: fedvfm recipe lock {files[2]}",
    ]
