"""The table of patients: which images are of one patient, and the split and site of each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedvfm import errors
from fedvfm.data import defect
from fedvfm.data.sources import index

SPLITS = ("train", "val", "test")
TABLES = ("patients.csv", "index.csv")
LABELS = "labels.csv"
STUDY_TABLES = (*TABLES, LABELS)
INPUTS = "table.csv"
"""Columns beside the images alone; it needs no row for every image."""
OWN = ("id", "label", "patient", "split", "site", "case")
"""Columns that mean the same everywhere; others are what a recipe calls them."""

ONE_TABLE = ("patient", "split", "site", "case")
"""Of these, the columns that the first table alone is read for."""

NOTHING = frozenset({"", "nan", "<na>", "n/a", "#n/a"})
"""What programs write into a table where there is nothing."""

SPOKEN = {
    "case": "case",
    "patient": "patient",
    "patientid": "patient",
    "patients": "patient",
    "split": "split",
    "subject": "patient",
    "subjectid": "patient",
}
"""Letters of a column's name -> the column of :data:`ONE_TABLE` that it is meant to be."""

SHEETS = (".csv", ".tsv", ".xls", ".xlsx", ".ods")

Row = Mapping[str, str]


def read_table(
    folder: Path, names: Sequence[str], tables: Sequence[str] = TABLES
) -> tuple[dict[str, Row], list[errors.Fault]]:
    """Rows by ``id`` of the first table that is there, and its faults.

    Raises:
        DataError: if the table cannot be read at all.
    """
    path = next((folder / name for name in tables if (folder / name).is_file()), None)
    rows = [] if path is None else index.read_csv(path, ("id",))
    read = tables[0] if path is None else path.name
    table: dict[str, Row] = {row["id"]: row for row in rows}
    known = set(names)
    faults = [*_misnamed(folder, tables), *_unread(folder, read, table, known)]
    if path is None:
        return {}, faults + _elsewhere(folder)
    faults += _unmeant(path.name, rows)
    faults += [defect.TABLE.fault(f"{path.name}: {fault}") for fault in index.duplicates(rows, "id")]
    faults += [
        defect.TABLE.fault(f"{path.name}: id '{name}' has no image; remove the row or bring the file")
        for name in table
        if name not in known
    ]
    faults += [
        defect.TABLE.fault(f"{path.name}: no row for image '{name}'; add one") for name in names if name not in table
    ]
    splits: dict[str, set[str]] = {}
    for name, row in table.items():
        faults += [
            defect.TABLE.fault(f"{path.name}: id '{name}' has no {key}; fill it in or drop the column")
            for key in ONE_TABLE
            if row.get(key, "-").casefold() in NOTHING
        ]
        if row.get("split", "train") not in ("", *SPLITS):
            faults.append(
                defect.TABLE.fault(
                    f"{path.name}: id '{name}' has split '{row['split']}'; one of {', '.join(SPLITS)} is needed"
                )
            )
        if row.get("patient") and row.get("split"):
            splits.setdefault(row["patient"], set()).add(row["split"])
    faults += _written_twice(path.name, table)
    faults += [
        defect.PATIENT_ACROSS_SPLITS.fault(
            f"{path.name}: a patient with images in {' and '.join(sorted(parts))} (id '{_first_of(table, patient)}' is "
            "one); keep a patient in one split"
        )
        for patient, parts in splits.items()
        if len(parts) > 1
    ]
    return table, faults


def _misnamed(folder: Path, tables: Sequence[str]) -> Iterator[errors.Fault]:
    """A fault for each table that is not read because of how it is called or stored."""
    for path in sorted(folder.iterdir()):
        called = path.name.casefold()
        other_capitals = called in tables and path.name not in tables
        other_form = path.stem.casefold() == "patients" and path.suffix.lower() in SHEETS[1:]
        if path.is_file() and (other_capitals or (other_form and not (folder / TABLES[0]).is_file())):
            meant = called if other_capitals else TABLES[0]
            text = f"{path.name}: a table that is not read; save it as {meant} (comma-separated), or move it away"
            yield defect.TABLE.fault(text)


