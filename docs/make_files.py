"""Writes the tables of docs/files.md from the tests that hold each row.

A test says what it holds: ``@pytest.mark.files(TABLE, KIND, SOURCE, WHAT HAPPENS)``, once for each row.

python docs/make_files.py
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).with_name("files.md")
TESTS = Path(__file__).parents[1] / "tests"
HEAD = "| kind | source | what happens | test |\n|---|---|---|---|\n"
TABLE = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def rows(file: Path) -> Iterator[tuple[str, str]]:
    """Table and line of every row that the tests of a file hold, in their order."""
    where = file.relative_to(TESTS).as_posix().removeprefix("data/")
    for test in ast.parse(file.read_text(encoding="utf-8")).body:
        for mark in test.decorator_list if isinstance(test, ast.FunctionDef) else ():
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.files":
                table, *cells = (ast.literal_eval(cell) for cell in mark.args)
                yield table, "| " + " | ".join((*cells, f"`{where}::{test.name}`")) + " |\n"


def text() -> str:
    """The whole page.

    Raises:
        KeyError: for rows of a table that the page does not have.
    """
    page = PAGE.read_text(encoding="utf-8")
    tables: dict[str, str] = {match[2]: HEAD for match in TABLE.finditer(page)}
    for file in sorted(TESTS.rglob("test_*.py")):
        for table, line in rows(file):
            tables[table] = tables[table] + line
    return TABLE.sub(lambda match: match[1] + tables[match[2]] + match[3], page)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
