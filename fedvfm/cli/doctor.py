"""``fedvfm doctor ...``: is this end ready, what is wrong, what to do. Thin: each verb calls one function of a wing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedvfm import errors
from fedvfm.report import finding

NAME = "doctor"
app = typer.Typer(
    help="Problems and remedies of a coordinator or a site: exit code 0 ready, 20 not ready. Changes nothing.",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]


def _tell(end: str, rows: list[finding.Row], as_json: bool) -> None:
    print(json.dumps(finding.document(end, rows), indent=2) if as_json else "\n".join(finding.lines(rows)))
    if not finding.ready(rows):
        raise typer.Exit(errors.NOT_READY)


@app.command()
def server(
    config: Annotated[Path | None, typer.Option("--config", help="TOML as for 'server start'.")] = None,
    listen: Annotated[str, typer.Option(help="host:port as for 'server start'.")] = "",
    state: Annotated[
        Path, typer.Option("--state", envvar="FEDVFM_SERVER_STATE", help="The server's state folder.")
    ] = Path("fedvfm-server"),
    as_json: Json = False,
) -> None:
    """Look at a coordinator: files, certificate, port, disk, clock, versions, sites, processes."""
    from fedvfm.config import schema
    from fedvfm.server import doctor

    settings = schema.ServerConfig()
    if config is not None:
        settings = schema.parse(schema.ServerConfig, schema.read_toml(config), str(config))
    _tell("server", doctor.examine(state, settings, listen), as_json)


@app.command()
def client(
    site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's own file.")],
    data: Annotated[bool, typer.Option(help="Look at the data too, as 'fedvfm data check' does.")] = True,
    limit: Annotated[int, typer.Option(min=0, help="Look at so many samples only; 0: all.")] = 50,
    state: Annotated[
        Path, typer.Option("--state", envvar="FEDVFM_SITE_STATE", help="This site's state folder.")
    ] = Path("fedvfm-site"),
    as_json: Json = False,
) -> None:
    """Look at a site: the way to the coordinator, TLS, clock, files, policy, device, backbone, data."""
    from fedvfm.client import doctor

    _tell("site", doctor.examine(state, site, data=data, limit=limit), as_json)


@app.command()
def health(
    address: Annotated[str, typer.Argument(help="host:port that 'start --health' was given.")],
    service: Annotated[str, typer.Option(help="One process by name; else all.")] = "",
    as_json: Json = False,
) -> None:
    """Ask the gRPC health probe of a running server or client. Exits with 0 if it is well, else 11."""
    from fedvfm.runtime import health as probe

    well = probe.ask(address, service)
    print(json.dumps({"address": address, "serving": well}) if as_json else "serving" if well else "not serving")
    if not well:
        raise typer.Exit(errors.EngineError.exit_code)
