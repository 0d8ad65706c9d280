"""docs/files.md says nothing that no test holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROWS = re.findall(r"`([\w/]+\.py)::(\w+)`", (TESTS.parent / "docs" / "files.md").read_text())


def test_every_row_names_a_test_that_is_there() -> None:
    assert len(ROWS) > 40
    for file, name in ROWS:
        path = TESTS / file if "/" in file else TESTS / "data" / file
        tree = ast.parse(path.read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in names, f"{file}::{name}"


def test_rows_that_name_no_test_are_none() -> None:
    page = (TESTS.parent / "docs" / "files.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|") and not line.startswith(("| kind", "|---"))]
    assert len(rows) == len(ROWS)
