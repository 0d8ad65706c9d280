"""Evaluation of an adapter on one split of a site."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedvfm import errors
from fedvfm.client.gate import policy
from fedvfm.client.training import site as sites
from fedvfm.data import sample as samples
from fedvfm.data import transforms
from fedvfm.model import adapted_model, sliding_window
from fedvfm.protocol import protocol
from fedvfm.report import progress
from fedvfm.state import state
from fedvfm.tasks import across_slices, case_heads, metrics
from fedvfm.tasks import base as tasks


@torch.no_grad()
def evaluate(
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    adapter: state.AdapterState,
    task: protocol.Task,
    deadline: float = math.inf,
    on_step: progress.Step = progress.no_step,
) -> protocol.Evaluation:
    """Score ``adapter`` on a split: site values, and per-sample values only where the task asks for them.

    ``deadline`` is a time of the monotonic clock.

    Raises:
        DataError: if a sample cannot be read.
        DeadlinePassed: if it is over before the last sample.
    """
    model.write(adapter)
    model.eval()
    scores = model.task.scores(surface=task.surface)
    chosen: Sequence[samples.Sample] = site.split(task.split)
    if model.task.neighbours:
        chosen = across_slices.in_order(chosen)
    having: dict[str, set[str]] = {}
    owners = {sample.unit: sample.subject for sample in chosen}

    def answered() -> Iterator[tuple[tuple[samples.Sample, transforms.Prepared], samples.Part | None, Tensor]]:
        batch = 1 if model.task.bags else sliding_window.batch_of(model)  # a case is as long as many images
        for start in range(0, len(chosen), batch):
            if time.monotonic() > deadline:
                raise errors.DeadlinePassed(
                    f"site '{site.name}', {task.split} of round {task.round}: the time was over after {len(scores)} "
                    "samples. Ask the coordinator to raise round_timeout_s, or evaluate on a faster device"
                )
            shown = chosen[start : start + batch]
            ready, found = _answered(model, site, shown, batch)
            for sample, prepared, values in zip(shown, ready, found, strict=True):
                yield (sample, prepared), sample.part, values

    together = across_slices.mixed(answered(), model.task.neighbours)
    for number, ((sample, prepared), values) in enumerate(together, 1):
        model.task.score(scores, sample.id, values, prepared, sample.truth, *sites.known(sample))
        if not site.simulated:
            _note_classes(having, sample, prepared, model.task)
        on_step(number, len(chosen))
    return protocol.Evaluation(
        site=site.name,
        round=task.round,
        num_examples=len(scores),
        metrics=scores.value() if len(scores) else {},
        samples=scores.per_sample() if task.per_sample and len(scores) else {},
        ids=tuple(scores.ids) if task.per_sample else (),
        classes={name: len(subjects) for name, subjects in sorted(having.items())},
        patients={} if site.simulated or not len(scores) else _of_patients(scores, owners),
    )


def _answered(
    model: adapted_model.AdaptedModel, site: sites.Site, shown: Sequence[samples.Sample], batch: int
) -> tuple[Sequence[transforms.Prepared], Iterable[Tensor]]:
    """Samples prepared, and their logits; of a case there is nothing to prepare."""
    if model.task.bags:
        return [sites.NO_IMAGE] * len(shown), (answer(model, site, sample) for sample in shown)
    ready = [site.whole(model, sample) for sample in shown]
    return ready, many(model, site, shown, ready, batch)


@torch.no_grad()
def answer(model: adapted_model.AdaptedModel, site: sites.Site, sample: samples.Sample) -> Tensor:
    """Logits of one sample as it is: of a case from all of its images.

    Shapes: (K, h, w) in segmentation, (K,) in classification.
    """
    if not sample.bag:
        return logits(model, site, sample, site.whole(model, sample))
    parts = whole_case(model, site, sample)
    result: Tensor = model(torch.empty(0), None, None, parts, sites.rows([sample], model))[0].float().cpu()
    return result


def whole_case(model: adapted_model.AdaptedModel, site: sites.Site, sample: samples.Sample) -> case_heads.Parts:
    """All images of a case with their vectors."""
    return case_heads.Parts((tuple(range(len(sample.images))),), site.vectors(model, sample).to(model.device))


def _of_patients(scores: metrics.MetricSet, owners: Mapping[str, str]) -> dict[str, float]:
    """Metrics where each patient counts once, with the mean of his samples."""
    subjects, of_patients = [owners[name] for name in scores.ids], {}
    for metric, values in scores.bounded().items():
        own: dict[str, list[float]] = {}
        for subject, value in zip(subjects, values, strict=True):
            own.setdefault(subject, []).append(value)
        of_patients[metric] = math.fsum(math.fsum(each) / len(each) for each in own.values()) / len(own)
    return of_patients


def _note_classes(
    having: dict[str, set[str]], sample: samples.Sample, prepared: transforms.Prepared, task: tasks.Task
) -> None:
    """Note which classes, or numbers, this sample's patient has; of a label also whether he does not have it."""
    recipe = task.recipe
    names = recipe.data.class_names
    present = [sample.label] if prepared.truth is None else task.present(prepared.truth)
    if recipe.target.kind == "multi-label" or recipe.target.prognosis:
        # A rank among few who do not have a label would tell of each of them, too; of survival the event is one.
        answered = list(zip(names, sample.values, strict=True))
        for name, value in answered if recipe.target.kind == "multi-label" else answered[1:]:
            if value is not None:
                having.setdefault(name if value else f"{policy.WITHOUT}{name}", set()).add(sample.subject)
    if recipe.target.kind == "regression":
        for name, value in zip(names, sample.values, strict=True):
            if value is not None:
                having.setdefault(name, set()).add(sample.subject)
    for number in present:
        if number is not None:
            having.setdefault(names[int(number)], set()).add(sample.subject)


