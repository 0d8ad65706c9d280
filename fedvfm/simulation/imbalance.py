"""Unequal classes of a classification, seen before training: plain cross entropy may end in one answer for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedvfm.config import schema
from fedvfm.data import bags
from fedvfm.data.partition import virtual_hospitals

UNEQUAL = 3.0
"""The commonest class over the rarest from which on it is said."""
SHOWN = 6


def note(what: schema.Experiment, hospitals: Sequence[virtual_hospitals.Hospital]) -> str:
    """What to set where classes are unequal and the recipe neither balances nor weighs them; else empty."""
    task = what.recipe.task
    classes = task.kind in ("classification", *bags.LABELS_OF)
    if not classes or task.class_weights or task.options.get("sampling") == "balanced":
        return ""
    names = what.recipe.data.class_names
    drawn = Counter(sample.label for hospital in hospitals for sample in hospital.train)
    drawn.pop(None, None)  # of hospitals without labels
    counts = [drawn.get(at, 0) for at in range(len(names))]
    present = [count for count in counts if count]
    if not present or max(present) < UNEQUAL * min(present):
        return ""
    total = sum(counts)
    ranked = sorted(zip(counts, names, strict=True), reverse=True)
    shares = ", ".join(f"{name} {count / total:.1%}" for count, name in ranked[:SHOWN])
    more = f" and {len(ranked) - SHOWN} more classes" if len(ranked) > SHOWN else ""
    return (
        f"training classes are unequal ({shares}{more}), and one answer for all images may come of it. Set "
        "recipe.task.options.sampling = 'balanced'; under a privacy mechanism at the site, where it cannot be had, "
        f"recipe.task.class_weights = {weights(counts)}"
    )


def weights(counts: Sequence[int]) -> list[float]:
    """A weight for each class, inverse to its count, that are 1 in the mean over samples; 0 for an absent class."""
    present = sum(count > 0 for count in counts)
    return [round(sum(counts) / (present * count), 3) if count else 0.0 for count in counts]