def _elsewhere(folder: Path) -> list[errors.Fault]:
    """A fault for each table of patients in a folder of the data folder, where none is read."""
    return [
        defect.TABLE.fault(
            f"{path.parent.name}/{path.name}: a table that is not read; its rows belong into {path.name} of the data "
            "folder, each image called as it is from there"
        )
        for path in sorted(folder.glob(f"*/{TABLES[0]}"))
        if path.is_file()
    ]


def spoken(column: str) -> str:
    """The column of :data:`ONE_TABLE` that a name is meant to be; else the name itself."""
    return SPOKEN.get(re.sub(r"[^a-z]", "", column.casefold()), column)


def _unmeant(name: str, rows: Sequence[Row]) -> list[errors.Fault]:
    """A fault for each column that is meant to be one of :data:`ONE_TABLE` and is called otherwise."""
    held = list(rows[0]) if rows else []
    meant = {column: spoken(column) for column in held}
    return [
        defect.TABLE.fault(f"{name}: column '{column}' is not read as '{own}'; call it '{own}', or drop it")
        for column, own in meant.items()
        if own not in held
    ]


def _written_twice(name: str, table: Mapping[str, Row]) -> list[errors.Fault]:
    """A fault for each patient that is written in two ways: in other capitals, or as 1 and 1.0."""
    ways: dict[str, set[str]] = {}
    for row in table.values():
        if row.get("patient"):
            ways.setdefault(re.sub(r"^(\d+)\.0*$", r"\1", row["patient"].casefold()), set()).add(row["patient"])
    return [
        defect.TABLE.fault(
            f"{name}: a patient is written in {len(those)} ways, in other capitals or with and without '.0' (id "
            f"'{_first_of(table, min(those))}' is one); use one"
        )
        for those in ways.values()
        if len(those) > 1
    ]


def _unread(folder: Path, read: str, table: Mapping[str, Row], images: Collection[str]) -> Iterator[errors.Fault]:
    """A fault for each column of :data:`ONE_TABLE` that says something of an image in another table than is read.

    Where both say the same of every image nothing is lost. A table that cannot be read is told where it is needed.
    """
    for name in (*STUDY_TABLES, INPUTS):
        if name == read or not (folder / name).is_file():
            continue
        try:
            theirs = index.read_csv(folder / name, ("id",))
        except errors.DataError:
            continue
        here = [row for row in theirs if row["id"] in images]
        yield from _unmeant(name, here)
        for key in ONE_TABLE:
            if any(row.get(key) and table.get(row["id"], {}).get(key) != row[key] for row in here):
                text = f"{name}: has a column {key}, but {read} is read; move the column there"
                yield defect.TABLE.fault(text)


def _first_of(table: Mapping[str, Row], patient: str) -> str:
    return next(name for name, row in table.items() if row["patient"] == patient)


def further(row: Row) -> dict[str, str]:
    """The cells of a row without those of :data:`OWN`."""
    return {name: cell for name, cell in row.items() if name not in OWN}


@dataclass(frozen=True)
class Tables:
    """The further columns of all tables of a folder.

    Attributes:
        rows: by ``id``, each with every column.
        owner: column -> the table that it is in.
        lines: (table, id) -> number of its line; the head is line 1.
    """

    rows: dict[str, dict[str, str]]
    owner: dict[str, str]
    lines: dict[tuple[str, str], int]


def columns(folder: Path) -> Tables:
    """The further columns of all tables of a folder.

    Raises:
        DataError: if a table cannot be read, gives an id twice, or has a column that another has too.
    """
    rows, owner, lines = dict[str, dict[str, str]](), dict[str, str](), dict[tuple[str, str], int]()
    for table in (name for name in (*STUDY_TABLES, INPUTS) if (folder / name).is_file()):
        listed = index.read_csv(folder / table, ("id",))
        index.refuse(folder / table, index.duplicates(listed, "id"))
        for name in further(listed[0]) if listed else ():
            if name in owner:
                raise defect.TABLE.error(f"{table}: column '{name}' is in {owner[name]} too; keep it in one of them")
            owner[name] = table
        for row in listed:
            rows.setdefault(row["id"], {}).update(further(row))
            lines[table, row["id"]] = row.line
    every = dict.fromkeys(owner, "")
    return Tables({key: {**every, **row} for key, row in rows.items()}, owner, lines)
