"""Evaluation of an adapter on one split of a site."""

from __future__ import annotations

import torch

from fedvfm import protocol, state
from fedvfm.client import model as models
from fedvfm.client import site as sites


@torch.no_grad()
def evaluate(model: models.AdaptedModel, site: sites.Site, adapter: state.AdapterState, task: protocol.Task) -> protocol.Evaluation:
    """Score ``adapter`` on a split: site values, and per-sample values only where the task asks for them.

    Raises:
        DataError: if a sample cannot be read.
    """
    model.write(adapter)
    model.eval()
    scores = model.task.scores(surface=task.surface)
    for sample in site.split(task.split):
        example = site.example(model, sample, None)
        pixels, prefix = sites.collate([example], model.device)
        model.task.score(scores, sample.id, model(pixels, prefix)[0], example.prepared, sample.label)
    return protocol.Evaluation(
        site=site.name,
        round=task.round,
        num_examples=len(scores),
        metrics=scores.value() if len(scores) else {},
        samples=scores.per_sample() if task.per_sample and len(scores) else {},
        ids=tuple(scores.ids) if task.per_sample else (),
    )
