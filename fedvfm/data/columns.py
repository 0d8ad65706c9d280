"""Samples with values from columns of the hospital's table, as a recipe's target declares them.

A table is read as numbers here and nowhere else: a cell that is no number, or lies outside its declared range, stops
before the first image is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data import sample as data
from fedvfm.data.sources import index

MISSING = ("", "na", "n/a", "nan", "none", "null")
"""Cells, in small letters, that say that a value is missing."""

HOW_WRITTEN = (
    "; correct it (decimals with a point, no unit behind it), or leave the cell empty where the value is missing"
)
"""What to do about a cell that is no number; its text is told to nobody."""


@runtime_checkable
class Tabled(data.Source, Protocol):
    """A source with a table of further columns beside its images."""

    def row(self, sample: data.Sample) -> Mapping[str, str]:
        """The cells of a sample's row by column, without those that the source itself reads."""


class Columns(data.Wrapped):
    """A source whose samples have the values of columns in place of a label.

    Args:
        source: of images, with a table.
        recipe: whose ``target`` says which columns, called as its ``data.class_names``, and what they may hold.

    Raises:
        DataError: if the source has no table of columns; else listing columns that are not there, cells that are no
            number or outside the range, and samples without any value.
    """

    def __init__(self, source: data.Source, recipe: schema.Recipe) -> None:
        super().__init__(source)
        names, kind = recipe.data.class_names, recipe.target.kind
        if not isinstance(source, Tabled):
            raise defect.OPTIONS.error(
                f"recipe.target.kind = '{kind}': source '{source.info.name}' has no table of columns; use source "
                "'folder' with a table labels.csv"
            )
        ranges: Sequence[tuple[float, float]] = recipe.target.ranges or ((0.0, 1.0),) * len(names)
        whole = (True,) * len(names) if kind == "multi-label" else (False,) * len(names)
        if recipe.target.prognosis:
            ranges, whole = ((0.0, math.inf), (0.0, 1.0)), (False, True)
        samples, faults = [], list[errors.Fault]()
        require_columns(source, names, "recipe.data.class_names")
        for sample in source.samples():
            row = source.row(sample)
            case = sample.case or sample.unit
            values, wrong = _values(places(self, sample, case), row, names, ranges, whole)
            faults += wrong
            missing = [name for name, value in zip(names, values, strict=True) if value is None]
            if not wrong and missing and (recipe.target.prognosis or len(missing) == len(names)):
                where = places(self, sample, case)(missing[0])
                text = f"{where}: no value in {', '.join(missing)}; fill one in, or take it out"
                faults.append(defect.LABEL_MISSING.fault(text))
            samples.append(dataclasses.replace(sample, label=None, values=values))
        # A case is listed once, whatever the number of its images.
        index.refuse(Path(source.info.name), list(dict.fromkeys(faults)))
        self._samples = tuple(samples)
        self.names = names

    @property
    def info(self) -> data.SourceInfo:
        """That of the source, for the columns."""
        return dataclasses.replace(self._source.info, class_names=self.names)

    def samples(self) -> Sequence[data.Sample]:
        """All samples with their values."""
        return self._samples


def require_columns(source: Tabled, names: Sequence[str], key: str, remedy: str = "") -> None:
    """Refuse a source whose tables lack a column.

    Args:
        source: with a table.
        names: of the columns.
        key: of the recipe, which names them.
        remedy: a further way out.

    Raises:
        DataError: naming the columns that are not there, and those that are.
    """
    # All rows have one header, but a sample that no table names has no row.
    held = next((sorted(row) for sample in source.samples() if (row := source.row(sample))), [])
    lost = set(names) - set(held) if source.samples() else set()
    if lost:
        text = f"no column {', '.join(sorted(lost))}, which {key} names; there are: " + (
            ", ".join(held)
            or "none besides id, label, patient, split, site and case in rows of what is here; compare the column id "
            "with the names of images, studies or cases"
        )
        raise defect.TABLE.error(f"{source.info.name}: {text}{remedy}")


