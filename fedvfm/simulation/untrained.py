"""Arms that no federation trains: fitted in this process and tested at every site, in the form of an evaluation.

* ``classical``: thresholds in segmentation (:mod:`fedvfm.simulation.classical`); on frozen features logistic regression
  of classes (:mod:`fedvfm.simulation.linear_probe`) and Cox's of prognosis (:mod:`fedvfm.simulation.cox_regression`).
* ``zero-shot``: the recipe's sentences as they are (:mod:`fedvfm.tasks.words`).
* ``majority``: at every site the commonest class of its own training images, whatever the image; of columns what is
  usual there: shares of labels, means of numbers, Kaplan-Meier's survival; of a risk one for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedvfm.backbones import base as backbones
from fedvfm.backbones import towers
from fedvfm.config import schema, target
from fedvfm.config import words as words_config
from fedvfm.data import defect, transforms
from fedvfm.data import sample as samples
from fedvfm.data.partition import virtual_hospitals
from fedvfm.model import adapted_model, sliding_window
from fedvfm.simulation import baselines, classical, cox_regression, linear_probe
from fedvfm.tasks import survival_metrics, words
from fedvfm.tasks import table as tasks

Probabilities = NDArray[np.float64]
Answer = Callable[[samples.Sample], Probabilities]


def evaluation(
    name: str, what: schema.Experiment, hospitals: Sequence[virtual_hospitals.Hospital], device: str
) -> dict[str, Any]:
    """Fit an arm and test it.

    Args:
        name: of the arm.
        what: the experiment.
        hospitals: its hospitals.
        device: where a backbone computes.

    Raises:
        DataError: if a sample cannot be used, or there is none to fit on.
    """
    started = time.monotonic()
    scored, rule = _scored(name, what, hospitals, device)
    return {
        "round": 0,
        "fingerprint": "",
        "last": scored,
        "rule": rule,
        "seconds": round(time.monotonic() - started, 3),
        "bytes": {"up": 0, "down": 0},
    }


def _scored(
    name: str, what: schema.Experiment, hospitals: Sequence[virtual_hospitals.Hospital], device: str
) -> tuple[dict[str, Any], str]:
    """Scores of an arm by site and sample, and what it answers by."""
    if name == "zero-shot":
        return _zero_shot(what, hospitals, device)
    if what.recipe.task.kind == "segmentation":
        return _thresholds(what, hospitals)
    return _majority(what, hospitals) if name == "majority" else _probe(what, hospitals, device)


def _thresholds(what: schema.Experiment, hospitals: Sequence[virtual_hospitals.Hospital]) -> tuple[dict[str, Any], str]:
    task = tasks.TABLE.get(what.recipe.task.kind)(what.recipe)
    fitted = classical.fit(hospitals, len(what.recipe.data.class_names))
    found: dict[str, Any] = {"sites": {}, "samples": {}}
    for hospital in hospitals:
        scores = task.scores(surface=what.recipe.evaluation.surface)
        for sample in hospital.test:
            pixels = hospital.read(sample)
            drawn = fitted.predict(pixels.image)
            scores.add(sample.id, drawn, pixels.mask, pixels.spacing, pixels.part, sample.labelled)
        _tested(found, hospital.name, scores)
    return found, fitted.describe()


def _majority(what: schema.Experiment, hospitals: Sequence[virtual_hospitals.Hospital]) -> tuple[dict[str, Any], str]:
    if what.recipe.target.of_columns:
        return _usual_everywhere(what, hospitals)
    classes = len(what.recipe.data.class_names)
    known = [_label(sample) for sample in _labelled(hospitals)]
    shares = {
        hospital.name: linear_probe.majority(
            known if hospital.without_labels else [_label(sample) for sample in hospital.train], classes
        )
        for hospital in hospitals
    }
    found = _classified(what, hospitals, lambda hospital: lambda _: shares[hospital.name])
    return found, "the commonest class of the site's own training images for every image, their shares as probabilities"


def _labelled(hospitals: Sequence[virtual_hospitals.Hospital]) -> list[samples.Sample]:
    """The training samples of the hospitals that have labels."""
    return [sample for hospital in hospitals if not hospital.without_labels for sample in hospital.train]


def _usual_everywhere(
    what: schema.Experiment, hospitals: Sequence[virtual_hospitals.Hospital]
) -> tuple[dict[str, Any], str]:
    """The same values of columns for every test sample of a site."""

    def always(hospital: virtual_hospitals.Hospital) -> Answer:
        row = usual([sample.values for sample in hospital.train], what.recipe.target)
        return lambda _: row

    tested = _of_columns(what, hospitals, always)
    if what.recipe.target.kind == "cox":
        return tested, "one risk for every case"
    return tested, "what is usual in the site's own training samples for every one: shares, means, or Kaplan-Meier"


def usual(values: Sequence[Sequence[float | None]], chosen: target.TargetConfig) -> Probabilities:
    """What is usual of columns: shares of labels, means of numbers, survival at the bins; missing values are left out.

    Of a column of which nothing is known it is one half, or the public centre. Survival is Kaplan-Meier's; the
    logarithm of a risk is 0.

    Shapes: values (N, K) -> (K,), of survival (J,), of a risk (1,).
    """
    if chosen.kind == "cox":
        return np.zeros(1)
    if chosen.kind == "survival":
        table = np.array(values, dtype=np.float64).reshape(-1, 2)
        curve = survival_metrics.kaplan_meier(table[:, 0], table[:, 1] > 0)
        return curve(np.asarray(chosen.bins)).clip(0.0, 1.0)
    columns = list(zip(*values, strict=True)) or [()] * len(chosen.centres)
    known = [[value for value in column if value is not None] for column in columns]
    public = chosen.centres or (0.5,) * len(known)
    return np.array([np.mean(own) if own else centre for own, centre in zip(known, public, strict=True)])


def _probe(
    what: schema.Experiment, hospitals: Sequence[virtual_hospitals.Hospital], device: str
) -> tuple[dict[str, Any], str]:
    model = _frozen(what.recipe, device)
    model.head = _Pooled()
    model.eval()
    train = [(own, sample) for own in hospitals if not own.without_labels for sample in own.train]
    if not train:
        raise defect.NO_SAMPLES.error("classical: no hospital has a training sample; check the partition")
    features = np.stack([_features(model, *pair) for pair in train])
    if what.recipe.target.prognosis:
        known = np.array([sample.values for _, sample in train], dtype=np.float64)
        cox = cox_regression.fit(features, known[:, 0], known[:, 1] > 0)
        points = np.asarray(what.recipe.target.bins, dtype=np.float64)

        def prognosis(features: Probabilities) -> Probabilities:
            risk = what.recipe.target.kind == "cox"
            return np.array([cox.log_risk(features)]) if risk else cox.survival(features, points)

        found = _of_columns(
            what, hospitals, lambda hospital: lambda sample: prognosis(_features(model, hospital, sample))
        )
        return found, cox.describe()
    labels = np.array([_label(sample) for _, sample in train], dtype=np.int64)
    fitted = linear_probe.fit(features, labels, len(what.recipe.data.class_names))
    found = _classified(
        what, hospitals, lambda hospital: lambda sample: fitted.predict(_features(model, hospital, sample))
    )
    return found, fitted.describe()


def _frozen(recipe: schema.Recipe, device: str) -> adapted_model.AdaptedModel:
    """The recipe's backbone as it is, under a linear head that nothing trained."""
    return adapted_model.AdaptedModel(baselines.frozen(recipe).model_copy(update={"words": None}), device=device)


