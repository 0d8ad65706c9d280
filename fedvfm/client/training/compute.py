"""Where the work of a message is computed: in this process, or elsewhere (:mod:`fedvfm.client.batch`).

What is computed is the same wherever it is: arrays of the site's own adapter in, all arrays of its manifest out. What
of them leaves, and how it is coded, is decided by whoever asked, beside the site's keys and policy.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Protocol

from fedvfm import errors
from fedvfm.client.training import beside, evaluator, trainer
from fedvfm.client.training import site as sites
from fedvfm.config import privacy, schema
from fedvfm.model import adapted_model, device_check, precision
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

    def beside(
        self, site: sites.Site, task: protocol.Task, own: state.AdapterState, until: float
    ) -> state.AdapterState:
        """After :meth:`train`: train what the site keeps for itself, from ``own`` till at most ``until``."""
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

    def beside(
        self, site: sites.Site, task: protocol.Task, own: state.AdapterState, until: float
    ) -> state.AdapterState:
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
        self._counted: tuple[str, float, float] | None = None
        self._there: set[tuple[str, str]] = set()
        self._chosen: dict[str, str] = {}

    def shapes(self, site: sites.Site, recipe: schema.Recipe) -> adapted_model.AdaptedModel:
        """See above; with its weights, on the device that has room for it: the one of the last greeting or round.

        Raises:
            DeviceError: as :meth:`train`.
        """
        recipe = site.recipe(recipe)
        if not site.simulated and recipe.hash not in self._chosen:
            self._choose(site, recipe)
        device = self._chosen.get(recipe.hash, site.device)
        model = self._models.get(recipe, device)
        self._there.add((recipe.hash, device))
        return model

    def hello(self, site: sites.Site, task: protocol.Task) -> protocol.Hello:
        """See above; the device is chosen as for a round, so that a greeting puts nothing on one that is full.

        Raises:
            DeviceError: as :meth:`train`.
        """
        recipe = site.recipe(task.recipe)
        if not site.simulated:
            self._choose(site, recipe)
        model = self.shapes(site, task.recipe)
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
        """See above; a hospital's device is looked at first, and a spare one takes a round for which it has no room.

        Raises:
            DeviceError: if it does not compute, or all are full.
        """
        recipe = site.recipe(task.recipe)
        if not site.simulated:
            self._choose(site, recipe)
        with self._placed(site, recipe):
            model = self.shapes(site, task.recipe)
            return trainer.train(model, site, start, task.round, until, self._on_step, correction=task.correction)

    def beside(
        self, site: sites.Site, task: protocol.Task, own: state.AdapterState, until: float
    ) -> state.AdapterState:
        """See above; where its update was trained."""
        if task.state is None:
            raise errors.ProtocolError("a train message without an adapter")
        with self._placed(site, site.recipe(task.recipe)):
            model = self.shapes(site, task.recipe)
            return beside.train(model, site, task.state, own, task.round, until, self._on_step)

    def evaluate(
        self, site: sites.Site, task: protocol.Task, own: state.AdapterState, until: float
    ) -> protocol.Evaluation:
        """See above; where this recipe was trained last."""
        with self._placed(site, site.recipe(task.recipe)):
            return evaluator.evaluate(self.shapes(site, task.recipe), site, own, task, until, self._on_step)

    def _choose(self, site: sites.Site, recipe: schema.Recipe) -> None:
        """Look at the site's devices, and note the first that has room for a step of this recipe."""
        same = functools.partial(self._same_numbers, recipe.precision, site.device)
        needed = functools.partial(self._needed_mib, recipe)
        names = (site.device, *site.spare_devices)
        self._chosen[recipe.hash] = device_check.roomy(names, needed, same, site.gpu_share)

    @contextlib.contextmanager
    def _placed(self, site: sites.Site, recipe: schema.Recipe) -> Iterator[None]:
        """The site is on the device of this round until it is answered."""
        before = site.device
        site.device = before if site.simulated else self._chosen.get(recipe.hash, before)
        try:
            yield
        finally:
            site.device = before

    @staticmethod
    def _same_numbers(asked: str, main: str, spare: str) -> bool:
        """Whether a device computes in the precision that the handshake told."""
        return precision.of(asked, main) == precision.of(asked, spare)

    def _needed_mib(self, recipe: schema.Recipe, device: str) -> float:
        """A step, and the model where it does not lie there yet. Counted once a recipe."""
        if self._counted is None or self._counted[0] != recipe.hash:
            shapes = adapted_model.AdaptedModel(recipe, with_weights=False)
            computes = precision.of(recipe.precision, device)
            self._counted = recipe.hash, device_check.step_mib(shapes, computes), device_check.weights_mib(shapes)
        _, step, weights = self._counted
        key = (recipe.hash, device)
        return step + (0.0 if key in self._there else weights)
