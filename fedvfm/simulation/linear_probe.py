"""The ``classical`` baseline of classification: logistic regression on what the frozen backbone makes of each image.

All training images in one place, no adapter, no rounds, and no random number: what pretraining alone gives. An adapter
that does not beat it has learned little that is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

INVERSE_STRENGTH = 1.0
STEPS = 500
"""Iterations of L-BFGS at most."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """A fitted logistic regression.

    Attributes:
        centre: mean of the training features, shape (D,).
        spread: their standard deviation, 1 where it is 0; shape (D,).
        weight: shape (K, D); rows of classes without a training image are not used.
        bias: shape (K,); minus infinity for a class without a training image.
    """

    centre: Floats
    spread: Floats
    weight: Floats
    bias: Floats

    def predict(self, features: Floats) -> Floats:
        """Class probabilities. Shapes: (D,) -> (K,)."""
        logits = self.weight @ ((features - self.centre) / self.spread) + self.bias
        chances = np.exp(logits - logits.max())
        return np.asarray(chances / chances.sum(), dtype=np.float64)

    def describe(self) -> str:
        """What was fitted."""
        return (
            "logistic regression on the frozen backbone's pooled features of all training images in one place, "
            f"standardised, classes weighted equally, L2 with C = {INVERSE_STRENGTH:g}"
        )


def standardised(features: Floats) -> tuple[Floats, Floats, Floats]:
    """Features in units of their standard deviations, 1 where one is 0, from their means; means and deviations.

    Shapes: (N, D) -> (N, D), (D,), (D,).
    """
    centre, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    return (features - centre) / spread, centre, spread


def fit(features: Floats, labels: Ints, classes: int) -> LinearProbe:
    """Minimise the class-balanced cross entropy with an L2 penalty on the weights, none on the bias.

    The objective is scikit-learn's ``LogisticRegression(C=1, class_weight="balanced")`` on standardised features:
    ``|W|^2 / 2 + C sum_i s_i loss_i`` with ``s_i = N / (K' N_k)`` over the K' classes present.

    Shapes: features (N, D), labels (N,) of class numbers.
    """
    from scipy import optimize

    inputs, centre, spread = standardised(features)
    present, at = np.unique(labels, return_inverse=True)
    counts = np.bincount(at)
    weights = INVERSE_STRENGTH * len(labels) / (len(present) * counts[at])
    truth = np.eye(len(present))[at]

    def objective(flat: Floats) -> tuple[float, Floats]:
        own = flat.reshape(len(present), -1)
        logits = inputs @ own[:, :-1].T + own[:, -1]
        logits -= logits.max(axis=1, keepdims=True)
        total = np.exp(logits).sum(axis=1, keepdims=True)
        losses = np.log(total[:, 0]) - (logits * truth).sum(axis=1)
        error = weights[:, None] * (np.exp(logits) / total - truth)
        gradient = np.concatenate([error.T @ inputs + own[:, :-1], error.sum(axis=0)[:, None]], axis=1)
        return float(weights @ losses + np.square(own[:, :-1]).sum() / 2), gradient.ravel()

    start = np.zeros(len(present) * (inputs.shape[1] + 1))
    best = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
    own = best.x.reshape(len(present), -1)
    weight, bias = np.zeros((classes, inputs.shape[1])), np.full(classes, -np.inf)
    weight[present], bias[present] = own[:, :-1], own[:, -1]
    return LinearProbe(centre, spread, weight, bias)


def majority(labels: Sequence[int], classes: int) -> Floats:
    """Shares of the classes among training labels, shape (K,): the commonest is the answer to every image.

    Without a training label all are equally common.
    """
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=classes).astype(np.float64)
    return np.asarray(
        (counts if labels else counts + 1) / max(counts.sum(), 1 if labels else classes), dtype=np.float64
    )
