"""Scores of detected boxes: average precision, FROC, and one F1 an image. NumPy only.

* ``f1``: of each image 2 hits / (boxes + objects), of the boxes from the recipe's threshold on, a hit at an overlap of
  at least 0.5; 1 of an image with neither, and then the mean over images. It ranks models: each image has its own, so
  that intervals and tests draw images and patients, and it is of the boxes that are delivered.
* ``map50``, ``map10``: mean average precision over the classes with an object, a hit at an overlap of 0.5 or 0.1, of
  all boxes from :data:`LEAST_SCORE` on; of several classes ``ap50_CLASS``, too.
* ``froc_RATE``: the share of objects that is met (overlap 0.1) at the threshold at which there are at most so many
  false alarms an image, of all classes together; ``cpm`` their mean, the competition performance metric.

Overlap is intersection over union. What rests on objects is left out where there is none.

Source: Everingham et al., IJCV 2010 (average precision), with precision at 101 recalls as in COCO (Lin et al., ECCV
    2014); Bunch et al., "A free-response approach to the measurement and characterization of radiographic-observer
    performance", 1978 (FROC); Niemeijer et al., "On Combining Computer-Aided Detection Systems", IEEE TMI 30, 2011
    (CPM). The curve of FROC is a step: between two thresholds nothing is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.tasks import boxes, metrics

LEAST_SCORE = 0.05
"""Boxes of a lower score are none: what average precision and FROC rest on."""
HIT, NEAR = 0.5, 0.1
"""Overlaps from which on a box meets an object; the second where masks of readers differ, as they do of lesions."""
RATES = (0.125, 0.25, 0.5, 1, 2, 4, 8)
"""False alarms an image at which FROC is read."""
RECALLS = np.linspace(0.0, 1.0, 101)
OF_CLASS = "ap50_"

Floats = NDArray[np.float64]


def names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Every metric of these classes, the background first."""
    several = [f"{OF_CLASS}{name}" for name in class_names[1:]] if len(class_names) > 2 else []
    return ("f1", "map50", "map10", "cpm", *(f"froc_{rate:g}" for rate in RATES), *several)


