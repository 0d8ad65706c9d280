"""What a classifier answered at a site: the confusion matrix, the recall of every class, and how often it said what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm.report import bootstrap


@dataclass(frozen=True, slots=True)
class Answers:
    """Counts of test samples by their class and the class answered.

    Attributes:
        confusion: shape (K, K); rows are true classes, columns are answers.
        class_names: K names.
    """

    confusion: NDArray[np.int64]
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, table: Mapping[str, Sequence[float]], class_names: Sequence[str]) -> Answers:
        """From the per-sample columns ``label`` and ``probability_0`` ... of a classification."""
        own = {name: values for name, values in table.items() if name != "id"}
        confusion = np.zeros((len(class_names), len(class_names)), dtype=np.int64)
        labels = np.asarray(own["label"], dtype=np.int64)
        np.add.at(confusion, (labels, np.asarray(bootstrap.predicted(own), dtype=np.int64)), 1)
        return cls(confusion, tuple(class_names))

    def __add__(self, other: Answers) -> Answers:
        return Answers(self.confusion + other.confusion, self.class_names)

    @property
    def tested(self) -> int:
        """Number of test samples."""
        return int(self.confusion.sum())

    @property
    def samples(self) -> dict[str, int]:
        """Class -> its test samples."""
        return dict(zip(self.class_names, map(int, self.confusion.sum(axis=1)), strict=True))

    @property
    def recall(self) -> dict[str, float | None]:
        """Class -> share of its samples that were answered right; None of a class without a test sample."""
        right = self.confusion.diagonal()
        return {
            name: float(right[at] / count) if count else None for at, (name, count) in enumerate(self.samples.items())
        }

    @property
    def never(self) -> list[str]:
        """Classes that have test samples and were never answered."""
        answered = self.confusion.sum(axis=0)
        return [name for at, (name, count) in enumerate(self.samples.items()) if count and not answered[at]]

    @property
    def commonest(self) -> tuple[str, float]:
        """The commonest answer and its share of all answers."""
        answered = self.confusion.sum(axis=0)
        most = int(answered.argmax())
        return self.class_names[most], float(answered[most] / max(self.tested, 1))

    @property
    def constant(self) -> bool:
        """Whether all of several test samples got one answer."""
        return self.tested > 1 and self.commonest[1] == 1.0

    @property
    def chance(self) -> float:
        """Balanced accuracy of any answer that does not look at the image: 1 over the number of classes tested."""
        return 1 / max(sum(count > 0 for count in self.samples.values()), 1)

    def row(self) -> dict[str, Any]:
        """As summary.json states it."""
        name, share = self.commonest
        return {
            "confusion": self.confusion.tolist(),
            "recall": self.recall,
            "commonest": {"class": name, "share": share},
            "chance": self.chance,
        }


def by_site(tables: Mapping[str, Mapping[str, Sequence[float]]], class_names: Sequence[str]) -> dict[str, Answers]:
    """Every site's answers; empty where the tables are of no classification."""
    return {site: Answers.of(table, class_names) for site, table in tables.items() if "label" in table}