def _zero_shot(
    what: schema.Experiment, hospitals: Sequence[virtual_hospitals.Hospital], device: str
) -> tuple[dict[str, Any], str]:
    if what.recipe.words is None:
        raise ValueError("the recipe has no words")
    plain = what.recipe.words.model_copy(update={"mode": words_config.ZERO_SHOT, "context": 0, "per_class": False})
    recipe = what.recipe.model_copy(update={"words": plain})
    model = _frozen(recipe, device)
    model.backbone.words = towers.open_towers(recipe, with_weights=True, device=device)
    model.head = words.Words(recipe, model.backbone.words)
    model.eval()
    scored: dict[str, Any] = {"sites": {}, "samples": {}}
    for hospital in hospitals:
        scores = model.task.scores(surface=False)
        for sample in hospital.test:
            prepared, logits = _logits(model, hospital, sample)
            model.task.score(scores, sample.id, logits, prepared, sample.truth, sample.labelled)
        _tested(scored, hospital.name, scores)
    said = "; ".join(each for group in plain.sentences(recipe.data.class_names) for each in group)
    return scored, f"images against sentences as they are, nothing trained: {said}"


class _Pooled(nn.Module):
    """A head that gives what a linear head would be given."""

    def forward(self, features: backbones.Features, *rows: torch.Tensor | None) -> torch.Tensor:
        """Shapes: (B, D); rows of a table are not looked at."""
        return features.pooled


