"""A table beside the images as an input: its columns, public constants that standardise them, and how it is fused."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from fedvfm.config import base

Range = Annotated[tuple[float, float], Field(strict=False)]
Categories = Annotated[tuple[base.Name, ...], Field(strict=False, min_length=2, max_length=256)]
MOST_COLUMNS = 256
OWN = ("id", "label", "patient", "split", "site", "case")
"""Columns that mean the same in every table, and are no input."""
IMAGE = "image"
"""Column that says where there is no image."""


class InputsConfig(pydantic.BaseModel):
    """Columns of the hospital's table that the head sees beside the image or the case; see :mod:`fedvfm.tasks.fusion`.

    Columns stand in the order of ``numbers``, and behind them ``categories`` by their names. Whatever standardises them
    is public and of the recipe. Any value may be missing, and so may the whole row of a case, or the table of a site.
    """

    model_config = base.SETTINGS

    numbers: Annotated[tuple[base.Name, ...], base.names()] = ()
    """Columns of numbers (age, a laboratory value). Change: to the columns of your table; empty where there are none.
    """
    units: Annotated[tuple[base.Name, ...], base.names()] = ()
    """The unit of each of numbers, as whoever approves reads it. Change: to that of the tables; sites convert theirs.
    """
    ranges: Annotated[tuple[Range, ...], base.names()] = ()
    """(units of the column) The least and the greatest value of each of numbers; what lies outside is refused before
    training. Change: to what is possible at all."""
    centres: Annotated[tuple[float, ...], base.names()] = ()
    """(units of the column) A usual value of each of numbers, from public knowledge: what 0 becomes. Change: to a
    published mean."""
    scales: Annotated[tuple[base.Positive, ...], base.names()] = ()
    """(units of the column) How much each of numbers usually differs from its centre. Change: to a published standard
    deviation."""
    categories: dict[base.Name, Categories] = {}
    """Column = all words that may stand in it, as sex = ["F", "M"]; any other is refused. Change: to the columns of
    your table that hold words."""
    fusion: Literal["concat", "film"] = "concat"
    """concat (beside the image's vector, before the last layer) or film (the table scales and shifts the vector).
    Change: to film where the table changes what the image means."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """(share) Of the samples of a training step, how many are shown without their row, so that the model answers where
    there is none; with images_missing as many others without their image, so 0.5 at most. Change: up where many sites
    or cases lack either, to 0 where all have both."""
    images_missing: Annotated[bool, Field(exclude_if=lambda said: not said)] = False
    """true: cases that a table declares to be without an image (image = none) are learned from and answered by their
    row alone; false: they are left out. Change: to true where patients without an image are to be answered too."""
    images: bool = True
    """Whether the head sees the image. Change: to false only to measure what the table gives alone; the baseline
    table-alone does that by itself."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns in the order in which the head takes them; empty where no table is an input."""
        return (*self.numbers, *sorted(self.categories))

    @property
    def numbers_a_row(self) -> int:
        """How many numbers a model takes beside an image: of each column one, and whether the image is missing."""
        return len(self.columns) + self.images_missing

    def faults(self, answered: tuple[str, ...]) -> list[str]:
        """What does not fit together, one sentence a fault.

        Args:
            answered: columns that the recipe's target learns; empty where it learns the column ``label``.
        """
        wrong, where = list[str](), "recipe.inputs"
        if not self.columns:
            return [
                f"{where}.{key}: nothing reads it without numbers or categories; leave it out"
                for key in ("units", "ranges", "centres", "scales", "fusion", "dropout", "images_missing", "images")
                if getattr(self, key) != type(self).model_fields[key].default
            ]
        if len(self.columns) > MOST_COLUMNS:
            wrong.append(f"{where}: {len(self.columns)} columns, {MOST_COLUMNS} are allowed; leave some out")
        if len(set(self.columns)) < len(self.columns):
            wrong.append(f"{where}: a column is named twice; name each once, in numbers or in categories")
        for name in sorted(set(self.columns) & {*OWN, *answered}):
            what = "what the target learns" if name in answered else "no input"
            wrong.append(f"{where}: column '{name}' is {what}; leave it out")
        for key in ("ranges", "centres", "scales", "units"):
            given, needed = len(getattr(self, key)), key != "units"
            if given != len(self.numbers) and (given or needed):
                wrong.append(
                    f"{where}.{key}: {given} given for {len(self.numbers)} of {where}.numbers "
                    f"({', '.join(self.numbers) or 'none'}); give one for each"
                )
        for name, words in sorted(self.categories.items()):
            if len({word.strip().casefold() for word in words}) < len(words):
                wrong.append(f"{where}.categories.{name}: two words differ in capitals or spaces alone; keep one")
            if not all(word.strip() for word in words):
                wrong.append(f"{where}.categories.{name}: a word is blank, as a missing value is; leave it out")
        if self.images_missing and self.dropout > 0.5:
            wrong.append(
                f"{where}.dropout = {self.dropout:g}: with images_missing so many samples are shown without their row "
                "and as many others without their image; give at most 0.5"
            )
        if self.images_missing and IMAGE in self.columns:
            wrong.append(f"{where}: column '{IMAGE}' says where an image is missing (images_missing); leave it out")
        if wrong:
            return wrong
        return [
            f"{where}: {name} has the range {low:g} to {high:g} and the centre {centre:g}; the least must lie below "
            "the greatest, and the centre between them"
            for name, (low, high), centre in zip(self.numbers, self.ranges, self.centres, strict=True)
            if not low < high or not low <= centre <= high
        ]
