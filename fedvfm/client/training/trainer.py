"""Local training: the global adapter in, this site's adapter out. The backbone never changes."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedvfm import errors, seeding
from fedvfm.client.training import consistency, dp_trainer, feed, proximal
from fedvfm.client.training import correction as corrections
from fedvfm.client.training import site as sites
from fedvfm.config import privacy, rates, schema
from fedvfm.data import sample as samples
from fedvfm.model import adapted_model, device
from fedvfm.privacy import base as mechanisms
from fedvfm.privacy import table as mechanism_table
from fedvfm.report import progress
from fedvfm.state import state


def train(
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    base: state.AdapterState,
    round_number: int,
    deadline: float = math.inf,
    on_step: progress.Step = progress.no_step,
    *,
    since: int = 0,
    correction: state.AdapterState | None = None,
    towards: state.AdapterState | None = None,
) -> state.SiteUpdate:
    """Train for the recipe's local epochs from ``base``, or until its ``round_minutes`` are over.

    Those end no round before the site's least number of steps was taken. The optimiser starts afresh; the learning rate
    follows the schedule over all rounds. Order, views and dropout depend on seed, round and site name alone.

    Args:
        model: the model, which is left as trained.
        site: whose training samples are used.
        base: the adapter to start from.
        round_number: decides order, views, dropout and the place in the schedule.
        deadline: a time of the monotonic clock.
        on_step: told after each step.
        since: after how many rounds the recipe's schedule begins: those of the federation, where a site trains on.
        correction: what the coordinator adds to the gradient of every step, under control variates.
        towards: the adapter that ``optimiser.proximal`` pulls to; None for ``base``.

    Raises:
        DeadlinePassed: if it is over before the last step.
        TrainingError: if a loss is not finite, or the adapter did not move.
    """
    started = time.monotonic()
    recipe, examples = model.recipe, site.split("train")
    if not examples:
        raise errors.DataError(f"site '{site.name}' has no training sample")
    if site.without_labels:
        taught = consistency.taught(model, site, base, round_number, deadline)
        if not taught.enough:
            return _unchanged(model, site, base, round_number, started)
        site, examples = taught.site, taught.site.split("train")
    torch.manual_seed(seeding.torch_seed(recipe.seed, "train", round_number, site.name))
    places = None if towards is None else proximal.places(model, towards)
    model.write(base)
    model.train()
    model.select(round_number)
    optimiser = _optimiser(model, recipe.optimiser, round_number)
    with _pace(model, site, optimiser, round_number, correction, places) as pace:
        loss_sum, taken = 0.0, 0
        enough = _limit(recipe.optimiser, site, started)
        for step in range(pace.steps):
            if step >= site.least_steps and enough(step):
                break
            if time.monotonic() > deadline:
                raise errors.DeadlinePassed(
                    f"site '{site.name}', round {round_number}: the coordinator's time was over after step {step} of "
                    f"{pace.steps}. Ask it to raise round_timeout_s, or train on a faster device"
                )
            _set_rates(optimiser, recipe.optimiser, rates.share(recipe.rounds, round_number - since, pace.steps, step))
            loss_sum += pace.take()
            taken += 1
            if step == 0 and pace.part is not None and pace.part.noised:
                _require_moved(model, base, site, round_number, 1)
            on_step(step + 1, pace.steps)
    # Without labels the steps may all have met crops of which the adapter is sure of nothing; a loss that compares the
    # cases of a step is exactly 0 where none had any to compare.
    nothing = recipe.target.kind == "cox" and loss_sum == 0.0
    bare = site.without_labels or nothing or (pace.part is not None and not pace.part.noised)
    after = model.read() if bare else _require_moved(model, base, site, round_number, taken)
    metrics = {"loss": loss_sum / taken, "seconds": round(time.monotonic() - started, 3)}
    update = state.SiteUpdate(
        site.name,
        after.select(model.trained(round_number)),
        len(examples) if taken == pace.steps else seen(recipe.optimiser, len(examples), taken),
        round_number - 1,
        base.fingerprint,
        metrics={**metrics, "steps": float(taken)},
    )
    if recipe.privacy.mechanism == privacy.NO_MECHANISM:
        return update
    return mechanisms.bare(update) if pace.part is None else pace.part.on_update(update)


def _unchanged(
    model: adapted_model.AdaptedModel, site: sites.Site, base: state.AdapterState, round_number: int, started: float
) -> state.SiteUpdate:
    """The adapter as it came, as the update of one example: of a round that had nothing, or too little, to train on."""
    model.write(base)
    return state.SiteUpdate(
        site.name,
        base.select(model.trained(round_number)),
        1,
        round_number - 1,
        base.fingerprint,
        metrics={"seconds": round(time.monotonic() - started, 3), "steps": 0.0},
    )


def _limit(settings: schema.OptimiserConfig, site: sites.Site, started: float) -> Callable[[int], bool]:
    """Whether so many steps are enough by ``round_minutes``: by the clock, of a virtual hospital by its pace."""
    minutes = settings.round_minutes
    if not minutes or (site.simulated and not site.pace):
        return lambda done: False
    if site.simulated:
        most = minutes * site.pace
        return lambda done: (done + 1) * settings.batch_size > most
    return lambda done: time.monotonic() >= started + 60.0 * minutes


def seen(settings: schema.OptimiserConfig, examples: int, steps: int) -> int:
    """How many of a site's examples a round saw that ended after so many steps, an epoch's worth; 1 at least."""
    whole, part = divmod(steps, math.ceil(examples / settings.batch_size))
    passed = whole * examples + min(part * settings.batch_size, examples)
    return max(1, passed // settings.local_epochs)


def _require_moved(
    model: adapted_model.AdaptedModel, base: state.AdapterState, site: sites.Site, round_number: int, steps: int
) -> state.AdapterState:
    """The adapter as it is now. Under a mechanism this is looked at after the first step, before more is spent."""
    after = model.read()
    if after.fingerprint == base.fingerprint:
        raise errors.TrainingError(
            f"site '{site.name}', round {round_number}: the adapter did not change in {steps} "
            f"step{'s' * (steps != 1)}. Raise recipe.optimiser.learning_rate"
        )
    return after


def trial(model: adapted_model.AdaptedModel, site: sites.Site, steps: int = 2) -> list[float]:
    """Seconds of the first steps of round 1, reading and preparing the images included; nothing is kept of them.

    The first step is slower than the others: files are opened and kernels chosen.

    Raises:
        DataError: if there is no training sample, or one cannot be used.
        TrainingError: if a loss is not finite.
    """
    if not site.split("train"):
        raise errors.DataError(f"site '{site.name}' has no training sample")
    site = consistency.untaught(model, site) if site.without_labels else site
    torch.manual_seed(seeding.torch_seed(model.recipe.seed, "train", 1, site.name))
    model.write(model.initial())
    model.train()
    model.select(1)
    taken = []
    with _pace(model, site, _optimiser(model, model.recipe.optimiser, 1), 1, endless=True) as pace:
        for _ in range(steps):
            started = time.monotonic()
            pace.take()
            device.wait(model.device)
            taken.append(time.monotonic() - started)
    return taken


@dataclass(frozen=True)
class Pace:
    """The steps of a round.

    Attributes:
        steps: how many there are.
        take: takes the next one; its loss, which under a mechanism is NaN and never leaves.
        part: of the mechanism at the site, if there is one.
    """

    steps: int
    take: Callable[[], float]
    part: mechanisms.SitePart | None = None


@contextlib.contextmanager
def _pace(
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    optimiser: torch.optim.Optimizer,
    round_number: int,
    correction: state.AdapterState | None = None,
    places: Mapping[nn.Parameter, Tensor] | None = None,
    *,
    endless: bool = False,
) -> Iterator[Pace]:
    """The plain steps, or those of the recipe's mechanism; ``endless`` ones go on for a trial, none of them empty."""
    settings, examples = model.recipe.optimiser, site.split("train")
    part = mechanism_table.get(model.recipe.privacy).site()
    if part is not None:
        with dp_trainer.opened(part, model, site, optimiser, round_number, full=endless) as steps:
            yield Pace(steps.count, steps.take, part)
        return
    rounds = itertools.count() if endless else range(1)
    batches = itertools.chain.from_iterable(_batches(model, site, examples, round_number) for _ in rounds)
    count = math.ceil(len(examples) / settings.batch_size) * settings.local_epochs
    near = proximal.Proximal(optimiser, settings.proximal, places)
    towards = corrections.Correction(model, correction)
    with feed.ahead(batches, feed.helps(model, site)) as ready:
        yield Pace(count, lambda: _step(model, optimiser, next(ready), site, near, towards))


