"""A private round at a site: which units a step draws, and what their images' losses are.

Sums, clips and noise are the mechanism's (:mod:`fedvfm.privacy`); images, views and losses are the site's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedvfm import errors, seeding
from fedvfm.client.training import proximal
from fedvfm.client.training import site as sites
from fedvfm.data import prompts as simulator
from fedvfm.data import sample as samples
from fedvfm.data import transforms
from fedvfm.model import adapted_model
from fedvfm.privacy import base, events, randomness
from fedvfm.privacy import table as mechanisms

Unit = tuple[samples.Sample, ...]


def draws_of(site: sites.Site, seed: int, round_number: int) -> randomness.Draws:
    """The operating system's entropy; of a virtual hospital the run's seed, so that engines agree."""
    if site.simulated:
        return randomness.Seeded(seed, "privacy", round_number, site.name)
    return randomness.System()


def units_of(model: adapted_model.AdaptedModel, site: sites.Site) -> list[Unit]:
    """What a step draws from: the training samples of each record or patient, in the order of the units' names.

    Raises:
        DataError: if there is none.
    """
    unit = mechanisms.get(model.recipe.privacy).unit
    source = getattr(site.hospital, "source", None)
    found = list(events.members(unit, site.split("train"), source).values())
    if not found:
        raise errors.DataError(f"site '{site.name}' has no training sample")
    return found


class Steps:
    """The steps of one round.

    Args:
        steps: of the mechanism.
        model: the adapted model.
        site: whose images.
        optimiser: takes the private gradient.
        units: that are drawn from.
        first: number of steps before this round.
        count: of steps in the round.
        full: draw a whole batch each time, for a trial of how long it takes; nothing private comes of it.
    """

    def __init__(
        self,
        steps: base.Steps,
        model: adapted_model.AdaptedModel,
        site: sites.Site,
        optimiser: torch.optim.Optimizer,
        units: Sequence[Unit],
        *,
        first: int,
        count: int,
        full: bool = False,
    ) -> None:
        self._steps, self._model, self._site, self._optimiser = steps, model, site, optimiser
        self._units, self._first, self.count, self._full = list(units), first, count, full
        self._taken = 0
        self._near = proximal.Proximal(optimiser, model.recipe.optimiser.proximal)

    def take(self) -> float:
        """One step; no loss is told."""
        batch = min(self._model.recipe.optimiser.batch_size, len(self._units))
        drawn = list(range(batch)) if self._full else self._steps.draw(len(self._units))
        chosen = [[self._units[one][image] for image in self._steps.choose(len(self._units[one]))] for one in drawn]
        number = self._first + self._taken
        self._steps.gradient(chosen, lambda some: losses(self._model, self._site, some, number, self.count))
        self._near.pull()  # after the noise, of private parameters alone: post-processing
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self._taken += 1
        return math.nan


@contextlib.contextmanager
def opened(
    part: base.SitePart,
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    optimiser: torch.optim.Optimizer,
    round_number: int,
    *,
    full: bool = False,
) -> Iterator[Steps]:
    """The private steps of a round.

    Raises:
        ConfigError: if this model cannot be trained so.
        DataError: if there is nothing to train on.
        TrainingError: if no gradient reaches what trains.
    """
    recipe, units = model.recipe, units_of(model, site)
    event = events.event_of(recipe, site.units or len(units))
    if event is None:
        raise errors.ConfigError("recipe", [f"mechanism '{recipe.privacy.mechanism}' spends nothing at a site"])
    draws = draws_of(site, recipe.seed, round_number)
    # Dropout's masks are part of the release. From the run's seed they would depend, for all who know it, on who else
    # is in the batch.
    torch.manual_seed(int(draws.uniform(1)[0] * 2**53))
    first = (round_number - 1) * event.steps
    work = base.Work(
        model,
        [group["params"] for group in optimiser.param_groups],
        f"site '{site.name}', round {round_number}",
        made(model),
        lambda examples: losses_of(model, examples, consistent=site.without_labels),
    )
    with part.prepare(work, recipe, event, draws) as steps:
        yield Steps(steps, model, site, optimiser, units, first=first, count=event.steps, full=full)


def losses(
    model: adapted_model.AdaptedModel, site: sites.Site, some: Sequence[samples.Sample], step: int, count: int
) -> Tensor:
    """One loss each, of that image alone, in the view of this step; views change with every expected pass.

    Shapes: (n,).
    """
    views, epochs = model.recipe.data.views, model.recipe.optimiser.local_epochs
    passed = step * epochs // count
    view, words = (passed % views, ("epoch", passed)) if views else (-1, ("step", step))
    shown = [site.example(model, one, view, words) for one in some]
    return losses_of(model, shown, consistent=site.without_labels)


def losses_of(
    model: adapted_model.AdaptedModel, examples: Sequence[sites.Example], *, consistent: bool = False
) -> Tensor:
    """One loss each, of that example alone; ``consistent`` that of pseudo-labels. Shapes: (n,)."""
    logits = model(*sites.collate(examples, model))
    if consistent:
        return model.task.consistency(logits, sites.targets(examples, model))
    return model.task.losses(logits, sites.targets(examples, model), *sites.labelled(examples, model))


def made(model: adapted_model.AdaptedModel) -> list[sites.Example]:
    """Two images of no site, with targets, the same everywhere: what is found out with them tells of nobody."""
    contract, settings = model.recipe.data, model.recipe.task
    classes, found = len(contract.class_names), []
    if model.task.bags:
        return [_made_case(model, number) for number in range(2)]
    for number in range(2):
        rng = seeding.stream(0, "made image", number)
        image = _made_image(rng, contract.patch_size)
        mask = transforms.resize_mask(rng.integers(0, classes, [8 for _ in contract.patch_size]), contract.patch_size)
        drawn = simulator.draw(mask, classes, settings, rng) if settings.oracle else None
        sample = samples.Sample(f"made {number}", **_made_facts(model, number))
        found.append(sites.Example(sample, transforms.Prepared(image, mask, None, None), None, drawn))
    return found


def _made_facts(model: adapted_model.AdaptedModel, number: int) -> dict[str, Any]:
    """Truth and row of a made sample: the ends of each column, of which the first sample lacks the last."""
    chosen = model.recipe.inputs
    row: list[float | None] = [bounds[number % 2] for bounds in chosen.ranges]
    row += [float(number % 2) for _ in chosen.categories]
    row = [*row[:-1], None] if number == 0 and len(row) > 1 else row
    return {**model.task.drawn_truth(number), "inputs": tuple(row)}


def _made_image(rng: np.random.Generator, size: Sequence[int]) -> transforms.Image:
    coarse, fine = rng.random((3, *[4 for _ in size])).astype(np.float32), rng.random((3, *size))
    return np.asarray(0.8 * transforms.resize(coarse, size) + 0.2 * fine, dtype=np.float32)


def _made_case(model: adapted_model.AdaptedModel, number: int) -> sites.Example:
    """A case of two or three images."""
    rng, places = seeding.stream(0, "made case", number), tuple(range(2 + number))
    sample = samples.Sample(f"made {number}", **_made_facts(model, number))
    pictures = [transforms.Prepared(_made_image(rng, model.recipe.data.input_size), None, None, None) for _ in places]
    images = tuple(sites.Example(sample, picture, None) for picture in pictures)
    if not model.frozen_whole:
        return sites.Example(sample, sites.NO_IMAGE, None, images=images, places=places)
    with torch.no_grad():
        pixels = sites.collate(images, model)[0]
        vectors = model.vectors(pixels).cpu()
    return sites.Example(sample, sites.NO_IMAGE, None, vectors=vectors, places=places)
