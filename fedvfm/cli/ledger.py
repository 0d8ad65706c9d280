"""``fedvfm ledger ...``: what a site's data has spent, whether the ledger is whole, and how it goes on after a loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedvfm import errors
from fedvfm.report import quantity

if TYPE_CHECKING:
    from fedvfm.config import privacy

NAME = "ledger"
app = typer.Typer(help="The privacy that a site's data has spent, over all runs.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]
Where = Annotated[Path, typer.Argument(metavar="LEDGER", help="SITE.toml, or the ledger's folder.")]
Against = Annotated[
    list[Path] | None, typer.Option(help="A ledger receipt (.json), or an audit log of either end. Repeatable.")
]
Key = Annotated[Path | None, typer.Option(help="The site's public key (site.pub): receipts must be signed with it.")]


def _open(where: Path) -> tuple[Path, privacy.Budget | None, str]:
    """Folder, budget and the site's name; the latter two from SITE.toml alone."""
    if where.suffix != ".toml":
        return where, None, ""
    from fedvfm.client import site_file

    site = site_file.read_site(where)
    if site.privacy is None:
        raise errors.ConfigError(str(where), ["has no [privacy]: this site keeps no ledger"])
    return Path(site.privacy.ledger), site.privacy, site.name


def _public(path: Path | None) -> str:
    from fedvfm.trust import keys, signed_documents

    if path is None:
        return ""
    text = signed_documents.read_bytes(path, "public key").decode(errors="replace").strip()
    return keys.public_text(keys.read_public(text))


def _tell(values: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(values, indent=2) if as_json else text)


@app.command()
def show(where: Where, as_json: Json = False) -> None:
    """What each data set has spent, of how much, and every release."""
    from fedvfm.ledger import summary

    folder, budget, _ = _open(where)
    spent = summary.build(folder, budget)
    _tell(spent, "\n".join(summary.words(spent)), as_json)


@app.command()
def verify(where: Where, against: Against = None, key: Key = None, as_json: Json = False) -> None:
    """Check the chain, and that it holds what others noted. Exits with 14 if not, and then nothing is charged."""
    from fedvfm.ledger import receipts, reconcile

    folder, _, name = _open(where)
    said = reconcile.statements(folder, against or [], _public(key), name)
    chain = receipts.verify(folder, [note for statement in said for note in statement.notes])
    alone = "" if against else "; without --against a cut at the end or a rewritten file does not show"
    waits = "; it waits for 'fedvfm ledger reconcile'" if chain["waiting"] else ""
    agree = quantity.of(chain["checked"], "note agrees", "notes agree")
    text = f"{folder}: {quantity.of(chain['length'], 'line')}, the chain is whole, {agree}{alone}{waits}"
    _tell({"ledger": str(folder), "whole": True, **chain}, f"{text}\nhead {chain['head']}", as_json)
    if chain["waiting"]:
        raise typer.Exit(errors.LedgerError.exit_code)


@app.command()
def receipt(
    where: Where,
    output: Annotated[Path, typer.Option("--output", "-o", help="The receipt; must not exist.")],
    state: Annotated[Path, typer.Option("--state", envvar="FEDVFM_SITE_STATE", help="Holds the site's key.")] = Path(
        "fedvfm-site"
    ),
    with_spending: Annotated[
        bool, typer.Option("--with-spending", help="For your own safe: a lost ledger is made good from it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a signed receipt. Without --with-spending it tells nothing but length and head."""
    from fedvfm.ledger import ledger, receipts
    from fedvfm.trust import keys, signed_documents

    folder, _, _ = _open(where)
    if output.exists():
        raise errors.OutputInUse(f"{output} exists and is left as it is. Choose another --output")
    document = receipts.make(ledger.reopen(folder), keys.read_private(state / "site.key"), with_spending=with_spending)
    signed_documents.write(output, document)
    values = {"receipt": str(output), "length": document.length, "head": document.head, "spending": with_spending}
    _tell(values, f"{output}: {quantity.of(document.length, 'line')}, head {document.head}", as_json)


@app.command()
def reconcile(where: Where, against: Against = None, key: Key = None, as_json: Json = False) -> None:
    """Charge what receipts say was spent and the ledger lost, then let rounds with privacy go on."""
    from fedvfm.ledger import reconcile as reconciling

    folder, budget, name = _open(where)
    said = reconciling.statements(folder, against or [], _public(key), name)
    charged = reconciling.reconcile(folder, said, budget, name)
    if not charged["changed"]:
        _tell(charged, f"{folder}: holds all that was noted of it; nothing to reconcile", as_json)
        return
    text = f"{folder}: {charged['adopted']} lost releases charged, {charged['marks']} notes settled"
    text += "; a recipe under way that saw a longer ledger leaves this site out, the next one takes it in"
    if charged["unknown"]:
        text += "; what was lost is not known, so the whole budget counts as spent"
    text += "; records have a new key, so all that was spent counts for all of them" if charged["rekeyed"] else ""
    text += f"; the broken file is kept as {charged['evidence']}" if charged["evidence"] else ""
    _tell(charged, text, as_json)
