"""The lines of a ledger: what may stand in them, and what they say of receipts and keys."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedvfm.audit import audit
from fedvfm.config import privacy
from fedvfm.storage import hash_chain

FILE = "ledger.jsonl"
END = "ledger"
_RELEASE = "recipe round base mechanism noise_multiplier sample_rate steps clip data_set records key"
RELEASE = tuple(name for name in _RELEASE.split() if name != "data_set")
"""What a release is, whatever its data set is called."""
_BUDGET = "budget_epsilon budget_delta"


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _matches(pattern: str) -> Callable[[Any], bool]:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def _marks(value: Any) -> bool:
    try:
        return isinstance(value, list) and all(hash_chain.Mark.parse(one) for one in value)
    except ValueError:
        return False


_hash = _matches("[0-9a-f]{64}")
FORMS: dict[str, Callable[[Any], bool]] = {
    "owner": audit.FIELDS["owner"],
    "end": lambda value: value == END,
    "unit": lambda value: value in privacy.UNITS.values(),
    **dict.fromkeys(("key", "recipe", "base", "records", "update", "head"), _hash),
    "token": _matches("[0-9a-f]{32}"),
    "mechanism": _matches("[a-z][a-z0-9-]{0,39}"),
    "data_set": _matches("[a-z0-9][a-z0-9._-]{0,63}"),
    **dict.fromkeys(("round", "steps", "length", "number", "honest"), _whole),
    **dict.fromkeys(("noise_multiplier", "sample_rate", "clip", "epsilon", "delta"), _positive),
    **dict.fromkeys(("budget_epsilon", "budget_delta"), _positive),
    "marks": _marks,
}
EVENTS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    name: (frozenset(needed.split()), frozenset(free.split()))
    for name, needed, free in (
        ("opened", "owner end unit key", ""),
        ("reserved", f"token {_RELEASE} {_BUDGET}", "honest"),
        ("released", "token", ""),
        ("charged", f"update {_RELEASE} {_BUDGET}", "token honest"),
        ("suspended", "length head", ""),
        ("adopted", "noise_multiplier sample_rate steps number head", "records key honest"),
        ("floor", "epsilon delta", ""),
        ("rekeyed", "key", ""),
        ("reconciled", "marks", ""),
    )
}
"""Event -> fields it must have, fields it may have: never free text.

``honest``: where sites share the noise, how many of them are assumed to be honest.
"""


def waiting(entries: Iterable[Mapping[str, Any]]) -> list[audit.Noted]:
    """Notes that did not fit and that nobody reconciled yet."""
    found: list[audit.Noted] = []
    for one in entries:
        if one["event"] == "suspended":
            found.append(audit.Noted(int(one["length"]), str(one["head"]), "an earlier check"))
        elif one["event"] == "reconciled":
            found = []
    return found


def settled(entries: Iterable[Mapping[str, Any]]) -> set[tuple[int, str]]:
    """Marks that did not fit and were reconciled."""
    lines = [one for one in entries if one["event"] == "reconciled"]
    marks = [hash_chain.Mark.parse(text) for one in lines for text in one["marks"]]
    return {(one.length, one.head) for one in marks}


def current_key(entries: Iterable[Mapping[str, Any]]) -> str:
    """Id of the key that records are hashed with."""
    return [str(one["key"]) for one in entries if one["event"] in ("opened", "rekeyed")][-1]


def counts(entry: Mapping[str, Any]) -> bool:
    """Whether a line says that something left, or may have."""
    return entry["event"] in ("charged", "adopted")


def floor(entries: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """(epsilon, delta) that counts for every record on top: what was lost and cannot be known any more."""
    found = [(float(one["epsilon"]), float(one["delta"])) for one in entries if one["event"] == "floor"]
    return sum(epsilon for epsilon, _ in found), sum(delta for _, delta in found)


def require(event: str, fields: Mapping[str, Any]) -> None:
    """Check a line before it is written.

    Raises:
        ValueError: for an event or field that is not in the tables.
    """
    needed, free = EVENTS.get(event, (frozenset(), frozenset()))
    wrong = [name for name, value in fields.items() if name not in needed | free or not FORMS[name](value)]
    if event not in EVENTS or wrong or needed - set(fields):
        raise ValueError(f"no line of a ledger: {event} {sorted(fields)}, wrong: {wrong}")
