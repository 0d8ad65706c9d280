"""Evaluation of an adapter on one split of a site."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from fedvfm import errors, progress, protocol, state
from fedvfm.client import model as models
from fedvfm.client import site as sites
from fedvfm.client import windows
from fedvfm.data import sample as samples
from fedvfm.data import transforms


@torch.no_grad()
def evaluate(
    model: models.AdaptedModel,
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
    chosen = site.split(task.split)
    for number, sample in enumerate(chosen, start=1):
        if time.monotonic() > deadline:
            raise errors.DeadlinePassed(
                f"site '{site.name}', {task.split} of round {task.round}: the time was over after {len(scores)} "
                "samples. Ask the coordinator to raise round_timeout_s, or evaluate on a faster device"
            )
        prepared = site.whole(model, sample)
        model.task.score(scores, sample.id, logits(model, site, sample, prepared), prepared, sample.label)
        on_step(number, len(chosen))
    return protocol.Evaluation(
        site=site.name,
        round=task.round,
        num_examples=len(scores),
        metrics=scores.value() if len(scores) else {},
        samples=scores.per_sample() if task.per_sample and len(scores) else {},
        ids=tuple(scores.ids) if task.per_sample else (),
    )


def logits(
    model: models.AdaptedModel, site: sites.Site, sample: samples.Sample, prepared: transforms.Prepared
) -> Tensor:
    """Logits of a sample's whole image, with what the site keeps of the frozen blocks.

    Prompts, where the recipe asks for them, are those of what each window shows.

    Shapes: prepared.image (3, h, w) -> (K, h, w) in segmentation, (K,) in classification.
    """

    def run(image: transforms.Image, corner: tuple[int, int]) -> Tensor:
        rows, columns = (slice(at, at + side) for at, side in zip(corner, image.shape[1:], strict=True))
        shown = None if prepared.mask is None else prepared.mask[rows, columns]
        example = site.tile(model, sample, image, corner, shown)
        result: Tensor = model(*sites.collate([example], model))[0].float().cpu()
        return result

    return windows.logits(model, prepared.image, run)
