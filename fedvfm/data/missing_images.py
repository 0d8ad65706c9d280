"""Samples of which the data declares that they have no image: who may see them, and what they must have instead.

A source lists them among the others, and reading one is a fault. A recipe takes them (``recipe.inputs.images_missing``)
or never sees them; there is no third way, so that nobody learns from a picture that stands for none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedvfm.config import schema
from fedvfm.data import columns, defect
from fedvfm.data import sample as data
from fedvfm.data.sources import index


class Imaged(data.Wrapped):
    """A source without its samples that have no image.

    Args:
        source: of both.
    """

    def __init__(self, source: data.Source) -> None:
        super().__init__(source)
        every = source.samples()
        self._samples = tuple(sample for sample in every if not sample.without_image)
        self.left_out = len(every) - len(self._samples)

    @property
    def info(self) -> data.SourceInfo:
        """That of the source, and how many are left out."""
        info = self._source.info
        left = f"{self.left_out} case(s) without an image left out, which the recipe does not take"
        return dataclasses.replace(info, note="; ".join(filter(None, (info.note, left))))

    def samples(self) -> Sequence[data.Sample]:
        """The samples with an image."""
        return self._samples

    def row(self, sample: data.Sample) -> Mapping[str, str]:
        """The cells of the source's table; none where it has no table."""
        return self._source.row(sample) if isinstance(self._source, columns.Tabled) else {}


def taken(source: data.Source, recipe: schema.Recipe) -> data.Source:
    """The source as the recipe takes it: as it is, or without the samples that have no image.

    Raises:
        DataError: if no sample is left.
    """
    if recipe.inputs.images_missing or not any(sample.without_image for sample in source.samples()):
        return source
    imaged = Imaged(source)
    if not imaged.samples():
        raise defect.NO_SAMPLES.error(
            f"{source.info.name}: all {imaged.left_out} cases are declared to be without an image, and the recipe "
            "takes none of these (recipe.inputs.images_missing = false); bring images, or ask for a recipe that does"
        )
    return imaged


def require_rows(source: data.Source) -> None:
    """Refuse samples of which neither an image nor a value of the table is there: nothing can be learned from them.

    Args:
        source: whose samples have their row of ``recipe.inputs``, where there is one.

    Raises:
        DataError: listing them.
    """
    faults = [
        defect.CASE_EMPTY.fault(
            f"sample '{sample.case or sample.unit}': neither an image nor a value in any column of recipe.inputs; fill "
            "one in, or take the row out"
        )
        for sample in source.samples()
        if sample.without_image and not sample.inputs
    ]
    index.refuse(Path(source.info.name), list(dict.fromkeys(faults)))
