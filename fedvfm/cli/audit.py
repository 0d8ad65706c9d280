"""``fedvfm audit ...``: read an audit log, check it, make receipts for the other end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedvfm import errors
from fedvfm.report import quantity

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
    sent: Annotated[bool, typer.Option("--sent", help="Only what left this end, with totals.")] = False,
    as_json: Json = False,
) -> None:
    """Print the entries, after checking that the chain is whole."""
    from fedvfm.audit import audit

    entries = audit.read(_log(log))
    if sent:
        _show_sent(entries, last, as_json)
        return
    rows = list(enumerate(entries, start=1))[-last:] if last else list(enumerate(entries, start=1))
    if as_json:
        print(json.dumps([entry for _, entry in rows], indent=2))
        return
    for number, entry in rows:
        values = {key: value for key, value in entry.items() if key not in ("event", "time", "prev", "hash")}
        text = " ".join(
            f"{key}={value[:12] if key != 'site' and _hash(value) else value}" for key, value in values.items()
        )
        print(f"{number:6} {entry.get('time')} {entry['event']:9} {text}")


def _show_sent(entries: list[dict[str, Any]], last: int, as_json: bool) -> None:
    from fedvfm.audit import audit

    rows, totals = audit.departures(entries)
    rows = rows[-last:] if last else rows
    if as_json:
        first = {key: entries[0].get(key) for key in ("owner", "end")}
        print(json.dumps({**first, "messages": rows, "totals": totals}, indent=2))
        return
    for row in rows:
        where = f"round {row['round']}" if "round" in row else ""
        about = [f"{row['split']} split"] if "split" in row else []
        about += [f"recipe {row['recipe'][:12]}"] if "recipe" in row else []
        about += [f"{row['numbers']:,} numbers, sha256 {row['fingerprint'][:12]}"] if "numbers" in row else []
        about += [f"metrics {', '.join(row['metrics'])}"] if row.get("metrics") else []
        about += [f"reason {row['reason']}"] if "reason" in row else []
        print(f"{row['entry']:6} {row['time']} {row['kind']:9} {where:9} {row['bytes']:>12,} B  {'; '.join(about)}")
    kinds = ", ".join(f"{number} {kind}" for kind, number in totals["kinds"].items())
    print(f"{quantity.of(totals['messages'], 'message')} ({kinds or 'none'}), {totals['bytes']:,} bytes in all")
    again = f"; {totals['repeated']} left once more with the same bytes" if totals["repeated"] else ""
    print(f"{quantity.of(totals['updates'], 'update')} of {quantity.of(totals['numbers'], 'number')}{again}")
    print(f"metrics that left: {', '.join(totals['metrics']) or 'none'}")


def _hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


@app.command()
def verify(
    log: Log,
    against: Annotated[
        list[Path] | None, typer.Option(help="A receipt (.json) of either end, or the other end's log. Repeatable.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Public key that the receipts must be signed with.")] = None,
    as_json: Json = False,
) -> None:
    """Check the chain, and that it still holds what the other end noted of it.

    Exits with 14 if not, with 17 if all is well but what --against names says nothing of this log.
    """
    from fedvfm.audit import audit, cross_check

    path = _log(log)
    entries = audit.read(path)
    public = "" if key is None else _public(key)
    said: list[cross_check.Comparison] = []
    silent: list[str] = []
    for other in against or []:
        try:
            if other.is_dir() or other.suffix == ".jsonl":
                said.append(cross_check.log(_log(other), entries, str(path)))
            else:
                said.append(cross_check.receipt(other, entries, str(path), public, _own_key(path)))
        except errors.NothingCompared as error:  # a fault that another file shows counts more
            silent.append(str(error))
    agreed = sum(comparison.agreed for comparison in said)
    chain = audit.verify(path, [note for comparison in said for note in comparison.notes])
    if against and not silent and not chain["checked"] + agreed:
        silent.append(f"{', '.join(map(str, against))}: notes nothing of this log, so nothing was compared")
    if silent:
        held = f"{path}: {chain['length']} entries, the chain is whole, {chain['checked'] + agreed} notes agree"
        raise errors.NothingCompared("; ".join([*silent, held]))
    peers = cross_check.peers(entries, str(path))
    _warn(chain["unfinished"], peers)
    if as_json:
        print(json.dumps({"log": str(path), "whole": True, **chain, "agreed": agreed, "peers": peers}, indent=2))
        return
    alone = "" if against else "; without --against a cut at the end or a rewritten file does not show"
    print(f"{path}: {chain['length']} entries, the chain is whole, {chain['checked'] + agreed} notes agree{alone}")
    print(f"head {chain['head']}")
    for name, row in peers.items():
        print(f"{name}: {row['marked']} of {row['messages']} messages showed its log, last {row['length']} entries")


def _warn(unfinished: int, peers: dict[str, dict[str, Any]]) -> None:
    if unfinished:
        print(f"note: {unfinished} bytes of a line that a crash cut short are left out", file=sys.stderr)
    for name, row in peers.items():
        if row["back"]:
            at = row["back"][0]
            print(f"note: by entry {at} the log of '{name}' was shorter than before; use --against", file=sys.stderr)


def _public(path: Path) -> str:
    from fedvfm.trust import keys, signed_documents

    text = signed_documents.read_bytes(path, "public key").decode(errors="replace").strip()
    return keys.public_text(keys.read_public(text))


def _own_key(log: Path) -> str:
    """Fingerprint of the key of the site whose log this is; empty where its public key does not lie beside it."""
    from fedvfm.trust import keys

    path = log.parent / "site.pub"
    return keys.fingerprint(_public(path)) if path.is_file() else ""


@app.command()
def receipt(
    state: Annotated[Path, typer.Argument(help="The state folder of a server or a site.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The receipt; must not exist.")],
    peer: Annotated[
        str, typer.Option(help="Confirm the log of this site alone, and its ledger; default is every site's log.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Write a signed receipt of a log as it is now, for the other end to keep."""
    from fedvfm.audit import audit
    from fedvfm.trust import keys, signed_documents

    log, key = state / "audit.jsonl", state / ("server.key" if (state / "server.key").exists() else "site.key")
    if output.exists():
        raise errors.OutputInUse(f"{output} exists and is left as it is. Choose another --output")
    first = audit.read(log)[0]
    document = audit.Audit(log, str(first["owner"]), str(first["end"])).receipt(keys.read_private(key), peer)
    if peer and not document.heard:
        raise errors.NothingCompared(
            f"{log}: holds no mark of the log of '{signed_documents.shown(peer)[:64]}' yet; "
            "one comes with its next message"
        )
    signed_documents.write(output, document)
    heard = [mark.model_dump() for mark in document.heard]
    values: dict[str, Any] = {"receipt": str(output), "length": document.length, "head": document.head}
    values |= {"heard": heard, "sites": len(document.sites), "time": document.time}
    print(json.dumps(values, indent=2) if as_json else f"{output}: {document.length} entries, head {document.head}")
