"""The ``classical`` baseline: what thresholds alone reach, with nothing learned but a rule and a few numbers.

Two classes: Otsu's threshold on each image, and one rule for which side is the foreground, chosen on the training
images. More classes: one set of thresholds and one order of the classes, the best there is for the pooled training
pixels. Works on pixels as read, at native resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.data import defect
from fedvfm.data.partition import virtual_hospitals

LEVELS = 256
MAX_CLASSES = 8
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)[:, None, None]


class Classical(Protocol):
    """A fitted baseline."""

    def predict(self, image: NDArray[np.float32]) -> NDArray[np.int64]:
        """Class of every pixel: image (C, H, W) in [0, 1] -> (H, W)."""
        ...

    def describe(self) -> str:
        """What was fitted, in a few words for the report."""
        ...


def fit(hospitals: Sequence[virtual_hospitals.Hospital], num_classes: int) -> Classical:
    """Fit on the training samples of all hospitals.

    Raises:
        DataError: without a training sample, for a missing mask or one with other classes, and for over 8 classes.
    """
    if not 2 <= num_classes <= MAX_CLASSES:
        raise errors.DataError(
            f"classical handles 2 to {MAX_CLASSES} classes, not {num_classes}; take 'classical' out of the baselines"
        )
    hospitals = [hospital for hospital in hospitals if not hospital.without_labels]
    if not any(hospital.train for hospital in hospitals):
        raise errors.DataError("classical: no hospital has a training sample; check the partition")
    return _fit_otsu(hospitals) if num_classes == 2 else _fit_thresholds(hospitals, num_classes)


def grey(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """(C, H, W) -> (H, W): Rec. 601 luminance of three channels, else the mean."""
    return np.asarray((image * _LUMINANCE).sum(axis=0) if len(image) == 3 else image.mean(axis=0), dtype=np.float32)


def otsu(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The pixels above the threshold that separates two groups best; none in a constant image.

    Maximises the variance between the groups over a histogram of 256 bins from the darkest to the brightest pixel.

    Source: Otsu, "A threshold selection method from gray-level histograms", IEEE Trans. Systems, Man, and Cybernetics
        9(1), 1979, eq. (18).
    """
    low, high = float(values.min()), float(values.max())
    if not low < high:
        return np.zeros(values.shape, dtype=np.bool_)
    levels = _levels((values - low) / (high - low))
    share = np.bincount(levels.ravel(), minlength=LEVELS) / levels.size
    omega, mu = np.cumsum(share)[:-1], np.cumsum(share * np.arange(LEVELS))
    # Both ends of the histogram are filled, so omega (1 - omega) is never 0.
    between = (mu[-1] * omega - mu[:-1]) ** 2 / (omega * (1 - omega))
    return np.asarray(levels > int(between.argmax()))


def _by_border(bright: NDArray[np.bool_]) -> NDArray[np.bool_]:
    border = np.concatenate([bright[0], bright[-1], bright[:, 0], bright[:, -1]])
    return bright if border.mean() <= 0.5 else ~bright