def logits(
    model: adapted_model.AdaptedModel, site: sites.Site, sample: samples.Sample, prepared: transforms.Prepared
) -> Tensor:
    """Logits of one sample's whole image, see :func:`many`.

    Shapes: prepared.image (3, h, w) -> (K, h, w) in segmentation, (K,) in classification.
    """
    (found,) = many(model, site, [sample], [prepared], 1)
    return found


@torch.no_grad()
def among(
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    sample: samples.Sample,
    prepared: transforms.Prepared,
    others: Sequence[samples.Sample],
) -> Tensor:
    """Logits of one sample as :func:`evaluate` scores it: of a slice with its neighbours among ``others``.

    Shapes: as :func:`logits`.
    """
    part = sample.part
    if part is None or not model.task.neighbours:
        return logits(model, site, sample, prepared)
    beside = {
        other.part.index: other
        for other in others
        if other.part is not None and other.part.volume == part.volume and abs(other.part.index - part.index) <= 1
    }
    rows = (
        (other is sample, other.part, logits(model, site, other, site.whole(model, other)))
        for _, other in sorted({**beside, part.index: sample}.items())
    )
    return next(values for own, values in across_slices.mixed(rows, model.task.neighbours) if own)


def many(
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    shown: Sequence[samples.Sample],
    ready: Sequence[transforms.Prepared],
    batch: int,
) -> Iterator[Tensor]:
    """Logits of samples' whole images, with what the site keeps of the frozen blocks.

    Prompts, where the recipe asks for them, are those of what each window shows.

    Args:
        model: the model.
        site: whose samples they are.
        shown: the samples.
        ready: the same, prepared.
        batch: how many windows are computed at a time at most.

    Yields: as :func:`fedvfm.model.sliding_window.many`.
    """

    def run(parts: Sequence[sliding_window.Window]) -> Tensor:
        examples = [_tile(model, site, shown[part.number], ready[part.number], part) for part in parts]
        result: Tensor = model(*sites.collate(examples, model)).float().cpu()
        return result

    return sliding_window.many(model, [one.image for one in ready], run, batch)


def _tile(
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    sample: samples.Sample,
    prepared: transforms.Prepared,
    part: sliding_window.Window,
) -> sites.Example:
    where = sliding_window.place(part.corner, part.image.shape[1:])
    shown = None if prepared.mask is None else prepared.mask[where]
    return site.tile(model, sample, part.image, part.corner, shown)
