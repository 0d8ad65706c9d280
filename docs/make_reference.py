"""Writes the reference of every key from the models: pages, JSON schemas, and the notes of the templates.

python docs/make_reference.py
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from fedvfm.cli import values
from fedvfm.config import reference
from fedvfm.templates import drafts

DOCS = Path(__file__).parent
TEMPLATES = DOCS.parent / "fedvfm" / "templates"
MADE = "Made by `python docs/make_reference.py` from `fedvfm/config`; a test holds it equal to the code."
HEADS = {
    "recipe": "Every key of a recipe; an experiment has these in `[recipe]`. `fedvfm recipe new` writes one to edit.",
    "site": "Every key of a hospital's own file, which never leaves it. `fedvfm client init` writes one to edit.",
    "server": "Every key of a coordinator's file, for `fedvfm server start --config`; an experiment has these in\n"
    "`[server]`. `fedvfm server init-config` writes one to edit.",
    "survey": "Every key of a survey, for `fedvfm survey --survey` and `fedvfm server survey`; what it does:\n"
    "[survey.md](survey.md). `fedvfm server init-survey` writes one to edit.",
    "experiment": "Every key of an experiment, for `fedvfm simulate`. `[recipe]` has the keys of\n"
    "[recipe.md](recipe.md), `[server]` those of [server.md](server.md). `fedvfm experiments show NAME` prints one.",
}


PAGES = {"survey": "survey-keys"}
"""Pages that have another name than the file: a page of that name says what it is for."""
TEMPLATED = ("recipe", "site", "server")


def cell(text: str) -> str:
    """Text for a cell of a table in Markdown."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def row(key: reference.Key) -> str:
    """A key as a row."""
    typed = f"{key.type} ({key.unit})" if key.unit else key.type
    kind = "; ".join(part for part in (typed, key.limits) if part)
    default = "required" if key.default is None else "" if key.default == "none" else f"`{key.default}`"
    cells = (f"`{key.name}`", cell(kind), cell(default), cell(key.meaning), cell(key.change))
    return f"| {' | '.join(cells)} |"


def page(root: str) -> str:
    """The page of a file's keys."""
    lines = [f"# {root}.toml, key by key", "", HEADS[root], "", "On a terminal: `fedvfm explain KEY`. " + MADE, ""]
    for table in reference.tables(root):
        name = table.path.partition(".")[2]
        lines += [f"## [{name}]", "", cell(table.meaning), ""] if name else ["## At the top", ""]
        lines += ["| key | type | default | meaning | when to change |", "|---|---|---|---|---|"]
        lines += [*map(row, table.keys), ""]
    if root == "site":
        lines += ["## [data.options] of a folder", "", *listing("folder-options"), ""]
    return "\n".join(lines)


def listing(name: str) -> list[str]:
    """The names of a list as a table."""
    rows = (f"| `{word}` | {cell(text)} |" for word, text in values.LISTS[name][1]().items())
    return ["| name | meaning |", "|---|---|", *rows]


def names() -> str:
    """The page of all names that keys take."""
    lines = ["# Names that keys take", "", "On a terminal: `fedvfm explain LIST`. " + MADE, ""]
    elsewhere = {"errors", "exit-codes", "findings", "folder-options"}
    lines += [
        "Exit codes, codes of errors and findings: [errors.md](errors.md). Options of a folder: [site.md](site.md).",
        "",
    ]
    for name, (where, _) in values.LISTS.items():
        lines += [] if name in elsewhere else [f"## {name}", "", f"{cell(where)}.", "", *listing(name), ""]
    return "\n".join(lines)


def template(root: str) -> str:
    """A template with the notes of its keys as the models have them; all other lines stay."""
    keys = {key.path.partition(".")[2]: key for table in reference.tables(root) for key in table.keys}
    lines, table, note = list[str](), "", list[str]()
    for line in drafts.text(f"{root}.toml").splitlines():
        if re.match(r"# [a-z0-9_]+: [^;]+; ", line) or (note and line.startswith("#   ")):
            note.append(line)
            continue
        if heading := drafts.TABLE.match(line):
            table = heading[1]
        key = drafts.LINE.match(line)
        path = f"{table}.{key[1]}".lstrip(".") if key else ""
        lines += note_of(keys[path]) if path in keys else note
        lines.append(line)
        note = []
    return "\n".join(lines) + "\n"


def note_of(key: reference.Key) -> list[str]:
    """``key: type (unit); default VALUE. Meaning.``, wrapped."""
    typed = f"{key.type} ({key.unit})" if key.unit else key.type
    given = "required" if key.default is None else f"default {key.default}"
    text = f"{key.name}: {typed}; {given}. {key.meaning}"
    return textwrap.wrap(text, 130, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)


def files() -> Iterator[tuple[Path, str]]:
    """Everything that is made, with its content."""
    for root in reference.ROOTS:
        yield DOCS / f"{PAGES.get(root, root)}.md", page(root)
        yield (
            TEMPLATES / f"{root}.schema.json",
            json.dumps(reference.json_schema(root), indent=1, ensure_ascii=False) + "\n",
        )
        if root in TEMPLATED:
            yield TEMPLATES / f"{root}.toml", template(root)
    yield DOCS / "names.md", names()


if __name__ == "__main__":
    for path, content in files():
        path.write_text(content, encoding="utf-8")
        print(path, file=sys.stderr)
