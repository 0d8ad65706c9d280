"""SCAFFOLD: each site's steps are moved by how its own mean gradient differs from that of all sites. No torch.

A site takes ``y <- y - rate (g(y) - c_i + c)``, and after a round ``c_i <- c_i - c + (x - y) / (sum of its rates)``:
the mean of the gradients of its steps. The coordinator has x and y of every admitted update, and the rates follow from
the recipe and the number of images, so it keeps every ``c_i``, makes ``c`` their mean, and sends each site ``c - c_i``,
its *correction*. Nothing more goes up than without it, a site keeps nothing, and ``c`` is the mean of the ``c_i``
whatever was refused, lost or withdrawn: an offset between the two would pull all sites to a wrong place for good.

That holds where a step is the rate times the gradient: plain SGD without momentum, every step of the round taken. So
an update of other images than the site greeted with is refused. A gradient is clipped before it is corrected, so no
``c_i`` is longer than a clipped gradient with its weight decay; what a site sends that took other steps is cut to that.

Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, alg. 1,
    option II, with c the mean over all sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fedvfm import errors
from fedvfm.config import privacy, rates, schema
from fedvfm.state import factors, groups, state


def used(recipe: schema.Recipe) -> bool:
    """Whether a recipe's steps are corrected."""
    return recipe.optimiser.control_variates


def faults(recipe: schema.Recipe) -> list[str]:
    """With what of a recipe a mean gradient cannot be told from an update, one sentence a fault."""
    if not used(recipe):
        return []
    own, joined, key = recipe.optimiser, recipe.aggregation, "recipe.optimiser.control_variates"
    rows = [
        (own.name != "sgd", f"recipe.optimiser.name = '{own.name}'", "its steps are no gradients", 'name = "sgd"'),
        (own.proximal > 0, f"recipe.optimiser.proximal = {own.proximal:g}", "it pulls the same steps", "proximal = 0"),
        (
            own.round_minutes > 0,
            f"recipe.optimiser.round_minutes = {own.round_minutes:g}",
            "how many steps were taken would be a site's word",
            "round_minutes = 0 and fewer local_epochs",
        ),
        (
            joined.rule != "mean",
            f"recipe.aggregation.rule = '{joined.rule}'",
            "the corrections cancel out in a plain mean alone",
            'rule = "mean"',
        ),
        (
            joined.weighting != "uniform",
            f"recipe.aggregation.weighting = '{joined.weighting}'",
            "every site's gradient counts the same in the correction",
            'weighting = "uniform"',
        ),
        (
            recipe.adapter.factors == factors.ALTERNATE,
            "recipe.adapter.factors = 'alternate'",
            "a correction would be of a round in which another factor trained",
            'factors = "both" or "freeze-A"',
        ),
        (recipe.codec != "fp32", f"recipe.codec = '{recipe.codec}'", "an update is rounded", 'codec = "fp32"'),
        (
            recipe.privacy.mechanism != privacy.NO_MECHANISM,
            f"recipe.privacy.mechanism = '{recipe.privacy.mechanism}'",
            "every step would be corrected by noise",
            "no mechanism, or no control variates",
        ),
        (
            recipe.secure_aggregation is not None,
            "recipe.secure_aggregation",
            "the coordinator sees no single update",
            "no secure aggregation, or no control variates",
        ),
    ]
    return [f"{key}: {what}: {why}; use {remedy}" for wrong, what, why, remedy in rows if wrong]


def first(manifest: state.Manifest, recipe: schema.Recipe, round_number: int) -> state.AdapterState | None:
    """What a site is sent where no round was before; None where nothing is corrected."""
    return nothing(manifest, recipe, round_number) if used(recipe) else None


def nothing(manifest: state.Manifest, recipe: schema.Recipe, round_number: int) -> state.AdapterState:
    """Zero for every array that leaves in a round."""
    shapes = {spec.name: spec.shape for spec in manifest}
    names = groups.leaving(manifest, recipe, round_number)
    return state.AdapterState({name: np.zeros(shapes[name], np.float32) for name in names})


def require(
    correction: state.AdapterState | None, manifest: state.Manifest, recipe: schema.Recipe, round_number: int
) -> None:
    """Check what came for a round at a site.

    Raises:
        ProtocolError: if the recipe wants a correction and none came, or the other way round, or it is of other arrays
            than leave in the round, or holds NaN or infinity.
    """
    if (correction is not None) != used(recipe):
        came = "without a correction of its steps" if correction is None else "with a correction of its steps"
        raise errors.ProtocolError(
            f"round {round_number} came {came}, and recipe.optimiser.control_variates = {str(used(recipe)).lower()}"
        )
    if correction is None:
        return
    wanted = {name: array.shape for name, array in nothing(manifest, recipe, round_number).items()}
    if {name: array.shape for name, array in correction.items()} != wanted or not correction.finite():
        raise errors.ProtocolError(
            f"round {round_number}: the correction is not of the {len(wanted)} arrays that leave, or not finite"
        )


def lengths(manifest: state.Manifest, recipe: schema.Recipe, round_number: int, images: int) -> dict[str, float]:
    """The sum of the learning rates of a site's steps in a round, for every array of the adapter.

    Args:
        manifest: of the adapter.
        recipe: its schedule and rates.
        round_number: from 1.
        images: that the site trains on.
    """
    own = recipe.optimiser
    total = rates.total(own, recipe.rounds, round_number, math.ceil(images / own.batch_size) * own.local_epochs)
    head = own.head_learning_rate or own.learning_rate
    return {spec.name: total * (head if spec.group in groups.HEAD_GROUPS else own.learning_rate) for spec in manifest}


def reach(correction: state.AdapterState, lengths: Mapping[str, float]) -> float:
    """How far a correction alone moves the weights in a round (L2 norm)."""
    with np.errstate(over="ignore"):
        squares = {name: float(np.square(array, dtype=np.float64).sum()) for name, array in correction.items()}
    return math.sqrt(math.fsum(lengths[name] ** 2 * square for name, square in squares.items()))


def gradient(
    start: state.AdapterState, after: state.AdapterState, correction: state.AdapterState, lengths: Mapping[str, float]
) -> dict[str, state.Array]:
    """A site's new control variate: the mean of its steps' gradients, without the correction.

    Args:
        start: x, the adapter that the round began with.
        after: y, what the site sent.
        correction: that it was sent.
        lengths: of the site in this round.
    """
    return {
        name: np.asarray((start[name] - after[name]) / np.float32(lengths[name]) - array, dtype=np.float32)
        for name, array in correction.items()
    }


def bounded(
    mean: Mapping[str, state.Array],
    start: state.AdapterState,
    after: state.AdapterState,
    settings: schema.OptimiserConfig,
) -> dict[str, state.Array]:
    """A control variate, no longer than the mean of clipped gradients and their weight decay can be; else shortened.

    Args:
        mean: the control variate.
        start: the adapter that the round began with.
        after: what the site sent.
        settings: the recipe's; without ``clip_norm`` nothing bounds a gradient.
    """
    if not settings.clip_norm:
        return dict(mean)
    there = list(mean)
    most = settings.clip_norm + settings.weight_decay * (start.select(there).norm() + after.select(there).norm())
    length = math.sqrt(math.fsum(float(np.square(array, dtype=np.float64).sum()) for array in mean.values()))
    factor = np.float32(min(1.0, most / length) if length else 1.0)
    return {name: array * factor for name, array in mean.items()}
