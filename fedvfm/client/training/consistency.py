"""Training without labels: what the round's adapter is sure of on an image is learned for its augmented views.

The teacher is the global adapter as it came, frozen for the round: the site keeps no average of its own, since the
coordinator's is one over all sites already. It sees each training image as it is; its answer is a pseudo-label where
its probability reaches the recipe's threshold, pixel by pixel in segmentation. The student begins as the teacher and
trains on the augmented views of the recipe, turned and cropped together with their pseudo-labels.

A pseudo-label depends on its own image and on the adapter that came, on nothing else of the site. So the loss of an
image is of that image alone, and a mechanism that clips image by image, or patient by patient, holds as it does with
labels.

Source: Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020,
    with the image itself as the weak view; the frozen global teacher as in Liang et al., "RSCFed: Random Sampling
    Consensus Federated Semi-supervised Learning", CVPR 2022, without their resampling.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedvfm import errors
from fedvfm.client.training import evaluator
from fedvfm.client.training import site as sites
from fedvfm.config import privacy, schema
from fedvfm.data import sample as samples
from fedvfm.data import transforms
from fedvfm.model import adapted_model, sliding_window
from fedvfm.state import state
from fedvfm.tasks import base


@dataclass(frozen=True)
class Taught:
    """A site with pseudo-labels in place of labels.

    Attributes:
        site: its training samples are those that are trained on: under a mechanism all, which are drawn from by a
            public chance; else those of which something is sure.
        enough: whether they are of as many patients, and make as many steps, as the site's policy wants of an update.
    """

    site: sites.Site
    enough: bool


def taught(
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    teacher: state.AdapterState,
    round_number: int,
    deadline: float = math.inf,
) -> Taught:
    """The site with what an adapter is sure of on its training images.

    Args:
        model: of the recipe; left with the teacher's weights.
        site: without labels.
        teacher: the adapter of the round, as it came.
        round_number: for messages.
        deadline: a time of the monotonic clock.

    Raises:
        ConfigError: if the recipe takes no site without labels.
        DeadlinePassed: if it is over before the last image.
    """
    recipe, settings = model.recipe, model.recipe.unlabelled
    if settings is None:
        raise errors.ConfigError("recipe", [f"site '{site.name}' has no labels, and recipe.unlabelled is left out"])
    private = recipe.privacy.mechanism != privacy.NO_MECHANISM
    everything = site.split("train")
    masks: dict[str, transforms.Mask] | None = {} if recipe.task.kind == "segmentation" else None
    chosen = []
    model.write(teacher)
    model.eval()
    for done, (sample, logits) in enumerate(_answers(model, site, everything, alone=private)):
        if time.monotonic() > deadline:
            raise errors.DeadlinePassed(
                f"site '{site.name}', round {round_number}: the coordinator's time was over after {done} of "
                f"{len(everything)} images were labelled by the adapter. Ask it to raise round_timeout_s, or train on "
                "a faster device"
            )
        answer = model.task.pseudo_label(logits, settings.threshold)
        if masks is not None:
            masks[sample.id] = answer
        if private or np.any(answer != base.UNSURE):
            chosen.append(sample if masks is not None else dataclasses.replace(sample, label=int(answer)))
    hospital = dataclasses.replace(site.hospital, train=tuple(chosen))
    own = dataclasses.replace(site, hospital=hospital, pseudo_masks=masks)
    return Taught(own, private or _enough(site, chosen, recipe))


def untaught(model: adapted_model.AdaptedModel, site: sites.Site) -> sites.Site:
    """A site without labels where nobody is sure of anything: for steps that are only timed."""
    own = tuple(dataclasses.replace(each, label=base.UNSURE) for each in site.split("train"))
    if model.recipe.task.kind == "segmentation":
        return dataclasses.replace(site, pseudo_masks={})
    return dataclasses.replace(site, hospital=dataclasses.replace(site.hospital, train=own))


def _enough(site: sites.Site, chosen: Sequence[samples.Sample], recipe: schema.Recipe) -> bool:
    """Whether an update of these samples is one that the site's policy lets out, and one at all."""
    steps = math.ceil(len(chosen) / recipe.optimiser.batch_size) * recipe.optimiser.local_epochs
    return bool(chosen) and len({each.subject for each in chosen}) >= site.least_units and steps >= site.least_steps


def _answers(
    model: adapted_model.AdaptedModel, site: sites.Site, everything: Sequence[samples.Sample], *, alone: bool
) -> Iterator[tuple[samples.Sample, torch.Tensor]]:
    """Each sample and its logits; ``alone`` where no other sample may lie beside it in a batch.

    Shapes: (K, h, w) at the size of the prepared image in segmentation, (K,) in classification.
    """
    if model.task.bags:
        yield from ((sample, evaluator.answer(model, site, sample)) for sample in everything)
        return
    batch = sliding_window.batch_of(model)
    size = 1 if alone else batch
    for start in range(0, len(everything), size):
        shown = everything[start : start + size]
        ready = [site.whole(model, sample) for sample in shown]
        yield from zip(shown, evaluator.many(model, site, shown, ready, batch), strict=True)