def _optimiser(
    model: adapted_model.AdaptedModel, settings: schema.OptimiserConfig, round_number: int
) -> torch.optim.Optimizer:
    parameters = model.trainable(round_number)
    head_rate = settings.head_learning_rate or settings.learning_rate
    groups = [
        {"params": parameters["adapter"], "lr": settings.learning_rate, "base": settings.learning_rate},
        {"params": parameters["head"], "lr": head_rate, "base": head_rate},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        momentum = 0.0 if settings.control_variates else 0.9
        return torch.optim.SGD(groups, momentum=momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def _set_rates(optimiser: torch.optim.Optimizer, settings: schema.OptimiserConfig, share: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = group["base"] * rates.factor(settings, share)


def _batches(
    model: adapted_model.AdaptedModel, site: sites.Site, examples: Sequence[samples.Sample], round_number: int
) -> Iterator[list[sites.Example]]:
    settings, views = model.recipe.optimiser, model.recipe.data.views
    labels = [sample.label for sample in examples]
    for epoch in range(settings.local_epochs):
        rng = seeding.stream(model.recipe.seed, "order", round_number, epoch, site.name)
        order = model.task.order(labels, rng)
        passed = (round_number - 1) * settings.local_epochs + epoch
        view = passed % views if views else -1
        for start in range(0, len(order), settings.batch_size):
            chosen = [examples[index] for index in order[start : start + settings.batch_size]]
            yield [site.example(model, sample, view, ("epoch", passed)) for sample in chosen]


def _step(
    model: adapted_model.AdaptedModel,
    optimiser: torch.optim.Optimizer,
    batch: list[sites.Example],
    site: sites.Site,
    near: proximal.Proximal,
    towards: corrections.Correction,
) -> float:
    logits, targets = model(*sites.collate(batch, model)), sites.targets(batch, model)
    loss: Tensor = (
        model.task.consistency(logits, targets).mean()
        if site.without_labels
        else model.task.loss(logits, targets, *sites.labelled(batch, model))
    )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise errors.TrainingError(
            f"site '{site.name}': the loss is {value}. Lower recipe.optimiser.learning_rate or check the images"
        )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if all(example.sample.without_image for example in batch):
        _leave_unreached(optimiser)
    near.pull()
    if model.recipe.optimiser.clip_norm:
        trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, model.recipe.optimiser.clip_norm)
    towards.add()
    optimiser.step()
    return value


def _leave_unreached(optimiser: torch.optim.Optimizer) -> None:
    """Take gradients away that are nought in all: else decay and momentum move what such a batch says nothing of."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not bool(parameter.grad.any()):
                parameter.grad = None