def _features(
    model: adapted_model.AdaptedModel, hospital: virtual_hospitals.Hospital, sample: samples.Sample
) -> Probabilities:
    """What the backbone makes of an image, not augmented: the mean over its windows; of a case that over its images.

    Shapes: (D,).
    """
    if sample.bag:
        mean: Probabilities = np.mean([_features(model, hospital, image) for image in sample.images], axis=0)
        return mean
    return _logits(model, hospital, sample)[1].double().numpy()


def _logits(
    model: adapted_model.AdaptedModel, hospital: virtual_hospitals.Hospital, sample: samples.Sample
) -> tuple[transforms.Prepared, torch.Tensor]:
    """An image prepared, and what the head makes of it."""
    data = model.recipe.data
    pixels = hospital.read(sample)
    prepared = transforms.prepare(pixels, data, len(data.class_names), multiple=model.backbone.patch)
    return prepared, sliding_window.logits(model, prepared.image, sliding_window.alone(model))


def _classified(
    what: schema.Experiment,
    hospitals: Sequence[virtual_hospitals.Hospital],
    answers: Callable[[virtual_hospitals.Hospital], Answer],
) -> dict[str, Any]:
    """Every test sample of every site, answered."""
    task = tasks.TABLE.get(what.recipe.task.kind)(what.recipe)
    found: dict[str, Any] = {"sites": {}, "samples": {}}
    for hospital in hospitals:
        scores, answer = task.scores(surface=False), answers(hospital)
        for sample in hospital.test:
            scores.add(sample.id, _of_labelled(answer(sample), sample.labelled), _label(sample), sample.part)
        _tested(found, hospital.name, scores)
    return found


def _of_columns(
    what: schema.Experiment,
    hospitals: Sequence[virtual_hospitals.Hospital],
    answers: Callable[[virtual_hospitals.Hospital], Answer],
) -> dict[str, Any]:
    """The same of a target of columns."""
    task = tasks.TABLE.get(what.recipe.task.kind)(what.recipe)
    tested: dict[str, Any] = {"sites": {}, "samples": {}}
    for hospital in hospitals:
        scores: Any = task.scores(surface=False)
        answer = answers(hospital)
        for sample in hospital.test:
            scores.add(sample.id, answer(sample), sample.values, sample.part)
        _tested(tested, hospital.name, scores)
    return tested


def _of_labelled(shares: Probabilities, labelled: Sequence[int]) -> Probabilities:
    """Probabilities over the labelled classes alone, all where none is named."""
    if not labelled:
        return shares
    kept = np.zeros_like(shares)
    kept[list(labelled)] = shares[list(labelled)]
    return kept / kept.sum() if kept.sum() else np.isin(np.arange(len(shares)), labelled) / len(labelled)


def _tested(found: dict[str, Any], site: str, scores: Any) -> None:
    found["sites"][site] = {"num_examples": len(scores), **scores.value()}
    found["samples"][site] = {"id": scores.ids, **scores.per_sample()}


def _label(sample: samples.Sample) -> int:
    if sample.label is None:
        raise defect.LABEL_MISSING.error(f"sample '{sample.id}' has no label; give every image a class")
    return sample.label
