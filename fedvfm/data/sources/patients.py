"""The table of patients: which images are of one patient, and the split and site of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

Row = Mapping[str, str]


def read_table(
    folder: Path, names: Sequence[str], tables: Sequence[str] = TABLES
) -> tuple[dict[str, Row], list[errors.Fault]]:
    """Rows by ``id`` of the first table that is there, and its faults.

    Raises:
        DataError: if the table cannot be read at all.
    """
    path = next((folder / name for name in tables if (folder / name).is_file()), None)
    if path is None:
        return {}, []
    rows = index.read_csv(path, ("id",))
    # Tables of labels are all read anyway; beside masks a second table is nobody's.
    others = [folder / name for name in tables if name != path.name] if "labels.csv" in tables else []
    table: dict[str, Row] = {row["id"]: row for row in rows}
    faults = [fault for other in others if other.is_file() for fault in _unread(path.name, table, other)]
    faults += [defect.TABLE.fault(f"{path.name}: {fault}") for fault in index.duplicates(rows, "id")]
    known = set(names)
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
            if row.get(key) == ""
        ]
        if row.get("split", "train") not in ("", *SPLITS):
            faults.append(
                defect.TABLE.fault(
                    f"{path.name}: id '{name}' has split '{row['split']}'; one of {', '.join(SPLITS)} is needed"
                )
            )
        if row.get("patient") and row.get("split"):
            splits.setdefault(row["patient"], set()).add(row["split"])
    faults += [
        defect.PATIENT_ACROSS_SPLITS.fault(
            f"{path.name}: a patient with images in {' and '.join(sorted(parts))} (id '{_first_of(table, patient)}' is "
            "one); keep a patient in one split"
        )
        for patient, parts in splits.items()
        if len(parts) > 1
    ]
    return table, faults


def _unread(name: str, table: Mapping[str, Row], other: Path) -> list[errors.Fault]:
    """A fault for each column of :data:`ONE_TABLE` that says something in another table than the one that is read.

    Where both say the same of every image nothing is lost.

    Raises:
        DataError: if the other table cannot be read.
    """
    theirs = index.read_csv(other, ("id",))
    said = {key: {row["id"]: row[key] for row in theirs if row.get(key)} for key in ONE_TABLE}
    return [
        defect.TABLE.fault(f"{other.name}: has a column {key}, but {name} is read; move the column there")
        for key, cells in said.items()
        if any(image in table and table[image].get(key) != cell for image, cell in cells.items())
    ]


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
