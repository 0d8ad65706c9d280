"""What a classification answers with: one class, a grade, several labels, numbers; and the public facts it needs."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from fedvfm.config import base

Chance = Annotated[float, Field(gt=0.0, lt=1.0)]
Range = Annotated[tuple[float, float], Field(strict=False)]

OF_COLUMNS = ("cox", "multi-label", "regression", "survival")
"""Targets that are columns of the table, called as ``recipe.data.class_names``; the others are its column ``label``."""
PROGNOSIS = ("cox", "survival")
"""Targets that are a time and an event."""


class TargetConfig(pydantic.BaseModel):
    """What is answered for an image or a case; see :mod:`fedvfm.tasks.targets`.

    With "survival" and "cox" the two ``class_names`` are the columns of a time and of an event (1: it happened then; 0:
    it had not happened then, the case is censored).

    "class" and "ordinal" learn the column ``label``; with "ordinal" ``recipe.data.class_names`` are grades, the lowest
    first. "multi-label" and "regression" learn columns of the table that are called as ``class_names``.
    """

    model_config = base.SETTINGS

    kind: Literal["class", "cox", "multi-label", "ordinal", "regression", "survival"] = "class"
    """class (one of several), ordinal (grades in their order), multi-label (each yes or no), regression (numbers),
    survival (time until an event, by chances in intervals) or cox (the same, by a risk learned inside each site).
    Change: to what the labels are; docs/targets.md says which columns each needs."""
    prevalence: Annotated[tuple[Chance, ...], base.names()] = ()
    """(share of cases) Of multi-label, how common each label is, from public knowledge: yes and no then weigh alike in
    the loss. Empty: no weights. Change: where labels are rare. Never take them from the sites' own counts."""
    ranges: Annotated[tuple[Range, ...], base.names()] = ()
    """(units of the column) Of regression, the least and the greatest value of each number; what lies outside is
    refused before training. Change: to what is possible at all."""
    centres: Annotated[tuple[float, ...], base.names()] = ()
    """(units of the column) Of regression, a usual value of each number, from public knowledge. Change: to a published
    mean."""
    scales: Annotated[tuple[base.Positive, ...], base.names()] = ()
    """(units of the column) Of regression, how much each number usually differs from its centre. Change: to a published
    standard deviation."""
    units: Annotated[tuple[base.Name, ...], base.names()] = ()
    """Of regression, survival and cox, the unit of each column, as reports and predictions show it. Change: to that of
    the tables."""

    bins: Annotated[tuple[base.Positive, ...], base.names()] = ()
    """(units of the time) Of survival, the ends of the intervals in which the event may fall, ascending, from public
    knowledge. The last one is how far is answered; whoever is followed up longer counts as alive there. Of cox, points
    of the report's curves, of which the last one ends Uno's C-index. Change: to points that clinicians ask for."""

    @property
    def of_columns(self) -> bool:
        """Whether it is columns of the table, and not the column ``label``."""
        return self.kind in OF_COLUMNS

    @property
    def prognosis(self) -> bool:
        """Whether it is a time and an event."""
        return self.kind in PROGNOSIS

    def faults(self, names: tuple[str, ...]) -> list[str]:
        """What does not fit together, one sentence a fault.

        Args:
            names: ``recipe.data.class_names``.
        """
        needed = {"multi-label": (), "regression": ("ranges", "centres", "scales")}.get(self.kind, ())
        known = {"multi-label": ("prevalence",), "regression": (*needed, "units")}.get(
            self.kind, ("units",) if self.prognosis else ()
        )
        wrong = []
        for key in ("prevalence", "ranges", "centres", "scales", "units"):
            given = getattr(self, key)
            if given and key not in known:
                wrong.append(f"recipe.target.{key}: kind '{self.kind}' does not read it; leave it out")
            elif (given or key in needed) and len(given) != len(names):
                wrong.append(
                    f"recipe.target.{key}: {len(given)} given for {len(names)} of recipe.data.class_names "
                    f"({', '.join(names)}); give one for each"
                )
        if self.bins and not self.prognosis:
            wrong.append(f"recipe.target.bins: kind '{self.kind}' does not read it; leave it out")
        least = 1 if self.kind == "cox" else 2
        if self.prognosis and (len(names) != 2 or len(self.bins) < least or list(self.bins) != sorted(set(self.bins))):
            wrong.append(
                f"recipe.target: {self.kind} needs two columns in recipe.data.class_names, time and event "
                f"({len(names)} given), and at least {'one bin' if least == 1 else 'two bins'}, each greater than the "
                f"one before ({list(self.bins)})"
            )
        if len({f"{end:g}" for end in self.bins}) < len(set(self.bins)):
            wrong.append(
                f"recipe.target.bins: {list(self.bins)} are alike in six digits, by which predictions name them; use a "
                "larger unit of time"
            )
        if wrong:
            return wrong
        for name, (low, high), centre in zip(names, self.ranges, self.centres, strict=False):
            if not low < high or not low <= centre <= high:
                wrong.append(
                    f"recipe.target: {name} has the range {low:g} to {high:g} and the centre {centre:g}; the least "
                    "must lie below the greatest, and the centre between them"
                )
        return wrong
