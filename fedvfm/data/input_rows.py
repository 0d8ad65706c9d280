"""Samples with the row of the hospital's table that a recipe takes beside the image.

A row is read as numbers and words here and nowhere else: a cell that is neither, or lies outside of what the recipe
declares, stops before the first image is read. A sample that no table names has no row, which is no fault.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedvfm import errors
from fedvfm.config import inputs
from fedvfm.data import columns, defect
from fedvfm.data import sample as data
from fedvfm.data.sources import index

Row = tuple[float | None, ...]
KEY = "recipe.inputs"


class InputRows(data.Wrapped):
    """A source whose samples have their row of the columns that ``recipe.inputs`` names.

    Args:
        source: of images, with a table.
        chosen: the columns.
        key: of the document that names them.

    Raises:
        DataError: if the source has no table with these columns, or no value in them of any sample; else listing cells
            that are no number, outside of the range, or none of the words.
    """

    _source: columns.Tabled

    def __init__(self, source: data.Source, chosen: inputs.InputsConfig, key: str = KEY) -> None:
        if not isinstance(source, columns.Tabled):
            raise defect.OPTIONS.error(
                f"{key}: source '{source.info.name}' has no table of columns; use source 'folder' with a table "
                "table.csv"
            )
        super().__init__(source)
        remedy = '; a site without any of them says table = "absent" in its file'
        columns.require_columns(source, chosen.columns, key, remedy)
        samples, faults = [], list[errors.Fault]()
        for sample in source.samples():
            row, wrong = read(columns.places(self, sample, sample.case or sample.unit), source.row(sample), chosen, key)
            faults += wrong
            samples.append(dataclasses.replace(sample, inputs=row))
        # A case is listed once, whatever the number of its images.
        index.refuse(Path(source.info.name), list(dict.fromkeys(faults)))
        if samples and not any(sample.inputs for sample in samples):
            raise defect.TABLE.error(
                f"{source.info.name}: no sample has a value in {', '.join(chosen.columns)}, which {key} names; "
                f"compare the column id of the table with the names of images, studies or cases{remedy}"
            )
        self._samples = tuple(samples)

    def samples(self) -> Sequence[data.Sample]:
        """All samples with their rows."""
        return self._samples

    def row(self, sample: data.Sample) -> Mapping[str, str]:
        """The cells of the source's table."""
        return self._source.row(sample)


def read(
    place: Callable[[str], str], cells: Mapping[str, str], chosen: inputs.InputsConfig, key: str = KEY
) -> tuple[Row, list[errors.Fault]]:
    """A row, empty where nothing of it is known, and a fault for each cell that cannot be meant.

    No cell's text is told, which may be anything; numbers of a declared column are.

    Args:
        place: column -> how a fault names the sample.
        cells: by column.
        chosen: the columns.
        key: of the document that names them.
    """
    row, faults = list[float | None](), list[errors.Fault]()
    for column, (low, high) in zip(chosen.numbers, chosen.ranges, strict=True):
        value = columns.number(cells.get(column, ""))
        row.append(value)
        if value is None:
            continue
        where = f"{place(column)}, column '{column}'"
        if not math.isfinite(value):
            text = f"{where}: is no number{columns.HOW_WRITTEN}"
            faults.append(defect.TABLE.fault(text))
        elif not low <= value <= high:
            text = f"{where}: {value:g} lies outside of {low:g} to {high:g} ({key}); check its unit"
            faults.append(defect.COLUMN_RANGE.fault(text))
    for column in sorted(chosen.categories):
        cell, words = cells.get(column, "").strip(), [word.strip().casefold() for word in chosen.categories[column]]
        known = cell.casefold() in words
        missing = not known and cell.casefold() in columns.MISSING
        row.append(float(words.index(cell.casefold())) if known else None)
        if not known and not missing:
            text = (
                f"{place(column)}, column '{column}': holds none of the words {', '.join(chosen.categories[column])} "
                f"({key}); write one of them, or leave the cell empty where it is not known"
            )
            faults.append(defect.COLUMN_RANGE.fault(text))
    return (tuple(row) if any(value is not None for value in row) else ()), faults
