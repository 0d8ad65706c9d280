"""What a person sees while prediction goes on: one line that moves on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import Progress
from rich.table import Table

from fedvfm.report import progress, terminal

SHOWN = 20


def watch(quiet: bool) -> contextlib.AbstractContextManager[progress.Observer]:
    """The observer for this output: silent, live or plain."""
    return progress.watch(quiet, Line, Lines)


class Line:
    """One bar over all inputs; a volume moves it slice by slice."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._row, self._done = bar, bar.add_task("loading", total=None), 0

    def __call__(self, event: str, /, **fields: Any) -> None:
        """Take one event."""
        if event == "input":
            self._done = fields["index"]
            self._bar.update(self._row, total=fields["count"], completed=self._done, description=_short(fields["name"]))
        elif event == "slice":
            self._bar.update(self._row, completed=self._done + fields["index"] / fields["count"])


class Lines:
    """One line an input, with the time since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, event: str, /, **fields: Any) -> None:
        """Take one event."""
        if event == "input":
            passed = time.monotonic() - self._start
            text = f"[{passed:7.1f} s] {fields['index'] + 1}/{fields['count']} {fields['name']}"
            print(terminal.plain(text).replace("\n", "\\n"), file=sys.stderr, flush=True)


def show(summary: Mapping[str, Any], as_json: bool) -> None:
    """The summary on standard output: JSON, or a table and where the results are."""
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    console, rows = terminal.console(), summary["inputs"]
    table = Table(title=f"{summary['task']}, adapter {summary['adapter']['fingerprint'][:12]}")
    table.add_column("input")
    dense = [row for row in rows if "classes" in row]
    of_columns = list(rows[0]["values"]) if rows and "values" in rows[0] else ["class", "probability"]
    names = summary["class_names"][1:] if dense else of_columns
    for name in names:
        table.add_column(f"boxes of {name}" if summary["task"] == "detection" else name)
    for row in rows[:SHOWN]:
        table.add_row(row["id"], *(_extent(row["classes"][name]) for name in names) if dense else _best(row))
    if rows:
        console.print(table)
    if len(rows) > SHOWN:
        console.print(f"and {len(rows) - SHOWN} more in summary.json")
    for line in _remarks(summary):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(f"results: {summary['output']}", soft_wrap=True)


def _remarks(summary: Mapping[str, Any]) -> list[str]:
    """One line each distinct note on reading, and one of DICOM folders that were passed over."""
    lines = [f"note: {note} ({_some(names)})" for note, names in summary["notes"].items()]
    skipped = summary["skipped"]
    return [*lines, f"passed over, no such series: {_some(list(skipped))}"] if skipped else lines


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _extent(counted: Mapping[str, Any]) -> str:
    """A class's volume or area where it is known, else its number of pixels; of an adapter that detects, of boxes."""
    if "boxes" in counted:
        return str(counted["boxes"])
    if "ml" in counted:
        return f"{counted['ml']:.3g} ml"
    return f"{counted['mm2']:.4g} mm2" if "mm2" in counted else f"{counted['voxels']} px"


def _best(row: Mapping[str, Any]) -> tuple[str, ...]:
    if "values" in row:
        return tuple(f"{value:.6g}" for value in row["values"].values())
    return row["class"], f"{row['probabilities'][row['class']]:.3f}"


def _short(name: str, most: int = 40) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"
