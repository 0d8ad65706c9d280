"""Writes the table of rooms in docs/architecture.md from the docstring of each package.

python docs/make_rooms.py
"""

from __future__ import annotations

import ast
from pathlib import Path

PAGE = Path(__file__).with_name("architecture.md")
PACKAGE = Path(__file__).parents[1] / "fedvfm"
START, END = "<!-- made by docs/make_rooms.py -->\n", "<!-- end -->\n"


def said(file: Path) -> str:
    """The first paragraph of a file's docstring in one line."""
    return " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].split())


def row(folder: Path) -> str:
    """A line of the table: the room, what it holds, its own rooms."""
    inner = sorted(face.parent for face in folder.glob("*/__init__.py"))
    parts = "; ".join(f"`{part.name}/` {said(part / '__init__.py')}" for part in inner)
    return f"| `{folder.name}/` | {said(folder / '__init__.py')} | {parts} |"


def text() -> str:
    """The whole page."""
    rows = [row(face.parent) for face in sorted(PACKAGE.glob("*/__init__.py"))]
    flat = [f"| `{file.name}` | {said(file)} | |" for file in sorted(PACKAGE.glob("*.py"))]
    table = "\n".join(["| room | what it holds | rooms in it |", "|---|---|---|", *rows, *flat, ""])
    before, rest = PAGE.read_text().split(START)
    return before + START + table + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(text())
