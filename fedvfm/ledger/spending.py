"""What the lines of a ledger come to, record by record. A record has spent all releases that could have drawn it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedvfm.config import privacy
from fedvfm.ledger import entries as lines
from fedvfm.privacy import accountant, records

Entry = Mapping[str, Any]
Find = Callable[[str], records.Hashes | None]


@dataclass(frozen=True)
class Spending:
    """What was spent.

    Attributes:
        rows: curve and set of each release; None stands for every record.
        floor: (epsilon, delta) that counts for every record on top: what was lost and cannot be known any more.
    """

    rows: tuple[tuple[accountant.Curve, str | None], ...]
    floor: tuple[float, float] = (0.0, 0.0)

    def worst(self, find: Find, among: records.Hashes | None = None) -> list[accountant.Curve]:
        """What records have spent, of those that no other record has spent all of and more.

        Args:
            find: a set by its name.
            among: only these records; None for all there are.
        """
        sets = {name: find(name) for _, name in self.rows if name is not None}
        every = [one for one, name in self.rows if name is None or sets[name] is None]
        known = {name: hashes for name, hashes in sets.items() if hashes is not None}
        held: dict[bytes, set[str]] = {}
        for name, hashes in known.items():
            for one in hashes if among is None else hashes & among:
                held.setdefault(one, set()).add(name)
        groups = {frozenset(names) for names in held.values()} or {frozenset()}
        largest = [one for one in groups if not any(one < other for other in groups)]
        return [
            accountant.joined([*every, *(curve for curve, name in self.rows if name in group)]) for group in largest
        ]


def read(entries: Iterable[Entry], alive: Callable[[str], bool], key: str) -> Spending:
    """The spending of a ledger.

    Args:
        entries: its lines.
        alive: whether the process that made a reservation still trains.
        key: id of the key that records are hashed with now; what was hashed with another counts for every record.
    """
    listed = list(entries)
    # Of a whole site there is one, whatever it was called when it was charged.
    alone = any(one["event"] == "opened" and one["unit"] == "site" for one in listed)
    closed = {str(one["token"]) for one in listed if one["event"] in ("charged", "released") and "token" in one}
    rows: list[tuple[accountant.Curve, str | None]] = []
    for one in listed:
        if _counts(one, closed, alive):
            known = not alone and "records" in one and one.get("key") == key
            rows.append((curve(one), str(one["records"]) if known else None))
    return Spending(tuple(rows), lines.floor(listed))


def curve(entry: Entry) -> accountant.Curve:
    """What one line adds."""
    shared = "honest" in entry or entry.get("mechanism") in privacy.SHARED
    return accountant.steps(float(entry["sample_rate"]), float(entry["noise_multiplier"]), int(entry["steps"]), shared)


def _counts(entry: Entry, closed: set[str], alive: Callable[[str], bool]) -> bool:
    if entry["event"] == "reserved":
        return str(entry["token"]) not in closed and alive(str(entry["token"]))
    return lines.counts(entry)


def epsilon(spending: Spending, curves: Iterable[accountant.Curve], delta: float, kind: str) -> accountant.Epsilon:
    """The largest epsilon of these curves at ``delta``, the floor added by basic composition."""
    base, used = spending.floor
    left = delta - used
    if used and left <= 0:
        return accountant.Epsilon(float("inf"), delta, kind)
    found = [accountant.epsilon(one, left, kind) for one in curves]
    worst = max(found, key=lambda one: one.value, default=accountant.Epsilon(0.0, left, kind))
    return accountant.Epsilon(base + worst.value, delta, worst.accountant, worst.order)