class DetectionScores(metrics.MetricSet):
    """See the module. A row is the image's F1, what it describes, and its boxes.

    Of a volume every slice is an image; hits, boxes and objects of its slices are added up to the volume's row.

    Args:
        class_names: by class number; the first is the background.
        threshold: of the boxes that are delivered.
    """

    PRIMARY = "f1"
    DESCRIBING: ClassVar[tuple[str, ...]] = ("objects", "hits", "false_alarms")

    def __init__(self, class_names: Sequence[str], threshold: float) -> None:
        super().__init__(class_names, ["f1"])
        self.threshold = float(threshold)

    def add(self, sample_id: str, predicted: boxes.Boxes, truth: boxes.Boxes, part: metrics.Part | None = None) -> None:
        """Score one image, or keep a slice until its volume is whole.

        Args:
            sample_id: of the image.
            predicted: boxes on the image's own pixels.
            truth: of the objects.
            part: which slice it is of a volume.

        Raises:
            DataError: for a class that is none, or a score that is no number of 0 to 1.
        """
        for name, given in (("prediction", predicted), ("truth", truth)):
            wrong = given.classes[(given.classes < 1) | (given.classes >= len(self.class_names))]
            if (
                len(wrong)
                or not np.isfinite(given.edges).all()
                or not ((given.scores >= 0) & (given.scores <= 1)).all()
            ):
                raise errors.DataError(
                    f"sample '{sample_id}': {name} holds a box of no class, place or score; classes are 1 to "
                    f"{len(self.class_names) - 1}, scores 0 to 1"
                )
        ordered = predicted[np.argsort(-predicted.scores, kind="stable")]
        ordered = ordered[ordered.scores >= min(LEAST_SCORE, self.threshold)]
        met = [boxes.matched(ordered, truth, overlap).astype(np.float64) for overlap in (HIT, NEAR)]
        rows = np.stack([ordered.scores, ordered.classes.astype(np.float64), *met], axis=1)
        counts = np.bincount(truth.classes, minlength=len(self.class_names)).astype(np.float64)
        if part is None:
            self._whole_of(sample_id, [(rows, counts)])
        else:
            self._collect(part, (rows, counts))

    def _whole(self, part: metrics.Part, pieces: Sequence[Any]) -> None:
        self._whole_of(part.volume, pieces)

    def _whole_of(self, name: str, images: Sequence[tuple[Floats, Floats]]) -> None:
        """A row: F1, objects, hits, false alarms; number of images, objects of each class; score, class, hits."""
        rows, counts = np.concatenate([each for each, _ in images]), np.sum([own for _, own in images], axis=0)
        delivered = rows[rows[:, 0] >= self.threshold]
        objects, hits = float(counts.sum()), float(delivered[:, 2].sum())
        total = len(delivered) + objects
        f1 = 2 * hits / total if total else 1.0
        known = [f1, objects, hits, len(delivered) - hits, float(len(images)), *counts]
        self._insert(name, np.concatenate([np.array(known), rows.ravel()]))

    def bounded(self) -> dict[str, list[float]]:
        """See MetricSet: F1."""
        return {self.PRIMARY: [float(value) for value in self._table()[:, 0]]}

    def value(self) -> dict[str, float]:
        """f1, and where there are objects map50, map10, cpm, froc_RATE and, of several classes, ap50_CLASS."""
        values = {self.PRIMARY: float(self._table()[:, 0].mean())}
        start, end = 4, 5 + len(self.class_names)
        ordered = [self._rows[name] for name in self.ids]
        images, counts = float(sum(row[start] for row in ordered)), np.sum([row[start + 1 : end] for row in ordered], 0)
        rows = np.concatenate([row[end:].reshape(-1, 4) for row in ordered])
        rows = rows[rows[:, 0] >= LEAST_SCORE]
        present = [number for number in range(1, len(counts)) if counts[number]]
        if not present:
            return values
        of_class = {number: rows[rows[:, 1] == number] for number in present}
        precise = {
            name: [average_precision(of_class[k][:, 0], of_class[k][:, at], counts[k]) for k in present]
            for name, at in (("map50", 2), ("map10", 3))
        }
        values |= {name: float(np.mean(own)) for name, own in precise.items()}
        rates = froc(rows[:, 0], rows[:, 3], float(counts.sum()), images)
        values["cpm"] = float(np.mean(rates))
        values |= {f"froc_{rate:g}": share for rate, share in zip(RATES, rates, strict=True)}
        if len(self.class_names) > 2:
            shown = [f"{OF_CLASS}{self.class_names[k]}" for k in present]
            values |= dict(zip(shown, precise["map50"], strict=True))
        return values

    def _settings(self) -> tuple[Any, ...]:
        return (*super()._settings(), self.threshold)


def average_precision(scores: Floats, met: Floats, objects: float) -> float:
    """Mean over 101 recalls of the highest precision at that recall or a higher one; 0 where it is not reached.

    Args:
        scores: of all boxes of one class.
        met: 1 for a hit, 0 for a false alarm.
        objects: how many there are of the class.

    Shapes: both (N,).
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(met[order])
    recall, precision = hits / objects, hits / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, RECALLS, side="left")
    return float(np.mean(np.append(best, 0.0)[np.minimum(at, len(best))]))


def froc(scores: Floats, met: Floats, objects: float, images: float) -> list[float]:
    """The share of objects that is met at each of :data:`RATES`, the most at any threshold that keeps the rate.

    Boxes of one score are all there or none.

    Shapes: scores and met (N,).
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1) if len(scores) else np.empty(0, np.intp)
    hits, alarms = (np.cumsum(each[order])[last] for each in (met, 1 - met))
    return [float(hits[alarms <= rate * images].max(initial=0.0) / objects) for rate in RATES]
