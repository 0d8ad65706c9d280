"""One round's admitted updates become one adapter, by the recipe's rule."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import threadpoolctl

from fedvfm import state
from fedvfm.server import handshake
from fedvfm.server.aggregators import base, svd


@dataclass(frozen=True)
class Joined:
    """What a round's updates came to.

    Attributes:
        adapter: the aggregate.
        kept: the rule's own state for the next round.
        record: what the journal states of it.
    """

    adapter: state.AdapterState
    kept: dict[str, state.Array]
    record: dict[str, Any] = field(default_factory=dict)


def join(
    rule: base.Aggregator,
    updates: Mapping[str, state.SiteUpdate],
    members: Mapping[str, handshake.Member],
    weighting: str,
    manifest: state.Manifest,
    kept: Mapping[str, state.Array],
) -> Joined:
    """The aggregate of these updates, by site in sorted order.

    Args:
        rule: the recipe's.
        updates: admitted.
        members: the sites, with their own manifests.
        weighting: the recipe's.
        manifest: of the global adapter.
        kept: what the rule left in the round before.
    """
    weights = {name: _weight(update, weighting) for name, update in updates.items()}
    total = sum(weights.values())
    contributions = [
        base.Contribution(weights[name], update.state, members[name].manifest) for name, update in updates.items()
    ]
    with _blas().limit(limits=1, user_api="blas"):
        aggregate, left = folded(rule, contributions, manifest, kept)
        error = svd.factor_error(contributions)
        # Factors of different ranks have no mean; what the rule itself loses can still be told.
        mixed = len({one.manifest.fingerprint for one in contributions}) > 1
        lost = svd.aggregate_error(contributions, aggregate, manifest) if mixed else None
    record = {
        "examples": {name: update.num_examples for name, update in updates.items()},
        "weights": {name: weight / total for name, weight in weights.items()},
        "train": {name: dict(update.metrics) for name, update in updates.items()},
        "factor_error": error,
        "aggregate_error": lost,
    }
    return Joined(aggregate, left, record)


def folded(
    rule: base.Aggregator,
    contributions: list[base.Contribution],
    manifest: state.Manifest,
    kept: Mapping[str, state.Array],
) -> tuple[state.AdapterState, dict[str, state.Array]]:
    """The rule from its empty accumulator to its end."""
    acc = rule.init(manifest, kept)
    for contribution in contributions:
        acc = rule.fold(acc, contribution)
    return rule.finish(acc)


def _weight(update: state.SiteUpdate, weighting: str) -> float:
    """The site's unnormalised weight; admission has bounded the number it rests on."""
    if weighting == "loss":
        return update.metrics["loss"]
    return float(update.num_examples) if weighting == "examples" else 1.0


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    """Handle on NumPy's BLAS. One thread: small products are faster so, and the same bits on any number of cores."""
    return threadpoolctl.ThreadpoolController()