def _by_area(bright: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return bright if bright.mean() <= 0.5 else ~bright


RULES: dict[str, Callable[[NDArray[np.bool_]], NDArray[np.bool_]]] = {
    "the side that is rarer at the image's border": _by_border,
    "the smaller side": _by_area,
    "the brighter side": lambda bright: bright,
    "the darker side": lambda bright: ~bright,
}
"""Which side of the threshold is the foreground. The first two decide for each image."""


@dataclass(frozen=True, slots=True)
class Otsu:
    """Otsu's threshold on each image; ``rule`` (a key of RULES) says which side is class 1.

    A constant image is all background.
    """

    rule: str

    def predict(self, image: NDArray[np.float32]) -> NDArray[np.int64]:
        """Class of every pixel: image (C, H, W) in [0, 1] -> (H, W)."""
        bright = otsu(grey(image))
        return (RULES[self.rule](bright) if bright.any() else bright).astype(np.int64)

    def describe(self) -> str:
        """What was fitted."""
        return f"Otsu's threshold on each image; foreground is {self.rule}"


def _fit_otsu(hospitals: Sequence[virtual_hospitals.Hospital]) -> Otsu:
    """The rule with the best mean Dice over the hospitals; images without foreground have no say."""
    scores = np.array([_rule_scores(hospital) for hospital in hospitals if hospital.train]).mean(axis=0)
    return Otsu(list(RULES)[int(scores.argmax())])


def _rule_scores(hospital: virtual_hospitals.Hospital) -> list[float]:
    scores = []
    for image, mask in _pairs(hospital, 2):
        bright, truth = otsu(grey(image)), mask == 1
        if truth.any():
            scores.append([_dice(rule(bright), truth) for rule in RULES.values()])
    return [float(score) for score in np.mean(scores, axis=0)] if scores else [0.0] * len(RULES)


def _dice(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    return 2 * float((predicted & truth).sum()) / float(predicted.sum() + truth.sum())


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The same thresholds for every image.

    Attributes:
        cuts: first level (of 256) of every interval but the lowest, ascending; equal neighbours: an empty interval.
        order: the class of every interval, from dark to bright.
    """

    cuts: tuple[int, ...]
    order: tuple[int, ...]

    def predict(self, image: NDArray[np.float32]) -> NDArray[np.int64]:
        """Class of every pixel: image (C, H, W) in [0, 1] -> (H, W)."""
        return np.array(self.order, dtype=np.int64)[np.digitize(_levels(grey(image)), self.cuts)]

    def describe(self) -> str:
        """What was fitted."""
        cuts = ", ".join(f"{cut / LEVELS:.3f}" for cut in self.cuts)
        return f"thresholds {cuts} for all images; classes from dark to bright: {', '.join(map(str, self.order))}"


def _fit_thresholds(hospitals: Sequence[virtual_hospitals.Hospital], num_classes: int) -> Thresholds:
    counts = np.zeros((num_classes, LEVELS))
    for hospital in hospitals:
        for image, mask in _pairs(hospital, num_classes):
            cells = mask * LEVELS + _levels(grey(image))
            counts += np.bincount(cells.ravel(), minlength=counts.size).reshape(counts.shape)
    return best_thresholds(counts)


def best_thresholds(counts: NDArray[np.float64]) -> Thresholds:
    """The cuts and the order with the highest mean Dice over the foreground classes (1 to K - 1) on pooled pixels.

    Exact: an interval's Dice depends on its own two ends only, so the best filling of the levels below ``b`` with a set
    of classes extends the best filling below some ``a <= b`` with one class less.

    Shapes: counts (K, levels), pixels of each class at each level.
    """
    gains = _gains(counts)
    classes, size = len(gains), gains.shape[1]
    best = np.full((2**classes, size), -np.inf)
    best[0, 0] = 0.0
    back: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    for chosen in range(1, 2**classes):
        members = [k for k in range(classes) if chosen >> k & 1]
        ways = np.stack([best[chosen ^ 1 << k][:, None] + gains[k] for k in members])
        start = ways.argmax(axis=1)
        value = ways.max(axis=1)
        last = value.argmax(axis=0)
        best[chosen] = value.max(axis=0)
        back[chosen] = np.array(members)[last], start[last, np.arange(size)]
    return _trace(back, classes, size - 1)


def _gains(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Dice of class k on the interval [a, b), as (K, a, b); 0 for the background, -inf where a > b."""
    below = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(counts, axis=1)], axis=1)
    inside = below[:, None, :] - below[:, :, None]
    gains = 2 * inside / np.maximum(inside.sum(axis=0) + below[:, -1:, None], 1)
    gains[0] = 0.0
    size = gains.shape[1]
    return np.where(np.tri(size, k=-1, dtype=np.bool_), -np.inf, gains)


def _trace(back: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]], classes: int, end: int) -> Thresholds:
    chosen, cuts, order = 2**classes - 1, [], []
    while chosen:
        last, start = (int(table[end]) for table in back[chosen])
        chosen, end = chosen ^ 1 << last, start
        order.append(last)
        cuts.append(start)
    return Thresholds(tuple(cuts[-2::-1]), tuple(order[::-1]))


def _levels(values: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.clip(values * LEVELS, 0, LEVELS - 1).astype(np.int64)


def _pairs(
    hospital: virtual_hospitals.Hospital, num_classes: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    for sample in hospital.train:
        pixels = hospital.read(sample)
        if pixels.mask is None:
            raise defect.MASK_MISSING.error(
                f"classical: sample '{sample.id}' has no mask; the baseline is for segmentation only"
            )
        low, high = int(pixels.mask.min()), int(pixels.mask.max())
        if low < 0 or high >= num_classes:
            raise defect.MASK_VALUE.error(
                f"classical: the mask of sample '{sample.id}' holds values {low} to {high}, "
                f"the task has classes 0 to {num_classes - 1}"
            )
        yield pixels.image, pixels.mask
