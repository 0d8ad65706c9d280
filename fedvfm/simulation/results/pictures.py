"""Sample images with truth and prediction, for the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from fedvfm.client.training import evaluator
from fedvfm.client.training import site as sites
from fedvfm.data import defect, overlay, transforms
from fedvfm.data import sample as samples
from fedvfm.model import adapted_model
from fedvfm.tasks import boxes, classification, detection, metrics, segmentation

SITES = 8


@dataclass(frozen=True, slots=True)
class Picture:
    """One test sample as the report shows it.

    Attributes:
        site, sample: whose it is; ids are safe to show.
        image: PNG of the image as the site's scanner shows it.
        truth, prediction: PNG of the grey image with coloured masks; None in classification.
        dice: Dice of the prediction, mean over foreground classes (those the site labels); None in classification.
        f1: F1 of the boxes; None but in detection.
        label: the true class; None in segmentation.
        probabilities: class -> probability; empty in segmentation and of a target of columns.
        values: of a target of columns what was answered and the truth, in words, and how well they fit: exp(-loss);
            0 where that is not known of one sample alone.
        part: of a case which of its images is shown, and how much of the answer rests on it; else empty.
        worst: whether it was chosen because no test sample of its site scores lower; else it was drawn.
    """

    site: str
    sample: str
    image: bytes
    truth: bytes | None = None
    prediction: bytes | None = None
    dice: float | None = None
    f1: float | None = None
    label: str | None = None
    probabilities: Mapping[str, float] | None = None
    values: tuple[str, float] | None = None
    part: str = ""
    worst: bool = False

    @property
    def score(self) -> float:
        """Dice, F1, the probability of the true class, or closeness; what a gallery is sorted by."""
        if self.f1 is not None:
            return self.f1
        if self.dice is not None:
            return self.dice
        if self.values is not None:
            return self.values[1]
        return (self.probabilities or {}).get(self.label or "", 0.0)


def examples(
    model: adapted_model.AdaptedModel,
    members: Sequence[sites.Site],
    rng: Generator,
    ranked: Mapping[str, Sequence[str]] | None = None,
    use: Callable[[sites.Site], None] = lambda site: None,
) -> list[Picture]:
    """Test samples of up to eight sites, predicted with the adapter the model holds.

    Of each site one or two are drawn, not chosen: they show what is usual. Beside them stands its worst one.

    Args:
        model: holds the adapter.
        members: the sites.
        rng: of the draw.
        ranked: site -> its test samples (volumes), the worst first; None shows no worst ones.
        use: called before the pictures of a site, where the model must hold another adapter for each.

    Raises:
        DataError: if a sample cannot be read.
    """
    chosen = _spaced(members)
    number = 2 if len(chosen) <= SITES // 2 else 1
    shown = []
    model.eval()
    for site in chosen:
        use(site)
        tested = [sample for sample in site.split("test") if not sample.without_image]
        drawn = rng.choice(len(tested), size=min(number, len(tested)), replace=False)
        shown += [_picture(model, site, tested[at], tested) for at in sorted(drawn)]
        shown += [
            dataclasses.replace(_picture(model, site, sample, tested), worst=True)
            for sample in _worst(tested, (ranked or {}).get(site.name, ()))
        ]
    return shown


def _worst(tested: Sequence[samples.Sample], ranked: Sequence[str]) -> list[samples.Sample]:
    """The sample that scored lowest; of a volume its middle slice."""
    slices = [sample for sample in tested if ranked and sample.unit == ranked[0]]
    return slices[len(slices) // 2 :][:1]


def _spaced(members: Sequence[sites.Site]) -> list[sites.Site]:
    """All sites with a test sample, or :data:`SITES` of them at even distances in the order of their names."""
    tested = [site for site in members if site.split("test")]
    if len(tested) <= SITES:
        return tested
    return [tested[round(at)] for at in np.linspace(0, len(tested) - 1, SITES)]


@torch.no_grad()
def _picture(
    model: adapted_model.AdaptedModel, site: sites.Site, sample: samples.Sample, tested: Sequence[samples.Sample]
) -> Picture:
    if sample.bag:
        return _case(model, site, sample)
    prepared = site.whole(model, sample)
    logits = evaluator.among(model, site, sample, prepared, tested)
    image, truth = site.hospital.read(sample).image, prepared.truth
    if logits.ndim == 1:
        return _classified(model, site.name, sample, image, logits)
    if truth is None:
        raise defect.MASK_MISSING.error(
            f"sample '{sample.id}' of site '{site.name}' has no mask to show; give every image one"
        )
    if isinstance(model.task, detection.Detection):
        return _boxed(model.task, site.name, sample, prepared, image, logits)
    predicted = segmentation.classes_at(logits, truth.shape)
    scores = metrics.SegmentationScores(model.recipe.data.class_names, surface=False)
    scores.add(sample.id, predicted, truth, labelled=sample.labelled)
    part = ""
    if sample.whole:  # the slice that shows most
        at = int((truth > 0).sum(axis=(1, 2)).argmax())
        image, truth, predicted, part = image[:, at], truth[at], predicted[at], f"slice {at + 1} of {len(truth)}"
    return Picture(
        site=site.name,
        sample=sample.id,
        image=overlay.png(overlay.as_shown(image)),
        truth=overlay.png(overlay.drawn(image, truth)),
        prediction=overlay.png(overlay.drawn(image, predicted)),
        dice=scores.value()["dice"],
        part=part,
    )


def _boxed(
    task: detection.Detection,
    site: str,
    sample: samples.Sample,
    prepared: transforms.Prepared,
    image: NDArray[np.float32],
    logits: torch.Tensor,
) -> Picture:
    """An image with the frames of its objects, and of the boxes that are delivered."""
    if prepared.truth is None:
        raise ValueError("an image without truth")
    size = prepared.truth.shape
    scores = task.scores(surface=False)
    task.score(scores, sample.id, logits, dataclasses.replace(prepared, part=None), sample.truth)
    truth, predicted = task.objects(prepared.truth), task.delivered(logits, size)
    return Picture(
        site=site,
        sample=sample.id,
        image=overlay.png(overlay.as_shown(image)),
        truth=overlay.png(overlay.drawn(image, boxes.framed(truth, size))),
        prediction=overlay.png(overlay.drawn(image, boxes.framed(predicted, size))),
        f1=scores.value()["f1"],
    )


def _case(model: adapted_model.AdaptedModel, site: sites.Site, sample: samples.Sample) -> Picture:
    """A case by the image that its answer rests on most."""
    weights = model.attention(evaluator.whole_case(model, site, sample))
    at = int(weights.argmax())
    image = site.hospital.read(sample.images[at]).image
    picture = _classified(model, site.name, sample, image, evaluator.answer(model, site, sample))
    return dataclasses.replace(picture, part=f"image {at + 1} of {len(weights)}, weight {float(weights[at]):.2f}")


def _classified(
    model: adapted_model.AdaptedModel,
    site: str,
    sample: samples.Sample,
    image: NDArray[np.float32],
    logits: torch.Tensor,
) -> Picture:
    names = model.recipe.data.class_names
    if model.recipe.target.of_columns:
        return Picture(site, sample.id, overlay.png(overlay.as_shown(image)), values=_values(model, sample, logits))
    known = classification.of_labelled(logits, sample.labelled)
    chances = dict(zip(names, (float(value) for value in known.softmax(dim=0)), strict=True))
    label = None if sample.label is None else names[sample.label]
    return Picture(site, sample.id, overlay.png(overlay.as_shown(image)), label=label, probabilities=chances)


def _values(model: adapted_model.AdaptedModel, sample: samples.Sample, logits: torch.Tensor) -> tuple[str, float]:
    task = model.task
    target = torch.as_tensor(task.target(sites.NO_IMAGE, sample.truth), device=logits.device)
    compares = model.recipe.target.kind == "cox"  # its loss compares cases, and says nothing of one
    fits = 0.0 if compares else math.exp(-float(task.losses(logits[None], target[None])[0]))
    answered = [f"{name} {value:.3g}" for name, value in task.row(task.answers(logits))["values"].items()]
    truths = [
        f"{name} {'missing' if truth is None else f'{truth:g}'}"
        for name, truth in zip(model.recipe.data.class_names, sample.values, strict=True)
    ]
    words = f"{'; '.join(answered)} (truth: {'; '.join(truths)})"
    return words, fits
