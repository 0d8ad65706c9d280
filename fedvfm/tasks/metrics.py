"""Metric sets: scored sample by sample, combined inside a site, read as one value a metric.

A metric set holds one row of numbers a sample and is used in three steps: *add* a sample, *combine* the parts of one
site, read the *value*. Between sites only values and sample counts cross (:func:`summarise`), because AUROC and HD95 of
two sites do not merge.

Of a volume every slice is added with its place, and the volume becomes one row once all are there: overlap and
distances in three dimensions and millimetres, or the mean of the slices' class probabilities.

Importing this module is cheap: SciPy is loaded by the first distance.
"""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors, registry
from fedvfm.tasks import surfaces

CALIBRATION_BINS = 15
_BOUNDS = {"dice": 1.0, "f1": 1.0, "iou": 1.0, "nsd": 1.0, "brier": 2.0, "one_minus_brier": 1.0, "one_minus_nmae": 1.0}
_OF_CLASS = "dice_"

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Spacing = tuple[float, ...]
"""Millimetres a pixel: (row, column), of a volume (slice, row, column)."""


def bound(name: str) -> float | None:
    """The most that one sample adds to a metric that is a mean over samples, at least 0; None for any other metric."""
    return _BOUNDS["dice"] if name.startswith(_OF_CLASS) else _BOUNDS.get(name)


class Part(Protocol):
    """Which slice of which volume a sample is; ``fedvfm.data.sample.Part`` is one."""

    @property
    def volume(self) -> str:
        """The volume's name: what its row is called."""
        ...

    @property
    def index(self) -> int:
        """Of the slice."""
        ...

    @property
    def of(self) -> int:
        """Slices of the volume."""
        ...

    @property
    def step(self) -> float:
        """Millimetres from slice to slice."""
        ...


