"""Nothing reads sentences: faults of data carry codes from where they are raised; no text of an error is searched."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fedvfm

ROOT = Path(fedvfm.__file__).parent


def trees(folder: Path = ROOT) -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def test_errors_of_data_are_raised_with_a_code() -> None:
    """By a kind of :mod:`fedvfm.data.defect`; else with the faults that they list."""
    bare = [
        where
        for where, node in trees(ROOT / "data")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("errors.DataError", "errors.Fault")
        if len(node.args) < 2 and not node.keywords and "defect.py" not in where
    ]
    assert bare == []


def test_no_text_of_an_error_is_searched() -> None:
    def holds_text(node: ast.AST) -> bool:
        return "str(error)" in ast.unparse(node)

    readers = [
        where
        for where, node in trees()
        if (isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn | ast.Eq) and holds_text(node))
        or (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] in ("search", "match", "fullmatch", "startswith", "endswith")
            and holds_text(node)
        )
    ]
    assert readers == []
