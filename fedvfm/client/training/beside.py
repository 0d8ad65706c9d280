"""What a site trains for itself beside the shared adapter, after it in every round: kinds ``ditto`` and ``dual``.

The update that leaves is finished before, and nothing of it depends on what is trained here; see
:mod:`fedvfm.state.groups`. It is trained without a mechanism, because it never leaves.
"""

from __future__ import annotations

import logging
import math

from fedvfm import errors
from fedvfm.client.training import site as sites
from fedvfm.client.training import trainer
from fedvfm.config import privacy, schema
from fedvfm.model import adapted_model
from fedvfm.report import progress
from fedvfm.state import groups, state

LOG = logging.getLogger(__name__)


def recipe_of(recipe: schema.Recipe) -> schema.Recipe:
    """The recipe of these steps: those of the shared adapter, without mechanism and correction, with Ditto's pull."""
    pull = recipe.personal.proximal if recipe.personal.kind == groups.DITTO else 0.0
    optimiser = recipe.optimiser.model_copy(update={"proximal": pull, "control_variates": False})
    return recipe.model_copy(update={"optimiser": optimiser, "privacy": privacy.NONE})


def train(
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    shared: state.AdapterState,
    own: state.AdapterState,
    round_number: int,
    deadline: float = math.inf,
    on_step: progress.Step = progress.no_step,
) -> state.AdapterState:
    """As many steps as the shared adapter was trained with.

    Training that fails keeps what the site had, and its people read of it in its log: the update is finished, and under
    a mechanism no answer may tell of a failure, which depends on the images.

    Args:
        model: of the recipe, in the site's rank; left as trained.
        site: whose training samples are used.
        shared: the global adapter that the round began with.
        own: the same as this site uses it; see :meth:`fedvfm.client.training.site.Site.beside`.
        round_number: decides order, views and the place in the schedule.
        deadline: a time of the monotonic clock.
        on_step: told after each step.

    Returns:
        The arrays that this site keeps (:func:`fedvfm.state.groups.kept`).

    Raises:
        DeadlinePassed: if it is over before the last step.
    """
    kind, names = model.recipe.personal.kind, groups.kept(model.manifest, model.recipe.personal.kind)
    steps = model.under(recipe_of(model.recipe))
    steps.alone = names if kind == groups.DUAL else frozenset()
    towards = shared if kind == groups.DITTO else None
    try:
        trained = trainer.train(steps, site, own, round_number, deadline, on_step, towards=towards).state
    except errors.TrainingError as error:
        LOG.warning(f"round {round_number}: what stays here is as it was: {error}")
        trained = state.AdapterState({})
    return state.AdapterState({**own, **trained}).select(sorted(names))
