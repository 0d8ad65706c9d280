"""Admission: every reply is checked before it may touch the aggregate. Validate, then combine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.state import factors, state

LEAST_LOSS, MOST_LOSS = 1e-6, 10.0


@dataclass(frozen=True, slots=True)
class Terms:
    """What an update of one site must satisfy in one round.

    Attributes:
        site: the name the handshake gave this node.
        round: the round it was asked for.
        base: the adapter the site was sent (in the site's own ranks).
        manifest: every array of its adapter; it must answer with exactly those that train in this round.
        bounds: the recipe's bounds.
        weighting: the recipe's; where the loss is a weight it must be a number that can be one.
        way: the recipe's ``adapter.factors``: what of a pair trains in a round.
    """

    site: str
    round: int
    base: state.AdapterState
    manifest: state.Manifest
    bounds: schema.AdmissionConfig
    weighting: str = "examples"
    way: str = factors.BOTH


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
    loss = update.metrics.get("loss", 0.0)
    if terms.weighting == "loss" and not LEAST_LOSS <= loss <= MOST_LOSS:
        raise errors.Refused(
            "loss", f"claims a loss of {loss:.4g}; as a weight it must lie in {LEAST_LOSS:g} to {MOST_LOSS:g}"
        )
    _check_arrays(update.state, terms)
    if not update.state.finite():
        raise errors.Refused("not-finite", "an array holds NaN or infinity")
    whole = factors.completed(update.state, terms.base)
    with np.errstate(over="ignore"):  # a difference beyond float32 is infinite, and over any bound
        norm = (whole - terms.base).norm()
    if not norm <= terms.bounds.max_update_norm:
        raise errors.Refused("norm", f"update norm {norm:.4g} is over the bound {terms.bounds.max_update_norm:.4g}")
    return update if whole is update.state else replace(update, state=whole)


def _check_arrays(adapter: state.AdapterState, terms: Terms) -> None:
    expected = set(factors.trained(terms.manifest, terms.way, terms.round))
    if set(adapter) != expected:
        missing, idle = len(expected - set(adapter)), len((set(adapter) - expected) & set(terms.base))
        told = f"{missing} arrays missing, {len(set(adapter) - expected) - idle} not in the manifest"
        raise errors.Refused("manifest", told + (f", {idle} that do not train in this round" if idle else ""))
    for name, shape in {spec.name: spec.shape for spec in terms.manifest if spec.name in expected}.items():
        if adapter[name].shape != shape:
            raise errors.Refused(
                "manifest", f"array '{name}' has shape {adapter[name].shape}, the manifest says {shape}"
            )