class MetricSet(abc.ABC):
    """One row of numbers a sample; the order in which samples are added or parts combined changes no bit.

    Attributes:
        PRIMARY: the key of :meth:`value` that ranks models of this task; higher is better.
        class_names: names of the classes, by class index.
        columns: what the numbers of a row are.
        DESCRIBING: names of further numbers of a row, which describe the sample and its prediction and have no mean
            that is a score. They are in :meth:`per_sample` alone.
    """

    DESCRIBING: ClassVar[tuple[str, ...]] = ()
    PRIMARY: ClassVar[str]

    def __init__(self, class_names: Sequence[str], columns: Sequence[str]) -> None:
        if len(class_names) < 2 or len(set(class_names)) != len(class_names):
            shown = ", ".join(class_names) or "none"
            raise errors.DataError(f"class names: {shown}; at least two different names are needed")
        self.class_names = tuple(class_names)
        self.columns = tuple(columns)
        self._rows: dict[str, Floats] = {}
        self._waiting: dict[str, dict[int, tuple[Part, Any]]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ids(self) -> list[str]:
        """Ids of the samples scored so far, sorted: the order of :meth:`per_sample`."""
        return sorted(self._rows)

    def per_sample(self) -> dict[str, list[float]]:
        """Column -> one number a sample, in the order of :attr:`ids`; those that every sample has."""
        table = self._table()
        names = (*self.columns, *self.DESCRIBING)
        columns = {name: [float(number) for number in table[:, at]] for at, name in enumerate(names)}
        return {name: column for name, column in columns.items() if not any(map(math.isnan, column))}

    def bounded(self) -> dict[str, list[float]]:
        """Metric -> one number a sample, in the order of :attr:`ids`, where the value is their mean.

        Each number lies between 0 and :func:`bound`.
        """
        return {}

    def combine(self, other: Self) -> Self:
        """A new set with the samples of both parts; neither part is changed.

        Raises:
            DataError: if the parts differ in kind, class names or settings, or score a sample twice.
        """
        if type(other) is not type(self) or other._settings() != self._settings():
            raise errors.DataError(
                f"cannot combine {other!r} with {self!r}: they differ; build both parts with the same arguments"
            )
        twice = sorted(self._rows.keys() & other._rows.keys())
        if twice:
            raise errors.DataError(f"sample '{twice[0]}' is in both parts ({len(twice)} such); score each sample once")
        joined = copy.copy(self)
        joined._rows, joined._waiting = self._rows | other._rows, {}
        for waiting in (self._waiting, other._waiting):
            for pieces in waiting.values():
                for part, piece in pieces.values():
                    joined._collect(part, piece)
        return joined

    @abc.abstractmethod
    def value(self) -> dict[str, float]:
        """Metric -> value over all samples added. Always holds :attr:`PRIMARY`; every value is finite.

        Raises:
            DataError: if no sample was added.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(str, self._settings()))})"

    def _settings(self) -> tuple[Any, ...]:
        return (self.class_names, self.columns)

    @abc.abstractmethod
    def _whole(self, part: Part, pieces: Sequence[Any]) -> None:
        """Insert the row of a volume; ``pieces`` are what was collected of its slices, in their order."""

    def _collect(self, part: Part, piece: Any) -> None:
        """Keep a slice until all slices of its volume are there; then score the volume and keep none of them."""
        pieces = self._waiting.setdefault(part.volume, {})
        if part.volume in self._rows or part.index in pieces:
            raise errors.DataError(f"slice {part.index} of '{part.volume}' was already scored; score each slice once")
        pieces[part.index] = (part, piece)
        if len(pieces) == part.of:
            del self._waiting[part.volume]
            self._whole(part, [pieces[index][1] for index in sorted(pieces)])

    def _insert(self, sample_id: str, row: Floats) -> None:
        if sample_id in self._rows:
            raise errors.DataError(f"sample '{sample_id}' was already scored; score each sample once")
        self._rows[sample_id] = row

    def _table(self) -> Floats:
        """Rows in the order of ids, shape (samples, columns); what a set keeps behind them is left out."""
        for volume, pieces in self._waiting.items():
            of = next(iter(pieces.values()))[0].of
            raise errors.DataError(f"volume '{volume}': {len(pieces)} of {of} slices were scored; score all of them")
        if not self._rows:
            raise errors.DataError("no sample was scored, so no metric has a value; give every site a test sample")
        width = len(self.columns) + len(self.DESCRIBING)
        return np.stack([self._rows[sample_id][:width] for sample_id in self.ids])


class SegmentationScores(MetricSet):
    """Dice, IoU, HD95, ASSD and NSD a sample, each the mean over the foreground classes (all but class 0).

    HD95, ASSD and NSD are those of :mod:`fedvfm.tasks.surfaces`: MONAI's definitions, every edge pixel counted the
    same. Distances are in millimetres where the spacing is known, else in pixels: do not average the two kinds. A
    volume is one sample, in three dimensions, with its own spacing along each axis; an axis of length 1 is dropped,
    since along it every pixel would be an edge: a volume of one slice is scored as an image.

    The rule for empty masks, class by class: absent in truth and prediction: Dice 1, IoU 1, NSD 1, HD95 and ASSD 0.
    Absent in exactly one: Dice 0, IoU 0, NSD 0, HD95 and ASSD the diagonal of the image or volume.

    Where a sample has ``labelled`` classes, the others count as background in prediction and truth, every mean is over
    the labelled ones, and it has no ``dice_<class>`` of the others.

    Of every sample is also kept which share of its pixels is foreground, in the prediction and in the truth: an adapter
    that leaves every mask empty must be told from one that is wrong.

    Args:
        class_names: by class index; the first is the background.
        surface: also compute HD95, ASSD and NSD, which cost far more than overlap.
        nsd_tolerance: millimetres or pixels, as the distances.
    """

    PRIMARY = "dice"
    DESCRIBING = ("foreground", "true_foreground")

    def __init__(self, class_names: Sequence[str], *, surface: bool = True, nsd_tolerance: float = 2.0) -> None:
        if not (math.isfinite(nsd_tolerance) and nsd_tolerance >= 0):
            raise errors.DataError(f"nsd_tolerance is {nsd_tolerance}; it must be a finite number, 0 or more")
        foreground = class_names[1:]
        columns = ["dice", "iou", *(["hd95", "assd", "nsd"] if surface else [])]
        columns += [f"dice_{name}" for name in foreground] if len(foreground) > 1 else []
        super().__init__(class_names, columns)
        self.surface = surface
        self.nsd_tolerance = float(nsd_tolerance)

    def add(
        self,
        sample_id: str,
        predicted: Ints,
        truth: Ints,
        spacing: Spacing | None = None,
        part: Part | None = None,
        labelled: Sequence[int] = (),
    ) -> None:
        """Score one image, or keep a slice until its volume is whole.

        Args:
            sample_id: of the image.
            predicted: class indices.
            truth: class indices.
            spacing: size of a pixel.
            part: which slice it is of a volume.
            labelled: the classes that were labelled; empty for all. All slices of a volume have the same.

        Shapes: ``predicted`` and ``truth`` (H, W), or (D, H, W) of a whole volume; class indices.
        Units: ``spacing`` ([slice,] row, column) in millimetres a pixel, or None for distances in pixels.

        Raises:
            DataError: if the masks differ in shape, hold a value that is no class, or the spacing is not positive.
        """
        _check_masks(sample_id, predicted, truth, spacing, len(self.class_names))
        if labelled:
            known = np.isin(np.arange(len(self.class_names)), labelled)
            kept = np.where(known, np.arange(len(self.class_names)), 0)
            predicted, truth = kept[predicted], kept[truth]
        if part is None:
            self._score(sample_id, predicted, truth, spacing, labelled)
        else:  # there are at most 256 classes, and a volume may have a thousand slices
            self._collect(part, (predicted.astype(np.uint8), truth.astype(np.uint8), spacing, tuple(labelled)))

    def _whole(self, part: Part, pieces: Sequence[Any]) -> None:
        if len({piece[1].shape for piece in pieces}) > 1:
            raise errors.DataError(f"volume '{part.volume}': its slices differ in size; score one grid")
        predicted, truth = (np.stack([piece[at] for piece in pieces]) for at in (0, 1))
        spacing = pieces[0][2]
        whole = None if spacing is None else (part.step, *spacing)
        self._score(part.volume, predicted, truth, whole, pieces[0][3])

    def _score(
        self,
        sample_id: str,
        predicted: NDArray[Any],
        truth: NDArray[Any],
        spacing: Spacing | None,
        labelled: Sequence[int],
    ) -> None:
        dice, iou = overlap(predicted, truth, len(self.class_names))
        chosen = sorted(set(labelled) - {0}) or list(range(1, len(dice)))
        row = [dice[chosen].mean(), iou[chosen].mean()]
        if self.surface:
            rows = self._surfaces(predicted, truth, spacing)
            row += list(np.mean([rows[number - 1] for number in chosen], axis=0))
        row += [dice[k] if k in chosen else math.nan for k in range(1, len(dice))] if len(dice) > 2 else []
        row += [np.count_nonzero(mask) / mask.size for mask in (predicted, truth)]
        self._insert(sample_id, np.array(row, dtype=np.float64))

    def value(self) -> dict[str, float]:
        """Means over samples of every column: dice, iou, hd95, assd, nsd and, of several classes, ``dice_<class>``.

        Of a class that is labelled in some samples over these, and none of one that is labelled in no sample.
        """
        table = self._table()[:, : len(self.columns)]
        there = ~np.isnan(table)
        if there.all():
            return dict(zip(self.columns, map(float, table.mean(axis=0)), strict=True))
        return {
            name: float(table[there[:, at], at].mean()) for at, name in enumerate(self.columns) if there[:, at].any()
        }

    def bounded(self) -> dict[str, list[float]]:
        """See MetricSet: all but distances."""
        return {name: values for name, values in self.per_sample().items() if bound(name) is not None}

    def _settings(self) -> tuple[Any, ...]:
        return (*super()._settings(), self.nsd_tolerance)

    def _surfaces(
        self, predicted: NDArray[Any], truth: NDArray[Any], spacing: Spacing | None
    ) -> list[tuple[float, float, float]]:
        """(HD95, ASSD, NSD) of every class but 0, with the rule for empty masks."""
        flat = [at for at, size in enumerate(truth.shape) if size == 1][: truth.ndim - 2]
        predicted, truth = (np.squeeze(mask, tuple(flat)) for mask in (predicted, truth))
        spacing = spacing and tuple(size for at, size in enumerate(spacing) if at not in flat)
        diagonal = math.hypot(*np.multiply(truth.shape, spacing or 1.0))
        rows = []
        for k, (here, there) in enumerate(surfaces.boxes(predicted, truth, len(self.class_names)), start=1):
            if here is None and there is None:
                rows.append((0.0, 0.0, 1.0))
            elif here is None or there is None:
                rows.append((diagonal, diagonal, 0.0))
            else:
                box = surfaces.around(here, there)
                pair = predicted[box] == k, truth[box] == k
                rows.append(surfaces.scores(*pair, spacing, self.nsd_tolerance))
        return rows


class ClassificationScores(MetricSet):
    """Balanced accuracy, macro F1, AUROC, AUPRC and calibration from one row of class probabilities a sample.

    The predicted class is the most probable one, the lower index where two are equal. With two classes AUROC and AUPRC
    are those of class 1; with more they are the mean of one-vs-rest over the classes present. Where only one class is
    present they are undefined and their keys are left out. Also stated:

    * ``balanced_accuracy``: mean recall over the classes present in the truth.
    * ``macro_f1``: mean F1 over the classes present in truth or prediction.
    * ``auprc``: average precision (a step sum, no interpolation).
    * ``ece``: expected calibration error of the top label: confidence in 15 bins (0, 1/15], ..., (14/15, 1] of equal
      width, the mean distance of a bin's accuracy from its confidence, weighted by samples.
    * ``brier``: mean squared distance to the one-hot truth, *summed* over classes: 0 best, 2 worst (twice
      the figure often quoted for two classes).
    """

    PRIMARY = "balanced_accuracy"

    def __init__(self, class_names: Sequence[str]) -> None:
        super().__init__(class_names, ["label", *(f"probability_{k}" for k in range(len(class_names)))])

    def add(
        self, sample_id: str, probabilities: NDArray[np.floating[Any]], label: int, part: Part | None = None
    ) -> None:
        """Score one image, or keep a slice until its volume is whole: its probabilities are the mean of its slices'.

        Shapes: ``probabilities`` (K,), 0 or more, sum 1 to within 1e-3 (half precision); they are normalised here.

        Raises:
            DataError: if the probabilities are none, or the label is no class.
        """
        classes = len(self.class_names)
        row = np.asarray(probabilities, dtype=np.float64)
        if row.shape != (classes,):
            raise errors.DataError(
                f"sample '{sample_id}': probabilities of shape {row.shape}; {classes} classes expect ({classes},)"
            )
        if not np.isfinite(row).all() or (row < 0).any() or abs(row.sum() - 1) > 1e-3:
            raise errors.DataError(
                f"sample '{sample_id}': {row.tolist()} are no probabilities; pass the softmax output"
            )
        if not 0 <= label < classes:
            raise errors.DataError(f"sample '{sample_id}': label {label} is no class; labels are 0 to {classes - 1}")
        whole = np.concatenate([[float(label)], row / row.sum()])
        if part is None:
            self._insert(sample_id, whole)
        else:
            self._collect(part, whole)

    def _whole(self, part: Part, pieces: Sequence[Any]) -> None:
        if len({piece[0] for piece in pieces}) > 1:
            raise errors.DataError(f"volume '{part.volume}': its slices have different labels; give it one")
        self._insert(part.volume, np.mean(pieces, axis=0))

    def bounded(self) -> dict[str, list[float]]:
        """See MetricSet: brier alone; the others are no means over samples."""
        table = self._table()
        truth = np.eye(len(self.class_names))[table[:, 0].astype(np.int64)]
        return {"brier": np.square(table[:, 1:] - truth).sum(axis=1).tolist()}

    def value(self) -> dict[str, float]:
        """balanced_accuracy, macro_f1, [auroc, auprc], ece, brier."""
        table = self._table()
        labels, probabilities = table[:, 0].astype(np.int64), table[:, 1:]
        predicted = probabilities.argmax(axis=1)
        present = np.unique(labels)
        recalls = [float((predicted[labels == k] == k).mean()) for k in present]
        values = {"balanced_accuracy": math.fsum(recalls) / len(recalls)}
        either = np.union1d(labels, predicted)
        values["macro_f1"] = float(np.mean([overlap(predicted == k, labels == k, 2)[0][1] for k in either]))
        if len(present) > 1:
            ranked = [1] if len(self.class_names) == 2 else present
            pairs = [(labels == k, probabilities[:, k]) for k in ranked]
            values["auroc"] = float(np.mean([roc_area(*pair) for pair in pairs]))
            values["auprc"] = float(np.mean([average_precision(*pair) for pair in pairs]))
        values["ece"] = calibration_error(probabilities.max(axis=1), predicted == labels)
        truth = np.eye(len(self.class_names))[labels]
        values["brier"] = float(np.square(probabilities - truth).sum(axis=1).mean())
        return values


def overlap(predicted: Ints, truth: Ints, classes: int) -> tuple[Floats, Floats]:
    """(Dice, IoU) of every class, each of shape (classes,); 1 where a class is in neither mask."""
    pairs = truth.ravel().astype(np.int64) * classes + predicted.ravel()
    counts = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes).astype(np.float64)
    both = counts.diagonal()
    sizes = counts.sum(axis=0) + counts.sum(axis=1)
    absent = sizes == 0
    divisor = np.where(absent, 1.0, sizes)
    return np.where(absent, 1.0, 2 * both / divisor), np.where(absent, 1.0, both / (divisor - both))


def roc_area(positive: NDArray[np.bool_], scores: Floats) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties counted half.

    Shapes: both (samples,), with a positive and a negative among them.
    """
    negatives, positives = np.sort(scores[~positive]), scores[positive]
    below = np.searchsorted(negatives, positives, "left") + np.searchsorted(negatives, positives, "right")
    return float(below.mean() / (2 * len(negatives)))


def average_precision(positive: NDArray[np.bool_], scores: Floats) -> float:
    """The precision at each threshold, weighted by the recall it adds (a step sum, no interpolation).

    Shapes: both (samples,), with a positive among them.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # samples of one score are one threshold
    hits = np.cumsum(positive[order])[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / hits[-1])


def calibration_error(confidence: Floats, correct: NDArray[np.bool_], bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error in ``bins`` equal-width bins, open below and closed above.

    Shapes: both (samples,).
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. (3).
    """
    at = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(at, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def summarise(sites: Mapping[str, Mapping[str, float]], counts: Mapping[str, int], primary: str) -> dict[str, Any]:
    """The primary metric over sites: ``macro``, ``weighted`` (by samples), ``worst`` (site and value) and ``gap``.

    Assumes that higher is better. ``gap`` is best minus worst site; of equal worst sites the first by name is named.

    Raises:
        DataError: if there is no site, or one lacks the metric or a positive count.
    """
    if not sites:
        raise errors.DataError(f"no site reported '{primary}', so it has no mean; at least one site must be tested")
    for site in sorted(sites):
        if not math.isfinite(sites[site].get(primary, math.nan)):
            raise errors.DataError(f"site '{site}' has no finite '{primary}'; it reported: {dict(sites[site])}")
        if counts.get(site, 0) < 1:
            raise errors.DataError(f"site '{site}' has a value but {counts.get(site, 0)} samples; at least 1 is needed")
    values = {site: float(sites[site][primary]) for site in sorted(sites)}
    worst = min(values, key=lambda site: values[site])
    return {
        "macro": math.fsum(values.values()) / len(values),
        "weighted": math.fsum(values[site] * counts[site] for site in values) / sum(counts[site] for site in values),
        "worst": {"site": worst, "value": values[worst]},
        "gap": max(values.values()) - values[worst],
    }


def _check_masks(sample_id: str, predicted: Ints, truth: Ints, spacing: Spacing | None, classes: int) -> None:
    if predicted.shape != truth.shape or truth.ndim not in (2, 3) or truth.size == 0:
        raise errors.DataError(
            f"sample '{sample_id}': prediction {predicted.shape} and truth {truth.shape} must be one ([D,] H, W) "
            "shape; bring the prediction back to the truth's size"
        )
    for name, mask in (("prediction", predicted), ("truth", truth)):
        low, high = int(mask.min()), int(mask.max())
        if not np.issubdtype(mask.dtype, np.integer) or low < 0 or high >= classes:
            raise errors.DataError(
                f"sample '{sample_id}': {name} holds {mask.dtype} values {low} to {high}; "
                f"class indices are integers 0 to {classes - 1}"
            )
    if spacing is not None and not all(math.isfinite(size) and size > 0 for size in spacing):
        raise errors.DataError(f"sample '{sample_id}': spacing {spacing} mm; all sizes must be positive and finite")
    if spacing is not None and len(spacing) != truth.ndim:
        raise errors.DataError(f"sample '{sample_id}': spacing {spacing} mm for {truth.ndim} axes; one size an axis")


TABLE = registry.Table(
    "metric set",
    {
        "case-classification": "fedvfm.tasks.metrics:ClassificationScores",
        "classification": "fedvfm.tasks.metrics:ClassificationScores",
        "detection": "fedvfm.tasks.detection_metrics:DetectionScores",
        "segmentation": "fedvfm.tasks.metrics:SegmentationScores",
    },
)

TARGETS = registry.Table(
    "metric set of a target",
    {
        "cox": "fedvfm.tasks.survival_metrics:CoxScores",
        "multi-label": "fedvfm.tasks.target_metrics:MultiLabelScores",
        "ordinal": "fedvfm.tasks.target_metrics:OrdinalScores",
        "regression": "fedvfm.tasks.target_metrics:RegressionScores",
        "survival": "fedvfm.tasks.survival_metrics:SurvivalScores",
    },
)
"""Metric sets of the targets of ``recipe.target.kind`` that are not one class."""


def primary(kind: str, target: str) -> str | None:
    """The metric that ranks models of a task and a target; None of a task that came with another package.

    Args:
        kind: ``recipe.task.kind``.
        target: ``recipe.target.kind``.
    """
    if kind not in TABLE:
        return None
    return str((TARGETS.get(target) if target in TARGETS else TABLE.get(kind)).PRIMARY)
