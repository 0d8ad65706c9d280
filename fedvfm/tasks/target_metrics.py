"""Metric sets of the targets that are not one class: grades, several labels, numbers.

The metric that ranks models lies between 0 and 1 and higher is better, for every target: it has a value wherever one
sample was scored, and what assumes so (adoption at a site, noised scores, intervals) holds for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.tasks import metrics

Floats = NDArray[np.float64]


class OrdinalScores(metrics.ClassificationScores):
    """What :class:`fedvfm.tasks.metrics.ClassificationScores` states, and how far answers are off in grades.

    * ``quadratic_kappa``: 1 minus the mean squared distance in grades, over that of answers shuffled among the samples;
      1 best, 0 as by chance. Left out where all truths and answers are one grade, of which it says nothing.
    * ``mae``: mean distance of the answer from the truth in grades; 0 best. A constant answer may have a small one.

    Source: Cohen, "Weighted kappa", Psychological Bulletin 70, 1968, with quadratic weights; equal to scikit-learn's
        ``cohen_kappa_score(weights="quadratic")``.
    """

    def value(self) -> dict[str, float]:
        """See the class."""
        table = self._table()
        truth, answered = table[:, 0], table[:, 1:].argmax(axis=1).astype(np.float64)
        values = super().value() | {"mae": float(np.abs(answered - truth).mean())}
        # The mean over all pairs of an answer and a truth; there are too many to write them down.
        by_chance = float(answered.var() + truth.var() + np.square(answered.mean() - truth.mean()))
        if by_chance > 0:
            values["quadratic_kappa"] = 1 - float(np.square(answered - truth).mean()) / by_chance
        return values


class ColumnScores(metrics.MetricSet):
    """Base of metric sets over columns of a table: truths and answers of each, those that are missing left out.

    A row holds for each column whether its truth is known (1, else 0), the truth (0 where it is not) and the answer.

    Args:
        class_names: of the columns.
    """

    def __init__(self, class_names: Sequence[str], columns: Sequence[str]) -> None:
        if not class_names:
            raise errors.DataError("no column is named; name at least one in recipe.data.class_names")
        # A regression may be of one column alone.
        super().__init__(class_names if len(class_names) > 1 else (*class_names, ""), columns)
        self.class_names = tuple(class_names)

    def add(self, sample_id: str, answers: Floats, truth: Sequence[float | None], part: metrics.Part | None) -> None:
        """Score one sample, or keep a slice until its volume is whole: its answers are the mean of its slices'.

        Shapes: ``answers`` and ``truth`` (K,); None where a truth is missing.

        Raises:
            DataError: if a number is not finite, there are other numbers than columns, or no truth is known.
        """
        known = np.array([value is not None for value in truth])
        row = np.asarray(answers, dtype=np.float64)
        if row.shape != (len(self.class_names),) or len(truth) != len(self.class_names):
            raise errors.DataError(
                f"sample '{sample_id}': answers of shape {row.shape} and {len(truth)} truths; "
                f"{len(self.class_names)} columns are expected"
            )
        truths = np.array([0.0 if value is None else value for value in truth], dtype=np.float64)
        if not np.isfinite(row).all() or not np.isfinite(truths).all():
            raise errors.DataError(f"sample '{sample_id}': an answer or a truth is no finite number")
        if not known.any():
            raise errors.DataError(f"sample '{sample_id}': no column has a truth to score against; leave it out")
        whole = np.concatenate([known, truths, row])
        if part is None:
            self._insert(sample_id, self._scored(whole))
        else:
            self._collect(part, whole)

    def _whole(self, part: metrics.Part, pieces: Sequence[Any]) -> None:
        count = 2 * len(self.class_names)
        if any(not np.array_equal(piece[:count], pieces[0][:count]) for piece in pieces):
            raise errors.DataError(f"volume '{part.volume}': its slices have different truths; give it one")
        self._insert(part.volume, self._scored(np.mean(pieces, axis=0)))

    def _scored(self, whole: Floats) -> Floats:
        """The row of a sample, its own score first."""
        known, truth, answer = self._split(whole[None])
        return np.concatenate([[float(self._each(known, truth, answer)[0])], whole])

    def _split(self, table: Floats) -> tuple[NDArray[np.bool_], Floats, Floats]:
        """(known, truth, answer), each of shape (samples, columns)."""
        known, truth, answer = np.split(table, 3, axis=1)
        return known > 0, truth, answer

    def _each(self, known: NDArray[np.bool_], truth: Floats, answer: Floats) -> Floats:
        """The primary metric of every sample alone, 0 to 1: the mean over its known columns. Shapes: (samples,)."""
        raise NotImplementedError

    def bounded(self) -> dict[str, list[float]]:
        """See MetricSet: the primary metric."""
        return {self.PRIMARY: [float(value) for value in self._table()[:, 0]]}


def _columns(primary: str, class_names: Sequence[str]) -> list[str]:
    return [primary, *(f"{what}_{k}" for what in ("known", "truth", "answer") for k in range(len(class_names)))]


class MultiLabelScores(ColumnScores):
    """Labels of which each is there or not, from one probability each.

    * ``one_minus_brier``: 1 minus the mean squared distance of probability and truth, over the known labels of a sample
      and then over samples. It ranks models: always defined, and best only for probabilities that are right.
    * ``balanced_accuracy``: mean over labels of the mean recall of yes and no; yes is a probability of at least the
      label's stated prevalence (1/2 where none is stated).
    * ``auroc_LABEL``, ``auprc_LABEL``, and ``auroc``, ``auprc`` as their means over labels. A label of which all known
      truths are alike has none of the four and is in no mean.

    Args:
        class_names: of the labels.
        thresholds: from which probability on each is answered yes.
    """

    PRIMARY = "one_minus_brier"

    def __init__(self, class_names: Sequence[str], thresholds: Sequence[float] = ()) -> None:
        super().__init__(class_names, _columns(self.PRIMARY, class_names))
        self.thresholds = tuple(thresholds) or (0.5,) * len(class_names)

    def _settings(self) -> tuple[Any, ...]:
        return (*super()._settings(), self.thresholds)

    def _each(self, known: NDArray[np.bool_], truth: Floats, answer: Floats) -> Floats:
        return np.asarray(1 - np.where(known, np.square(answer - truth), 0.0).sum(axis=1) / known.sum(axis=1))

    def value(self) -> dict[str, float]:
        """one_minus_brier, [balanced_accuracy, auroc, auprc, and auroc and auprc of each label]."""
        table = self._table()
        values = {self.PRIMARY: float(table[:, 0].mean())}
        known, truth, answer = self._split(table[:, 1:])
        recalls, areas = [], dict[str, tuple[float, float]]()
        for k, name in enumerate(self.class_names):
            positive, chances = truth[known[:, k], k] > 0, answer[known[:, k], k]
            if positive.any() and not positive.all():
                said = chances >= self.thresholds[k]
                recalls.append((float(said[positive].mean()) + float((~said[~positive]).mean())) / 2)
                areas[name] = metrics.roc_area(positive, chances), metrics.average_precision(positive, chances)
        if areas:
            values["balanced_accuracy"] = float(np.mean(recalls))
            values["auroc"], values["auprc"] = (float(np.mean(column)) for column in zip(*areas.values(), strict=True))
        for name, (roc, precision) in areas.items():
            values |= {f"auroc_{name}": roc, f"auprc_{name}": precision}
        return values


class RegressionScores(ColumnScores):
    """Numbers within declared ranges.

    * ``one_minus_nmae``: 1 minus the mean absolute error as a share of the declared range, over the known columns of a
      sample and then over samples; answers outside the range count as at its end. It ranks models: always defined,
      never below 0. The wider the range, the closer all its values lie to 1.
    * ``mae_COLUMN``: mean absolute error in the column's own unit, of the answers as they are; 0 best.
    * ``r2_COLUMN``: 1 minus the squared error over that of the samples' own mean; below 0 where the mean does better.
      Left out where all known truths are alike.

    Args:
        class_names: of the columns.
        ranges: (least, greatest) of each.
    """

    PRIMARY = "one_minus_nmae"

    def __init__(self, class_names: Sequence[str], ranges: Sequence[tuple[float, float]]) -> None:
        super().__init__(class_names, _columns(self.PRIMARY, class_names))
        self.ranges = tuple((float(low), float(high)) for low, high in ranges)

    def _settings(self) -> tuple[Any, ...]:
        return (*super()._settings(), self.ranges)

    def _each(self, known: NDArray[np.bool_], truth: Floats, answer: Floats) -> Floats:
        low, high = np.array(self.ranges).T
        shares = np.abs(np.clip(answer, low, high) - np.clip(truth, low, high)) / (high - low)
        return np.asarray(1 - np.where(known, shares, 0.0).sum(axis=1) / known.sum(axis=1))

    def value(self) -> dict[str, float]:
        """one_minus_nmae, and mae and [r2] of each column."""
        table = self._table()
        values = {self.PRIMARY: float(table[:, 0].mean())}
        known, truth, answer = self._split(table[:, 1:])
        for k, name in enumerate(self.class_names):
            own, said = truth[known[:, k], k], answer[known[:, k], k]
            if not len(own):
                continue
            values[f"mae_{name}"] = float(np.abs(said - own).mean())
            spread = float(np.square(own - own.mean()).sum())
            if spread > 0:
                values[f"r2_{name}"] = 1 - float(np.square(said - own).sum()) / spread
        return values
