"""Evaluation of an adapter on one split of a site."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fedvfm import protocol, state
from fedvfm.client import model as models
from fedvfm.client import site as sites
from fedvfm.data import sample as samples
from fedvfm.data import transforms

WHOLE = 1.6
OVERLAP = 1 / 9


@torch.no_grad()
def evaluate(
    model: models.AdaptedModel, site: sites.Site, adapter: state.AdapterState, task: protocol.Task
) -> protocol.Evaluation:
    """Score ``adapter`` on a split: site values, and per-sample values only where the task asks for them.

    Raises:
        DataError: if a sample cannot be read.
    """
    model.write(adapter)
    model.eval()
    scores = model.task.scores(surface=task.surface)
    for sample in site.split(task.split):
        prepared = site.whole(model, sample)
        model.task.score(scores, sample.id, logits(model, site, sample, prepared), prepared, sample.label)
    return protocol.Evaluation(
        site=site.name,
        round=task.round,
        num_examples=len(scores),
        metrics=scores.value() if len(scores) else {},
        samples=scores.per_sample() if task.per_sample and len(scores) else {},
        ids=tuple(scores.ids) if task.per_sample else (),
    )


@torch.no_grad()
def logits(
    model: models.AdaptedModel, site: sites.Site, sample: samples.Sample, prepared: transforms.Prepared
) -> Tensor:
    """Logits of a whole image: in one piece, or in overlapping windows of the training size where it is much larger.

    Shapes: prepared.image (3, h, w) -> (K, h, w) in segmentation, (K,) in classification.
    """
    size = model.recipe.data.input_size
    height, width = prepared.image.shape[1:]
    if height <= WHOLE * size[0] and width <= WHOLE * size[1]:
        return _run(model, site.tile(model, sample, prepared.image, (0, 0)))
    window = (min(size[0], height), min(size[1], width))
    weight = _importance(window)
    total = torch.zeros(len(model.recipe.data.class_names), height, width)
    weights = torch.zeros(height, width)
    for top, left in _corners((height, width), window):
        rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
        piece = _run(model, site.tile(model, sample, prepared.image[:, rows, columns], (top, left)))
        total[:, rows, columns] += piece * weight
        weights[rows, columns] += weight
    return total / weights


def _run(model: models.AdaptedModel, example: sites.Example) -> Tensor:
    result: Tensor = model(*sites.collate([example], model))[0].float().cpu()
    return result


def _corners(size: Sequence[int], window: Sequence[int]) -> list[tuple[int, int]]:
    """Upper left corners of windows that cover the image with ``OVERLAP``."""
    starts = []
    for side, part in zip(size, window, strict=True):
        step = max(1, round(part * (1 - OVERLAP)))
        starts.append([min(start, side - part) for start in range(0, side - part + step, step)])
    return [(top, left) for top in dict.fromkeys(starts[0]) for left in dict.fromkeys(starts[1])]


@functools.lru_cache(maxsize=4)
def _importance(window: tuple[int, int]) -> Tensor:
    """MONAI's Gaussian weight of a window: its middle counts more than its border."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's imports warn about optional packages
        from monai.data.utils import compute_importance_map

    weight: Tensor = compute_importance_map(window, mode="gaussian", sigma_scale=0.25, dtype=torch.float32)
    return weight
