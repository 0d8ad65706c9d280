"""``fedvfm explain``: the reference of a key, a table, a file, or of the names that keys take. Thin."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import typer

from fedvfm import errors, registry

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]
WIDTH = 100


def _known() -> list[str]:
    from fedvfm.cli import values
    from fedvfm.config import reference

    tables = [table for root in reference.ROOTS for table in reference.tables(root)]
    return [*values.LISTS, *(table.path for table in tables), *(key.path for table in tables for key in table.keys)]


def explain(
    what: Annotated[
        str | None,
        typer.Argument(
            help="recipe.optimiser, learning_rate, site.policy, windows, an exit code or an error's code.",
            autocompletion=_known,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a key means, what it takes, its default and when to change it; without a name, what can be asked."""
    from fedvfm.cli import values
    from fedvfm.config import reference

    if what is None:
        lists = {name: where for name, (where, _) in values.LISTS.items()}
        _print({"files": list(reference.ROOTS), "lists": lists}, _overview(reference.ROOTS, lists), as_json)
        return
    if what in values.LISTS:
        where, rows = values.LISTS[what]
        listed = dict(rows())
        _print({"list": what, "where": where, "rows": listed}, [f"{what}: {where}", *_rows(listed)], as_json)
        return
    names = [{"list": name, "name": word, "meaning": text} for name, word, text in values.named(what)]
    entries = _keys(what, needed=not names)
    lines = [line for entry in entries for line in _entry(entry)]
    lines += [line for row in names for line in _wrapped(row["meaning"], f"{row['name']} ({row['list']}): ", "  ")]
    _print({"entries": [dataclasses.asdict(entry) for entry in entries], "names": names}, lines, as_json)


def _keys(what: str, *, needed: bool) -> list[Any]:
    """Keys and tables of that name.

    Raises:
        UnknownName: if there is none and one is needed.
    """
    from fedvfm.cli import values
    from fedvfm.config import reference

    try:
        return list(reference.find(what))
    except errors.UnknownName as error:
        if not needed:
            return []
        near = registry.nearest(what, list(values.LISTS)).replace("nearest", "nearest list")
        raise errors.UnknownName(f"{error}; lists: {', '.join(values.LISTS)}{near}") from None


def _print(values: Any, lines: Iterable[str], as_json: bool) -> None:
    print(json.dumps(values, indent=2, ensure_ascii=False) if as_json else "\n".join(lines))


def _overview(files: Iterable[str], lists: Mapping[str, str]) -> list[str]:
    head = [
        f"fedvfm explain FILE, FILE.TABLE or KEY; files: {', '.join(files)}",
        "fedvfm explain NAME: a name that a key takes, an exit code, the code of an error or of a finding",
        "fedvfm explain LIST:",
    ]
    return [*head, *_rows(lists)]


def _rows(rows: Mapping[str, str]) -> Iterator[str]:
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        yield from _wrapped(text, f"  {name:{width}}  ", " " * (width + 4))


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest) or [first.rstrip()]


def _entry(entry: Any) -> Iterator[str]:
    from fedvfm.config import reference

    if isinstance(entry, reference.Key):
        yield f"{entry.path}: {entry.form}"
        yield from _wrapped(entry.meaning, "  ", "  ")
        yield from _wrapped(f"Change: {entry.change}", "  ", "  ")
        return
    yield f"{entry.path}: {entry.meaning}"
    for key in entry.keys:
        yield f"  {key.name}: {key.form}"
        yield from _wrapped(key.meaning, "    ", "    ")
    yield from (f"  table {path}: fedvfm explain {path}" for path in entry.tables)
