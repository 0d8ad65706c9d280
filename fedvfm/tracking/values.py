"""What a line of a journal, or a final test, says in numbers. Nothing that is not in them is made up.

A coordinator's journal holds of a site what that site's policy let out. What is under a site's name goes to a tracker
of a coordinator only where its people asked for that; a tracker may be another's machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedvfm.report import rounds

NOT_SCORES = ("num_examples",)
_PLAIN = ("seconds", "peak_mib", "factor_error", "aggregate_error", "effective_rank")
"""Numbers of a line that are told as they are."""


def of_line(line: Mapping[str, Any], *, sites: bool) -> dict[str, float]:
    """The numbers of a round.

    Args:
        line: of the journal.
        sites: whether those of single sites are among them.
    """
    values: dict[str, Any] = {f"round/{name}": line.get(name) for name in _PLAIN}
    values |= {f"round/bytes_{way}": line.get("bytes", {}).get(way) for way in ("up", "down")}
    values |= {"round/admitted": len(line["examples"]), "round/refused": len(line.get("refused", {}))}
    values |= {f"privacy/{name}": line.get("privacy", {}).get(name) for name in ("epsilon", "noise_multiplier")}
    hidden = line.get("secure_aggregation")
    values |= _scores("train", line.get("train", {}), sites=sites)
    values["train/loss"] = hidden.get("loss") if isinstance(hidden, Mapping) else rounds.mean_loss(line)
    values |= _scores("val", line.get("validation", {}), sites=sites)
    return finite(values)


def of_test(tested: Mapping[str, Any], *, sites: bool) -> dict[str, float]:
    """The numbers of a final test."""
    return finite(_scores("test", tested.get("last", {}).get("sites", {}), sites=sites))


def _scores(split: str, per_site: Mapping[str, Mapping[str, Any]], *, sites: bool) -> dict[str, Any]:
    names = sorted({name for row in per_site.values() for name in row} - set(NOT_SCORES))
    values: dict[str, Any] = {f"{split}/{name}": rounds.mean_of(per_site, name) for name in names}
    if sites:
        # No name is the beginning of another: MLflow's folders hold a file for each.
        values |= {
            f"site/{site}/{split}/{name}": row[name] for site, row in per_site.items() for name in names if name in row
        }
    return values


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """Those that are finite numbers."""
    kept = {name: value for name, value in values.items() if type(value) in (int, float) and math.isfinite(value)}
    return {name: float(value) for name, value in kept.items()}


def parameters(recipe: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """A recipe's keys, dotted, and their values as text."""
    flat: dict[str, str] = {}
    for key, value in recipe.items():
        flat |= parameters(value, f"{before}{key}.") if isinstance(value, Mapping) else {before + key: str(value)[:250]}
    return flat
