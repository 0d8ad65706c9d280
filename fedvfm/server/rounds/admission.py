"""Admission: every reply is checked before it may touch the aggregate. Validate, then combine."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.state import factors, groups, state

LEAST_LOSS, MOST_LOSS = 1e-6, 10.0


@dataclass(frozen=True, slots=True)
class Terms:
    """What an update of one site must satisfy in one round.

    Attributes:
        site: the name the handshake gave this node.
        round: the round it was asked for.
        base: the adapter the site was sent (in the site's own ranks).
        manifest: every array of its adapter; it must answer with exactly those that train in this round and are shared.
        bounds: the recipe's bounds.
        weighting: the recipe's; where the loss is a weight it must be a number that can be one.
        way: the recipe's ``adapter.factors``: what of a pair trains in a round.
        personal: the recipe's ``personal.kind``: what stays at the site.
        greeted: training examples that the site greeted with; None where that is not known.
        usual: the median norm of the updates admitted in earlier rounds; 0 where there are none.
        all_steps: whether every step of the round must have been taken, as control variates need.
    """

    site: str
    round: int
    base: state.AdapterState
    manifest: state.Manifest
    bounds: schema.AdmissionConfig
    weighting: str = "examples"
    way: str = factors.BOTH
    personal: str = groups.NONE
    greeted: int | None = None
    usual: float = 0.0
    all_steps: bool = False

    @property
    def most(self) -> float:
        """The largest norm that is admitted."""
        usual = self.bounds.norm_multiple * self.usual
        return min(self.bounds.max_update_norm, usual) if self.usual else self.bounds.max_update_norm


def admit(update: state.SiteUpdate, terms: Terms) -> state.SiteUpdate:
    """Return the update if it keeps every term, as a whole adapter: what did not train is what the site was sent.

    Raises:
        Refused: with a reason: ``site-name``, ``stale``, ``base``, ``examples``, ``loss``, ``manifest``,
        ``not-finite``, ``norm``.
    """
    if update.site != terms.site:
        raise errors.Refused("site-name", f"the node of site '{terms.site}' answered under another name")
    if update.base_round != terms.round - 1:
        raise errors.Refused("stale", f"answers round {update.base_round + 1}, round {terms.round} was asked for")
    if update.base_fingerprint != terms.base.fingerprint:
        raise errors.Refused("base", "training started from another adapter than the one sent")
    if not 1 <= update.num_examples <= terms.bounds.max_examples:
        raise errors.Refused(
            "examples", f"claims {update.num_examples} examples; allowed: 1 to {terms.bounds.max_examples}"
        )
    if terms.greeted is not None and update.num_examples > terms.greeted:  # fewer only takes weight away
        raise errors.Refused("examples", f"claims {update.num_examples} examples and greeted with {terms.greeted}")
    if terms.all_steps and update.num_examples != terms.greeted:  # the fewer steps, the longer their mean gradient
        raise errors.Refused(
            "examples",
            f"claims {update.num_examples} examples and greeted with {terms.greeted}; control variates need all",
        )
    loss = update.metrics.get("loss", 0.0)
    if terms.weighting == "loss" and not LEAST_LOSS <= loss <= MOST_LOSS:
        raise errors.Refused(
            "loss", f"claims a loss of {loss:.4g}; as a weight it must lie in {LEAST_LOSS:g} to {MOST_LOSS:g}"
        )
    _check_arrays(update.state, terms)
    if not update.state.finite():
        raise errors.Refused("not-finite", "an array holds NaN or infinity")
    whole = factors.completed(update.state, terms.base)
    norm = norm_of(whole, terms.base)
    if not norm <= terms.most:
        raise errors.Refused("norm", f"update norm {norm:.4g} is over the bound {terms.most:.4g}")
    return update if whole is update.state else replace(update, state=whole)


def norm_of(update: state.AdapterState, base: state.AdapterState) -> float:
    """How far a whole adapter is from the one it started from; beyond float32 infinite, and over any bound."""
    with np.errstate(over="ignore"):
        return (update - base).norm()


def usual(rounds: Iterable[Mapping[str, Any]]) -> float:
    """The median of the norms that these lines of the journal hold; 0 where they hold none.

    Those of sites without labels do not count: where the adapter was sure of nothing, theirs are 0.
    """
    norms = [
        norm
        for line in rounds
        for site, norm in line.get("norms", {}).items()
        if site not in line.get("without_labels", ())
    ]
    return statistics.median(norms) if norms else 0.0


def _check_arrays(adapter: state.AdapterState, terms: Terms) -> None:
    expected = set(factors.trained(terms.manifest, terms.way, terms.round))
    expected -= groups.personal(terms.manifest, terms.personal)
    if set(adapter) != expected:
        missing, idle = len(expected - set(adapter)), len((set(adapter) - expected) & set(terms.base))
        told = f"{missing} arrays missing, {len(set(adapter) - expected) - idle} not in the manifest"
        raise errors.Refused("manifest", told + (f", {idle} that must not leave in this round" if idle else ""))
    for name, shape in {spec.name: spec.shape for spec in terms.manifest if spec.name in expected}.items():
        if adapter[name].shape != shape:
            raise errors.Refused(
                "manifest", f"array '{name}' has shape {adapter[name].shape}, the manifest says {shape}"
            )