def number(cell: str) -> float | None:
    """What a cell of a column of numbers says; None where it is missing, NaN where it is no number."""
    if cell.casefold() in MISSING:
        return None
    try:
        return math.nan if "_" in cell else float(cell)  # Python alone writes 1_5 for 15
    except ValueError:
        return math.nan


def require_follow_up(recipe: schema.Recipe, site: str, parts: Mapping[str, Sequence[data.Sample]]) -> None:
    """Refuse splits of which no prognosis could be learned or scored, before the first round.

    Args:
        recipe: of the run.
        site: its name.
        parts: split -> its samples.

    Raises:
        DataError: of "survival", where no case of "val" or "test" is followed up beyond the first of
            ``recipe.target.bins``; of "cox", where no two cases of a split can be compared, or samples are slices.
    """
    if recipe.target.kind == "cox":
        _require_comparable(site, parts)
    first = recipe.target.bins[0] if recipe.target.kind == "survival" else 0.0
    short = [
        split
        for split, members in parts.items()
        if first and split != "train" and members and max(sample.values[0] or 0.0 for sample in members) <= first
    ]
    if short:
        raise defect.NO_SAMPLES.error(
            f"site '{site}': no case of {' and of '.join(short)} is followed up beyond {first:g}, the first of "
            "recipe.target.bins, so its prognoses could not be scored; bring more cases or longer follow-up, or state "
            "earlier bins"
        )


def _require_comparable(site: str, parts: Mapping[str, Sequence[data.Sample]]) -> None:
    """Refuse splits for Cox's target: cases at risk at the time of another's event are what it learns from."""
    if any(sample.part is not None for members in parts.values() for sample in members):
        raise defect.OPTIONS.error(
            f"site '{site}': target 'cox' compares cases, and slices of a volume would count as so many of them; use "
            "task 'case-classification'"
        )
    alone = [split for split, members in parts.items() if members and not _comparable(members)]
    if alone:
        raise defect.NO_SAMPLES.error(
            f"site '{site}': no two cases of {' and of '.join(alone)} can be compared, as nobody in it was followed up "
            "beyond a case with an event; bring more cases or longer follow-up, or let this site take no part"
        )


def _comparable(members: Sequence[data.Sample]) -> bool:
    """Whether somebody was still at risk when the first event happened: no later event has more at risk."""
    times = [(sample.values[0] or 0.0, bool(sample.values[1])) for sample in members]
    first = min((time for time, event in times if event), default=math.inf)
    return any(time > first or (time == first and not event) for time, event in times)


def places(source: data.Wrapped, sample: data.Sample, name: str) -> Callable[[str], str]:
    """Column -> how a fault names the cell of a sample: as the product does, and as the table does where it can.

    Args:
        source: that shows the sample.
        sample: one image.
        name: what the product calls it.
    """

    def place(column: str) -> str:
        known = source.row_place(sample, column)
        return f"sample '{name}'{f' ({known})' if known else ''}"

    return place


def _values(
    place: Callable[[str], str],
    row: Mapping[str, str],
    names: Sequence[str],
    ranges: Sequence[tuple[float, float]],
    whole: Sequence[bool],
) -> tuple[tuple[float | None, ...], list[errors.Fault]]:
    """A row's values, and a fault for each cell that is none; no cell's text is told, which may be anything."""
    values, faults = list[float | None](), list[errors.Fault]()
    for name, (low, high), yes_or_no in zip(names, ranges, whole, strict=True):
        value = number(row.get(name, ""))
        values.append(value)
        if value is None:
            continue
        where = f"{place(name)}, column '{name}'"
        if not math.isfinite(value):
            text = f"{where}: is no number{HOW_WRITTEN}"
            faults.append(defect.TABLE.fault(text))
        elif yes_or_no and value not in (0.0, 1.0):
            text = f"{where}: {value:g} is neither 0 nor 1; it is there (1) or not (0), or empty where not known"
            faults.append(defect.COLUMN_RANGE.fault(text))
        elif not low <= value <= high:
            text = f"{where}: {value:g} lies outside of {low:g} to {high:g} (recipe.target); check its unit"
            faults.append(defect.COLUMN_RANGE.fault(text))
    return tuple(values), faults
