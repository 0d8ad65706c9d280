"""``fedvfm audit ...``: read an audit log, check it, make receipts for the other end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedvfm import errors

NAME = "audit"
app = typer.Typer(
    help="What was received, decided, trained and sent, and whether the record is whole.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]
Log = Annotated[Path, typer.Argument(help="An audit log, or a state folder that holds one.")]


def _log(path: Path) -> Path:
    return path / "audit.jsonl" if path.is_dir() else path


@app.command()
def show(
    log: Log,
    last: Annotated[int, typer.Option(min=0, help="Only so many of the last entries; 0: all.")] = 0,
    as_json: Json = False,
) -> None:
    """Print the entries, after checking that the chain is whole."""
    from fedvfm import audit

    entries = audit.read(_log(log))
    rows = list(enumerate(entries, start=1))[-last:] if last else list(enumerate(entries, start=1))
    if as_json:
        print(json.dumps([entry for _, entry in rows], indent=2))
        return
    for number, entry in rows:
        values = {key: value for key, value in entry.items() if key not in ("event", "time", "prev", "hash")}
        told = " ".join(
            f"{key}={value[:12] if key != 'site' and _hash(value) else value}" for key, value in values.items()
        )
        print(f"{number:6} {entry.get('time')} {entry['event']:9} {told}")


def _hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


@app.command()
def verify(
    log: Log,
    against: Annotated[
        list[Path] | None, typer.Option(help="A receipt (.json) or the other end's log (.jsonl). Repeatable.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Public key that the receipts must be signed with.")] = None,
    as_json: Json = False,
) -> None:
    """Check the chain, and that it still holds what the other end noted of it. Exits with 14 if not."""
    from fedvfm import audit

    path = _log(log)
    entries = audit.read(path)
    public = "" if key is None else _public(key)
    noted = []
    for one in against or []:
        if one.is_dir() or one.suffix == ".jsonl":
            noted += audit.from_peer(_log(one), str(entries[0].get("owner")))
        else:
            noted.append(audit.from_receipt(one, entries, public))
    if against and not noted:
        raise errors.AuditError(f"{', '.join(map(str, against))}: notes nothing of this log, so nothing was compared")
    found = audit.verify(path, noted)
    if found["unfinished"]:
        print(f"note: {found['unfinished']} bytes of a line that a crash cut short are left out", file=sys.stderr)
    if as_json:
        print(json.dumps({"log": str(path), "whole": True, **found}, indent=2))
        return
    alone = "" if noted else "; without --against a cut at the end or a rewritten file does not show"
    print(f"{path}: {found['length']} entries, the chain is whole, {found['checked']} notes agree{alone}")
    print(f"head {found['head']}")


def _public(path: Path) -> str:
    from fedvfm.trust import documents, keys

    text = documents.read_bytes(path, "public key").decode(errors="replace").strip()
    return keys.public_text(keys.read_public(text))


@app.command()
def receipt(
    state: Annotated[Path, typer.Argument(help="The state folder of a server or a site.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The receipt; must not exist.")],
    as_json: Json = False,
) -> None:
    """Write a signed receipt of a log as it is now, for the other end to keep."""
    from fedvfm import audit
    from fedvfm.trust import documents, keys

    log, key = state / "audit.jsonl", state / ("server.key" if (state / "server.key").exists() else "site.key")
    if output.exists():
        raise errors.OutputInUse(f"{output} exists and is left as it is. Choose another --output")
    first = audit.read(log)[0]
    made = audit.Audit(log, str(first["owner"]), str(first["end"])).receipt(keys.read_private(key))
    documents.write(output, made)
    found = {"receipt": str(output), "length": made.length, "head": made.head, "time": made.time}
    print(json.dumps(found, indent=2) if as_json else f"{output}: {made.length} entries, head {made.head}")
