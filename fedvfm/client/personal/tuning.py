"""Personal adapters: a site trains on from the federation's final adapter, for itself, and chooses what it then uses.

Nothing of it travels. Whoever takes part ends with the better of two worlds or a mix of them: what all sites learned,
and what its own scanner and patients look like. Candidates are the global adapter, the personal one and points on the
straight line between their weights, which are good models too where one was trained from the other; and, where the site
has it, the adapter that it trained alone. :mod:`fedvfm.client.personal.choice` chooses by validation patients.

Source: Yu, Bagdasaryan and Shmatikov, "Salvaging Federated Learning by Local Adaptation", arXiv:2002.04758, 2020
(train on); Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022 (mixes of weights).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedvfm.client.personal import choice as choices
from fedvfm.client.training import evaluator, trainer
from fedvfm.client.training import site as sites
from fedvfm.config import privacy, schema
from fedvfm.model import adapted_model
from fedvfm.protocol import protocol
from fedvfm.report import progress
from fedvfm.state import state

SHARES = (0.25, 0.5, 0.75)
"""Of the personal adapter in the mixes that are candidates beside the two ends."""


def rounds_of(recipe: schema.Recipe, settings: schema.PersonalConfig) -> int:
    """How many local rounds a site trains on: as stated, else as many as the recipe has."""
    return settings.rounds or recipe.rounds


def recipe_of(recipe: schema.Recipe, settings: schema.PersonalConfig) -> schema.Recipe:
    """The recipe of training on: the same but for the learning rate's height and course, and without a mechanism.

    What never leaves a site needs no noise; so what is trained here must not be given away as if it had been noised.
    """
    own = recipe.optimiser
    head = None if own.head_learning_rate is None else own.head_learning_rate * settings.learning_rate
    optimiser = own.model_copy(
        update={
            "learning_rate": own.learning_rate * settings.learning_rate,
            "head_learning_rate": head,
            "schedule": "cosine",
            "warmup": 0.0,
        }
    )
    changes = {"optimiser": optimiser, "rounds": rounds_of(recipe, settings), "privacy": privacy.NONE}
    return recipe.model_copy(update=changes)


def mix(shared: state.AdapterState, personal: state.AdapterState, share: float) -> state.AdapterState:
    """The point on the line from the global adapter (``share`` 0) to the personal one (1); both ends are themselves."""
    if share in (0.0, 1.0):
        return personal if share else shared
    return shared * (1.0 - share) + personal * share


@dataclass(frozen=True)
class Trained:
    """The personal adapter; and of each local round loss, seconds and steps, and the fingerprint of its adapter."""

    adapter: state.AdapterState
    rounds: tuple[tuple[Mapping[str, float], str], ...]


def train(
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    shared: state.AdapterState,
    settings: schema.PersonalConfig,
    after: int,
    deadline: float = math.inf,
    on_step: progress.Step = progress.no_step,
) -> Trained:
    """Train on from the final adapter at one site.

    Args:
        model: of the federation's recipe, in the site's rank.
        site: whose training samples are used.
        shared: the final adapter, in the site's rank.
        settings: for how long, and how fast.
        after: rounds of the federation; order and views go on from there.
        deadline: a time of the monotonic clock.
        on_step: told after each step, of all of them.

    Raises:
        DataError: if the site has no training sample.
        DeadlinePassed: if the time is over before the last step.
        TrainingError: if a loss is not finite, or the adapter did not move.
    """
    own = model.under(recipe_of(model.recipe, settings))
    adapter, lines = shared, []
    for number in range(1, own.recipe.rounds + 1):

        def step(done: int, total: int, before: int = number - 1) -> None:
            on_step(before * total + done, own.recipe.rounds * total)

        update = trainer.train(own, site, adapter, after + number, deadline, step, since=after)
        # With factors that train in turn an update holds those of its round alone.
        adapter = state.AdapterState({**adapter, **update.state})
        lines.append((update.metrics, adapter.fingerprint))
    return Trained(adapter, tuple(lines))


def alone(model: adapted_model.AdaptedModel, site: sites.Site, deadline: float = math.inf) -> state.AdapterState:
    """What the site would have without the federation: as many rounds from first values of the seed, at home alone.

    Those are not the recipe's ``start``, which a federation made: rounds of an earlier recipe are not made up for.

    Raises:
        As :func:`train`.
    """
    own = model.under(model.recipe.model_copy(update={"privacy": privacy.NONE}))
    adapter = own.initial()
    for number in range(1, own.recipe.rounds + 1):
        update = trainer.train(own, site, adapter, number, deadline)
        adapter = state.AdapterState({**adapter, **update.state})
    return adapter


def candidates(
    shared: state.AdapterState,
    personal: state.AdapterState,
    alone: state.AdapterState | None = None,
    partial: state.AdapterState | None = None,
    *,
    beside: bool = False,
) -> dict[str, state.AdapterState]:
    """What a site chooses among, by name.

    Args:
        shared: the global adapter, as it came.
        personal: trained on, from the global adapter or from ``partial``.
        alone: what the site trained by itself, where it did.
        partial: the global adapter with what the site keeps for itself, where the recipe has such a kind.
        beside: whether that was trained beside the shared adapter, which is a model by itself then: mixes are with it,
            and with ``partial`` else.
    """
    offered = {choices.GLOBAL: shared}
    if partial is not None and partial != shared:
        offered[choices.PARTIAL] = partial
    start = shared if partial is None or beside else partial
    offered |= {choices.mix_name(share): mix(start, personal, share) for share in SHARES}
    offered[choices.PERSONAL] = personal
    return offered if alone is None else {**offered, choices.ALONE: alone}


@dataclass(frozen=True)
class Chosen:
    """The adapter that a site uses, and why."""

    adapter: state.AdapterState
    choice: choices.Choice


def choose(
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    offered: Mapping[str, state.AdapterState],
    deadline: float = math.inf,
    on_step: progress.Step = progress.no_step,
) -> Chosen:
    """Choose by the site's validation samples; see :func:`fedvfm.client.personal.choice.choose`.

    Raises:
        DataError: if a sample cannot be read.
        DeadlinePassed: if the time is over before the last sample.
    """
    units = {sample.unit: sample.patient or sample.unit for sample in site.split("val")}
    seen = {}
    for name, adapter in offered.items():
        scored = evaluate(model, site, adapter, "val", deadline, on_step)
        seen[name] = choices.cases(scored.ids, scored.samples, model.task.primary, units)
    choice = choices.choose(seen)
    return Chosen(offered[choice.name], choice)


def evaluate(
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    adapter: state.AdapterState,
    split: str,
    deadline: float = math.inf,
    on_step: progress.Step = progress.no_step,
) -> protocol.Evaluation:
    """Score an adapter at the site, sample by sample; surface metrics as the recipe says, in the test alone."""
    surface = split == "test" and model.recipe.evaluation.surface
    task = protocol.Task(model.recipe, 0, adapter, split, surface, per_sample=True)
    return evaluator.evaluate(model, site, adapter, task, deadline, on_step)
