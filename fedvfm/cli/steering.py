"""``fedvfm server pause, resume, finish, extend, drop, readmit, withdraw, recipe``: the coordinator steers. Thin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fedvfm.report import quantity

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]
StateOption = Annotated[Path, typer.Option("--state", envvar="FEDVFM_SERVER_STATE", help="The server's state folder.")]
SiteName = Annotated[str, typer.Argument(help="Name of the site.")]
STATE = Path("fedvfm-server")


def _print(values: dict[str, Any], line: str, as_json: bool) -> None:
    print(json.dumps(values, indent=2) if as_json else line)


@app.command()
def pause(state: StateOption = STATE, as_json: Json = False) -> None:
    """Let the round in hand end and no further one begin, until 'server resume'."""
    from fedvfm.server import state_folder
    from fedvfm.server.coordinator import orders

    order = orders.pause(state_folder.open_state(state))
    _print(
        {"paused": order.model_dump()}, f"paused by {order.who} since {order.time}, after the round in hand", as_json
    )


@app.command()
def resume(state: StateOption = STATE, as_json: Json = False) -> None:
    """Let rounds begin again."""
    from fedvfm.server import state_folder
    from fedvfm.server.coordinator import orders

    was = orders.resume(state_folder.open_state(state))
    _print({"resumed": was}, "rounds begin again" if was else "it was not paused", as_json)


@app.command()
def finish(
    undo: Annotated[
        bool,
        typer.Option(
            "--undo",
            help="Take the order back, until the final test begins, or when it failed. A pause before stays ended.",
        ),
    ] = False,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Stop early: after the round in hand the sites test the adapter, which is then the final one. Ends a pause."""
    from fedvfm.server import state_folder
    from fedvfm.server.coordinator import orders

    if undo:
        was = orders.unfinish(state_folder.open_state(state))
        _print({"undone": was}, "rounds go on to the recipe's last" if was else "no finish was ordered", as_json)
        return
    order = orders.finish(state_folder.open_state(state))
    _print(
        {"finishing": order.model_dump()}, f"recipe {order.recipe[:12]} is finished after the round in hand", as_json
    )


@app.command()
def extend(
    rounds: Annotated[int, typer.Option(help="How many rounds more.")],
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Go on from the last adapter for more rounds: a recipe of its own, which every site must approve."""
    from fedvfm.server import state_folder
    from fedvfm.server.coordinator import orders

    prolonged = orders.extend(state_folder.open_state(state), rounds)
    long = quantity.of(rounds, "round")
    line = (
        f"recipe {prolonged} goes on for {long}; each site is asked: fedvfm client approve {prolonged[:12]}"
        if prolonged
        else f"when the present recipe is finished, another one goes on for {long}, and each site is asked"
    )
    _print({"recipe": prolonged, "rounds": rounds}, line, as_json)


@app.command()
def drop(site: SiteName, state: StateOption = STATE, as_json: Json = False) -> None:
    """Ask a site nothing more, as it withdrew; its key stays, and 'server readmit' takes it in again."""
    from fedvfm.server import state_folder
    from fedvfm.server.coordinator import orders

    entry = orders.drop(state_folder.open_state(state), site)
    _print(entry.to_json(), f"site {site} is dropped since {entry.since}", as_json)


@app.command()
def readmit(site: SiteName, state: StateOption = STATE, as_json: Json = False) -> None:
    """Take a dropped site in again, at the next round."""
    from fedvfm.server import state_folder
    from fedvfm.server.coordinator import orders

    entry = orders.readmit(state_folder.open_state(state), site)
    _print(entry.to_json(), f"site {site} takes part again since {entry.since}", as_json)


@app.command()
def withdraw(
    site: SiteName,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Train again without it, from the round before it came in: a new recipe.")
    ] = False,
    purge: Annotated[
        bool, typer.Option("--purge", help="Remove adapters and reports that its updates are part of; records stay.")
    ] = False,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Let a site withdraw for good: say what its updates are part of, and pause what would go on from them.

    It never comes back under this name. Ask again at any time, with --rerun or --purge too.
    """
    from fedvfm.server import rerun as reruns
    from fedvfm.server import state_folder, withdrawal

    where = state_folder.open_state(state)
    document = withdrawal.withdraw(where, site, pause=not rerun)
    planned = reruns.plan(where, document)
    lines = [*withdrawal.lines(document), f"signed: {withdrawal.path_of(where, site)}"]
    lines += [] if planned is None else [reruns.sentence(planned)]
    again = reruns.take_up(where, planned) if rerun and planned is not None else ""
    if again:
        lines.append(f"recipe {again} is the present one; at each site: fedvfm client approve {again[:12]}")
        lines += reruns.paused(where, state)
    elif planned is not None:
        lines += reruns.choices(where, site, state)
    gone = withdrawal.purge(state_folder.open_state(state), document) if purge else (0, 0)
    lines += [f"removed: {quantity.of(gone[0], 'file')}, {gone[1]:,} bytes"] if purge else []
    values = {
        "withdrawal": document.model_dump(mode="json"),
        "rerun_after": None if planned is None else planned.after,
        "recipe": again,
        "removed": gone[0],
    }
    _print(values, "\n".join(lines), as_json)


@app.command()
def recipe(
    recipe: Annotated[Path, typer.Argument(help="A recipe's TOML file, or one locked before (.json).")],
    now: Annotated[
        bool, typer.Option("--now", help="Put the present recipe aside after the round in hand, finished or not.")
    ] = False,
    start: Annotated[Path | None, typer.Option("--from", help="Adapter of an earlier recipe to go on from.")] = None,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Add a further recipe: it follows the present one, and each site is asked for its approval over TLS."""
    from fedvfm.model import locking
    from fedvfm.server import state_folder
    from fedvfm.server.coordinator import orders

    where = state_folder.open_state(state)
    locked = locking.open_recipe(recipe, start)
    current = orders.add_recipe(where, locked, at_once=now)
    when = "is the present one" if current else "follows when the present one is finished"
    _print(
        {"recipe": locked.hash, "current": current},
        f"recipe {locked.hash} {when}; at each site: fedvfm client approve {locked.hash[:12]}",
        as_json,
    )
