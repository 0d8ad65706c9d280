"""What ``fedvfm ledger show`` says: each data set, what it has spent, of how much; and every release."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedvfm.config import privacy
from fedvfm.ledger import entries as lines
from fedvfm.ledger import ledger, spending
from fedvfm.privacy import base, planner
from fedvfm.report import quantity


def build(folder: Path, budget: privacy.Budget | None) -> dict[str, Any]:
    """The JSON document of a ledger.

    Args:
        folder: the ledger's.
        budget: the site's; without it each data set's is that of its last release.

    Raises:
        AuditError, LedgerError: if it is not whole or there is none.
    """
    found = ledger.reopen(folder)
    entries = found.entries
    charged = [one for one in entries if one["event"] == "charged"]
    names = sorted({str(one["data_set"]) for one in charged} | ({budget.data_set} if budget is not None else set()))
    return {
        "ledger": str(folder),
        "site": found.owner,
        "unit": entries[0]["unit"],
        "length": len(entries),
        "head": entries[-1]["hash"],
        "waiting": len(lines.waiting(entries)),
        "data_sets": [_data_set(found, entries, name, budget) for name in names],
        "adopted": sum(one["event"] == "adopted" for one in entries),
        "floor": dict(zip(("epsilon", "delta"), lines.floor(entries), strict=True)),
        "releases": [_release(number, one) for number, one in enumerate(entries, start=1) if one["event"] == "charged"],
    }


def _data_set(
    found: ledger.Ledger, entries: Sequence[dict[str, Any]], name: str, budget: privacy.Budget | None
) -> dict[str, Any]:
    mine = [one for one in entries if one["event"] == "charged" and one["data_set"] == name]
    own = budget if budget is not None and budget.data_set == name else None
    last = mine[-1] if mine else {}
    delta = own.delta if own is not None else float(last["budget_delta"])
    known = [found.records.find(str(one["records"])) for one in mine]
    among = None if not known or None in known else frozenset().union(*(one for one in known if one is not None))
    spent = found.spending(entries)
    after = spending.epsilon(
        spent, spent.worst(found.records.find, among), delta, "rdp" if own is None else own.accountant
    )
    return {
        "name": name,
        "releases": len(mine),
        "scores": sum(line["mechanism"] == base.SCORES for line in mine),
        "names": None if among is None else len(among),
        "epsilon": planner.finite(after.value),
        "delta": delta,
        "accountant": after.accountant,
        "allowed": own.epsilon if own is not None else float(last["budget_epsilon"]),
    }


def _release(number: int, entry: dict[str, Any]) -> dict[str, Any]:
    kept = ("time", "recipe", "round", "mechanism", "noise_multiplier", "sample_rate", "steps", "clip", "data_set")
    honest = {"honest": entry["honest"]} if "honest" in entry else {}
    return {"line": number, **{name: entry[name] for name in (*kept, "update")}, **honest}


def _of_honest(release: dict[str, Any]) -> str:
    return f", noise of {release['honest']} honest sites" if "honest" in release else ""


def words(found: dict[str, Any]) -> list[str]:
    """The same for a person."""
    rows = []
    for one in found["releases"]:
        rows.append(
            f"{one['line']:6} {one['time']} {one['data_set']} round {one['round']} of recipe {one['recipe'][:12]}: "
            f"{one['mechanism']}, noise {one['noise_multiplier']:g}, rate {one['sample_rate']:.4g}, "
            f"{one['steps']} steps{_of_honest(one)}"
        )
    for one in found["data_sets"]:
        spent = "infinity" if one["epsilon"] is None else ledger.shown(one["epsilon"])
        rows.append(
            f"data set {one['name']}: epsilon {spent} of {one['allowed']:.2f} ({found['unit']} level, delta "
            f"{one['delta']:g}, {one['accountant']}), {quantity.of(one['releases'], 'release')}"
        )
    if found["adopted"] or found["floor"]["epsilon"]:
        lost = quantity.of(found["adopted"], "lost release")
        rows.append(f"reconciled: {lost}, epsilon {found['floor']['epsilon']:g} on top of all")
    if found["waiting"]:
        rows.append("nothing is charged: lines are missing; run 'fedvfm ledger reconcile --against RECEIPT'")
    return [*rows, f"{quantity.of(found['length'], 'line')}, head {found['head']}"]
