"""Folders with an ``index.csv``: where they lie, and how the table is read."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvfm import errors, registry
from fedvfm.config import schema
from fedvfm.data import defect, side_files

FAULTS_SHOWN = 20
INDEX = "index.csv"
MOST_BYTES = 256 << 20
"""Of a table; one of a million images has 100 MB."""

Refuse = Callable[[Path, Sequence[errors.Fault]], None]
"""What is done with faults: :func:`refuse`, or something that collects them."""


def by_name(name: str) -> Path:
    """Where a data set is looked for when no path is given: ``$FEDVFM_DATA/NAME``, or ``./data/NAME`` without it."""
    return Path(os.environ.get("FEDVFM_DATA") or "data").expanduser().absolute() / name


def resolve(source: schema.SourceConfig) -> schema.SourceConfig:
    """The same source with an absolute path: that given, or the folder of a set that is found by its name.

    What is resolved so is read again by whoever goes on later, from another folder or under another ``FEDVFM_DATA``.
    """
    folder = Path(source.path).expanduser().absolute() if source.path else by_name(source.source)
    if not source.path and not ((folder / INDEX).is_file() or (folder / "images").is_dir()):
        return source
    return source.model_copy(update={"path": str(folder)})


def locate(source: schema.SourceConfig, needs: Sequence[str]) -> Path:
    """The folder of a data set: ``path`` of the configuration, else that of its name.

    Raises:
        DataError: naming the folder that was tried, and the remedy.
    """
    folder = Path(source.path).expanduser() if source.path else by_name(source.source)
    if folder.is_dir():
        return folder
    raise defect.OPTIONS.error(
        f"data source '{source.source}': no folder at {folder}; set data.path to the folder that holds "
        f"{', '.join(needs)}, or the environment variable FEDVFM_DATA to the folder that holds '{source.source}'; "
        f"'fedvfm data fetch {source.source}' brings it"
    )


class Row(dict[str, str]):
    """Cells by column.

    Attributes:
        line: of the file, from 1, where the row ends; empty lines count.
    """

    def __init__(self, cells: Mapping[str, str], line: int) -> None:
        super().__init__(cells)
        self.line = line


def read_csv(path: Path, required: Sequence[str]) -> list[Row]:
    """The rows of a comma-separated table with a header line; surrounding blanks are removed.

    Raises:
        DataError: if the file cannot be read, lacks a required column, or a row has no value in one.
    """
    try:
        # Strict: a quotation mark that nobody closed would make one cell of all rows after it.
        reader = csv.DictReader(io.StringIO(side_files.read_text(path, MOST_BYTES), newline=""), strict=True)
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        # Spreadsheets write the empty rows below a table as commas alone.
        read = [(reader.line_num, row) for row in reader if not _is_empty(row)]
    except errors.DataError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise defect.TABLE.error(f"{path}: cannot be read as a comma-separated UTF-8 table: {reason}") from None
    except csv.Error as error:
        raise defect.TABLE.error(
            f"{path}: cannot be read as a comma-separated UTF-8 table: {error}; look for a quotation mark that is not "
            "closed, or has text behind it"
        ) from None
    missing = [name for name in required if name not in columns]
    if missing:
        raise defect.TABLE.error(
            f"{path}: column {', '.join(missing)} is missing; it has {', '.join(columns) or 'no header line'}"
            + _separated(columns)
        )
    # Of two columns of one name, and of cells beside the columns (12,5 for 12.5), something would be lost unseen.
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise defect.TABLE.error(f"{path}: column {', '.join(twice)} stands twice; keep one")
    refuse(
        path,
        (
            defect.TABLE.fault(
                f"line {line}: more cells than the {len(columns)} columns; write decimals with a point, and text that "
                "holds a comma in quotation marks"
            )
            for line, row in read
            if any(cell.strip() for cell in row.get(None) or ())
        ),
    )
    rows = [Row({key: (row[key] or "").strip() for key in columns}, line) for line, row in read]
    refuse(
        path,
        (
            defect.TABLE.fault(f"line {row.line}: no value for '{key}'")
            for row in rows
            for key in required
            if not row[key]
        ),
    )
    return rows


def _is_empty(row: Mapping[str | None, Any]) -> bool:
    """Whether no cell holds anything; those beside the columns, a list, are under None."""
    cells = [*(row.get(None) or ()), *(cell for key, cell in row.items() if key is not None)]
    return not any(cell and cell.strip() for cell in cells)


def _separated(columns: Sequence[str]) -> str:
    """What to do where a header line is one column, as another mark stands between the names."""
    marks = {";": "semicolons", "\t": "tabs", "|": "bars"}
    known = [name for mark, name in marks.items() if len(columns) == 1 and mark in columns[0]]
    return f": it is separated by {known[0]}; save it with commas, and decimals with a point" if known else ""


def read_files(path: Path, required: Sequence[str]) -> list[Row]:
    """:func:`read_csv` of a table whose ``id`` names files beside it; an id that leaves their folder is refused.

    Raises:
        DataError: see there.
    """
    rows = read_csv(path, required)
    wrong = (
        defect.TABLE.fault(f"line {row.line}: id '{row['id']}' is no plain file name")
        for row in rows
        if row["id"].startswith(".") or any(mark in row["id"] for mark in "/\\")
    )
    refuse(path, wrong)
    return rows


def refuse(where: Path, faults: Iterable[errors.Fault]) -> None:
    """Raise one error that lists the faults, where there are any.

    Raises:
        DataError: with the number of faults and the first of them, one a line.
    """
    found = list(faults)
    if not found:
        return
    lines = [f"\n  - {fault}" for fault in found[:FAULTS_SHOWN]]
    more = f"\n  - and {len(found) - FAULTS_SHOWN} more" if len(found) > FAULTS_SHOWN else ""
    number = "1 fault" if len(found) == 1 else f"{len(found)} faults"
    raise errors.DataError(f"{where}: {number}{''.join(lines)}{more}", found)


def duplicates(rows: Iterable[Mapping[str, str]], key: str) -> list[errors.Fault]:
    """One sentence for every value of ``key`` that stands in more than one row."""
    seen: dict[str, int] = {}
    for row in rows:
        seen[row[key]] = seen.get(row[key], 0) + 1
    return [
        defect.TABLE.fault(f"{key} '{value}' stands in {count} rows; keep one")
        for value, count in seen.items()
        if count > 1
    ]


def unknown_options(source: schema.SourceConfig, known: Sequence[str]) -> list[str]:
    """One sentence for every option that the source does not know."""
    have = ", ".join(known) if known else "none"
    return [
        f"data.options.{key}: unknown option of '{source.source}'; known: {have}{registry.nearest(key, list(known))}"
        for key in source.options
        if key not in known
    ]


def refuse_options(source: schema.SourceConfig, known: Sequence[str]) -> None:
    """Refuse options that the source does not know.

    Raises:
        ConfigError: listing each with the nearest known one.
    """
    faults = unknown_options(source, known)
    if faults:
        raise errors.ConfigError(f"data source '{source.source}'", faults)
