"""Where the work of a message is computed: in this process, or elsewhere (:mod:`fedvfm.client.batch`).

What is computed is the same wherever it is: arrays of the site's own adapter in, all arrays of its manifest out. What
of them leaves, and how it is coded, is decided by whoever asked, beside the site's keys and policy.
"""

from __future__ import annotations

from typing import Protocol

from fedvfm import errors
from fedvfm.client.training import evaluator, trainer
from fedvfm.client.training import site as sites
from fedvfm.config import privacy, schema
from fedvfm.model import adapted_model, device_check
from fedvfm.protocol import protocol
from fedvfm.report import progress
from fedvfm.state import state


class Models(Protocol):
    """Where models are held."""

    def get(self, recipe: schema.Recipe, device: str) -> adapted_model.AdaptedModel:
        """The model of a recipe."""
        ...


class Compute(Protocol):
    """What computes for a site."""

    def shapes(self, site: sites.Site, recipe: schema.Recipe) -> adapted_model.AdaptedModel:
        """The model of a recipe at the site's rank; its weights need not be here."""
        ...

    def hello(self, site: sites.Site, task: protocol.Task) -> protocol.Hello:
        """What the site says of its model."""
        ...

    def train(self, site: sites.Site, task: protocol.Task, start: state.AdapterState, until: float) -> state.SiteUpdate:
        """Train from ``start`` till at most ``until``, by the monotonic clock."""
        ...

    def evaluate(
        self, site: sites.Site, task: protocol.Task, own: state.AdapterState, until: float
    ) -> protocol.Evaluation:
        """Score ``own`` on the split that is asked for; classes and patients are told too."""
        ...


def counts(site: sites.Site, recipe: schema.Recipe) -> dict[str, int]:
    """How many samples each split has, as a greeting says it."""
    sizes = {split: len(site.split(split)) for split in ("train", "val", "test")}
    private = recipe.privacy.mechanism != privacy.NO_MECHANISM
    if private or recipe.secure_aggregation is not None:  # whether there are any, not how many
        sizes["train"] = min(1, sizes["train"])
    return sizes


class Nowhere:
    """On no device: none of the site's computes. Each message is answered with the word of that.

    Args:
        fault: of the last device that was tried.
    """

    def __init__(self, fault: errors.FedvfmError) -> None:
        self._fault = str(fault)

    def shapes(self, site: sites.Site, recipe: schema.Recipe) -> adapted_model.AdaptedModel:
        """See above.

        Raises:
            DeviceError: always, as do the others.
        """
        raise errors.DeviceError(self._fault)

    def hello(self, site: sites.Site, task: protocol.Task) -> protocol.Hello:
        """See above."""
        raise errors.DeviceError(self._fault)

    def train(self, site: sites.Site, task: protocol.Task, start: state.AdapterState, until: float) -> state.SiteUpdate:
        """See above."""
        raise errors.DeviceError(self._fault)

    def evaluate(
        self, site: sites.Site, task: protocol.Task, own: state.AdapterState, until: float
    ) -> protocol.Evaluation:
        """See above."""
        raise errors.DeviceError(self._fault)


class Here:
    """In this process.

    Args:
        models: where they are held.
        on_step: told after each step of training and each sample of evaluation.
    """

    def __init__(self, models: Models, on_step: progress.Step = progress.no_step) -> None:
        self._models, self._on_step = models, on_step
        self._counted: tuple[str, float] | None = None

    def shapes(self, site: sites.Site, recipe: schema.Recipe) -> adapted_model.AdaptedModel:
        """See above; with its weights, on the site's device."""
        return self._models.get(site.recipe(recipe), site.device)

    def hello(self, site: sites.Site, task: protocol.Task) -> protocol.Hello:
        """See above."""
        recipe = site.recipe(task.recipe)
        model = self._models.get(recipe, site.device)
        return protocol.Hello(
            site.name,
            model.backbone.sha256,
            model.manifest.fingerprint,
            recipe.adapter.rank,
            counts(site, recipe),
            model.backbone.config_sha256,
            model.precision,
            task.recipe.codec,
            labelled=site.labelled,
            lacking=site.lacking,
            without_labels=site.without_labels,
        )

    def train(self, site: sites.Site, task: protocol.Task, start: state.AdapterState, until: float) -> state.SiteUpdate:
        """See above; a hospital's device is looked at first.

        Raises:
            DeviceError: if it does not compute.
        """
        model = self.shapes(site, task.recipe)
        if not site.simulated:
            device_check.require(site.device, lambda: self._step_mib(model))
        return trainer.train(model, site, start, task.round, until, self._on_step, correction=task.correction)

    def _step_mib(self, model: adapted_model.AdaptedModel) -> float:
        """Counted once a recipe."""
        if self._counted is None or self._counted[0] != model.recipe.hash:
            self._counted = model.recipe.hash, device_check.step_mib(model)
        return self._counted[1]

    def evaluate(
        self, site: sites.Site, task: protocol.Task, own: state.AdapterState, until: float
    ) -> protocol.Evaluation:
        """See above."""
        return evaluator.evaluate(self.shapes(site, task.recipe), site, own, task, until, self._on_step)
