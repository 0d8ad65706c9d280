"""Sample images with truth and prediction, for the report."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from fedvfm import errors, metrics
from fedvfm.backbones import base as backbones
from fedvfm.client import evaluator
from fedvfm.client import model as models
from fedvfm.client import site as sites
from fedvfm.data import hospitals as hospital_data
from fedvfm.data import sample as samples
from fedvfm.data import transforms

SITES = 8
WIDEST, NARROW = 360, 240
FILL = 0.42

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#0072B2")
"""Foreground classes 1, 2, ... in order, then again from the first.

Source: Okabe and Ito, "Color Universal Design", 2008: told apart by colour-blind readers.
"""

Picture8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Picture:
    """One test sample as the report shows it.

    Attributes:
        site, sample: whose it is; ids are safe to show.
        image: PNG of the image as the site's scanner shows it.
        truth, prediction: PNG of the grey image with coloured masks; None in classification.
        dice: Dice of the prediction, mean over foreground classes; None in classification.
        label: the true class; None in segmentation.
        probabilities: class -> probability; empty in segmentation.
    """

    site: str
    sample: str
    image: bytes
    truth: bytes | None = None
    prediction: bytes | None = None
    dice: float | None = None
    label: str | None = None
    probabilities: Mapping[str, float] | None = None


def examples(model: models.AdaptedModel, hospitals: Sequence[hospital_data.Hospital], rng: Generator) -> list[Picture]:
    """One or two test samples of up to eight sites, predicted with the adapter the model holds.

    Samples are drawn, not chosen: the report shows what is usual, not what is best.

    Raises:
        DataError: if a sample cannot be read.
    """
    chosen = _spaced(hospitals)
    number = 2 if len(chosen) <= SITES // 2 else 1
    shown = []
    model.eval()
    for hospital in chosen:
        drawn = rng.choice(len(hospital.test), size=min(number, len(hospital.test)), replace=False)
        shown += [_picture(model, hospital, hospital.test[at]) for at in sorted(drawn)]
    return shown


def colour(number: int) -> str:
    """The colour of foreground class ``number``, from 1."""
    return COLOURS[(number - 1) % len(COLOURS)]


def _spaced(hospitals: Sequence[hospital_data.Hospital]) -> list[hospital_data.Hospital]:
    """All hospitals with a test sample, or :data:`SITES` of them at even distances in the order of their names."""
    tested = [hospital for hospital in hospitals if hospital.test]
    if len(tested) <= SITES:
        return tested
    return [tested[round(at)] for at in np.linspace(0, len(tested) - 1, SITES)]


@torch.no_grad()
def _picture(model: models.AdaptedModel, hospital: hospital_data.Hospital, sample: samples.Sample) -> Picture:
    site = sites.Site(hospital.name, hospital, device=model.device)
    prepared = site.whole(model, sample)
    logits = evaluator.logits(model, site, sample, prepared)
    image, truth = hospital.read(sample).image, prepared.truth
    if logits.ndim == 1:
        return _classified(model, hospital.name, sample, image, logits)
    if truth is None:
        raise errors.DataError(
            f"sample '{sample.id}' of site '{hospital.name}' has no mask to show; give every image one"
        )
    predicted = backbones.resize(logits[None], truth.shape)[0].argmax(dim=0).numpy().astype(np.int64)
    dice, _ = metrics.overlap(predicted, truth, len(model.recipe.data.class_names))
    return Picture(
        site=hospital.name,
        sample=sample.id,
        image=png(as_shown(image)),
        truth=png(overlay(image, truth)),
        prediction=png(overlay(image, predicted)),
        dice=float(dice[1:].mean()),
    )


def _classified(
    model: models.AdaptedModel, site: str, sample: samples.Sample, image: NDArray[np.float32], logits: torch.Tensor
) -> Picture:
    names = model.recipe.data.class_names
    chances = dict(zip(names, (float(value) for value in logits.softmax(dim=0)), strict=True))
    label = None if sample.label is None else names[sample.label]
    return Picture(site, sample.id, png(as_shown(image)), label=label, probabilities=chances)


def as_shown(image: NDArray[np.float32]) -> Picture8:
    """An image at the size of the report, contrast stretched. Shapes: (C, H, W) in [0, 1] -> (h, w, 3)."""
    stretched = transforms.stretch(image)
    coloured = np.repeat(stretched, 3, axis=0) if len(stretched) == 1 else stretched
    height, width = display_size(*image.shape[1:])
    if width < image.shape[2]:
        coloured = transforms.resize(coloured, (height, width))
    else:
        coloured = np.repeat(np.repeat(coloured, width // image.shape[2], axis=2), height // image.shape[1], axis=1)
    return np.asarray(np.round(np.moveaxis(coloured, 0, -1) * 255), dtype=np.uint8)


def display_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) in the report: wide images shrunk to 360, thumbnails enlarged by a whole number."""
    if width > WIDEST:
        return max(1, round(height * WIDEST / width)), WIDEST
    factor = max(1, NARROW // width)
    return height * factor, width * factor


def overlay(image: NDArray[np.float32], mask: NDArray[np.int64]) -> Picture8:
    """The grey image with every foreground class tinted and outlined. Shapes: (C, H, W), (H, W) -> (h, w, 3)."""
    grey = as_shown(transforms.to_grey(image)).astype(np.float64)
    height, width = grey.shape[:2]
    shown = transforms.resize_mask(mask, (height, width))
    edges = _edges(shown)
    for number in np.unique(shown[shown > 0]):
        paint = np.array([int(colour(int(number))[at : at + 2], 16) for at in (1, 3, 5)], dtype=np.float64)
        inside = shown == number
        grey[inside] = (1 - FILL) * grey[inside] + FILL * paint
        grey[inside & edges] = paint
    return np.asarray(np.round(grey), dtype=np.uint8)


def _edges(mask: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Pixels with a neighbour (up, down, left, right) of another class. Shapes: (H, W)."""
    framed = np.pad(mask, 1, mode="edge")
    around = (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:])
    return np.asarray(np.logical_or.reduce([near != mask for near in around]), dtype=np.bool_)


def png(pixels: Picture8) -> bytes:
    """PNG file of (h, w, 3) bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", optimize=True)
    return out.getvalue()
