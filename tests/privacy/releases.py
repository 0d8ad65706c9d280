"""Budgets, and releases that are charged to them."""

from __future__ import annotations

import hashlib
from typing import Any

from fedvfm.config import privacy
from fedvfm.ledger import ledger
from fedvfm.privacy import accountant, base

RECIPE = "ab" * 32
AFTER = (0.0, 4.0245, 5.2822, 6.3034, 7.1998)
"""Epsilon after so many claims."""


def budget(**values: Any) -> privacy.Budget:
    return privacy.Budget(**{"data_set": "nuclei", "epsilon": 8.0, "delta": 1e-5, "unit": "record", **values})


def claim(round_number: int = 1, first: int = 0, last: int = 40, rounds: int = 1, **event: Any) -> ledger.Claim:
    """A release of records ``first`` to ``last``."""
    given = {"mechanism": "record-level", "unit": "record", "noise_multiplier": 1.1, "sample_rate": 0.1, "steps": 30}
    made = base.PrivacyEvent(**{**given, "clip": 1.0, **event})
    names = [f"sample {number}" for number in range(first, last)]
    return ledger.Claim(RECIPE, round_number, sha(f"base {round_number}"), made, names, rounds)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def epsilon(book: ledger.Ledger) -> float:
    """Of the worst record, as it is now."""
    spent = book.spending(book.entries).worst(book.records.find)
    return max(accountant.epsilon(one, 1e-5).value for one in spent)
