"""Names inside functions say what a value is: none is called ``one``, ``found``, ``made`` or ``told``.

``names_left.txt`` counts those that are still there, file by file; it may only shrink.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEFT = Path(__file__).with_name("names_left.txt")
EMPTY_NAMES = {"one", "found", "made", "told"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Where a function gives a value one of these names: line and name."""
    inside = {
        node
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, FUNCTIONS)
        for node in ast.walk(function)
    }
    for node in inside:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in EMPTY_NAMES:
            yield node.lineno, node.id
        elif isinstance(node, ast.arg) and node.arg in EMPTY_NAMES:
            yield node.lineno, node.arg


def now() -> dict[str, int]:
    files = {str(path.relative_to(ROOT)): len(set(names(path))) for path in sorted((ROOT / "fedvfm").rglob("*.py"))}
    return {path: count for path, count in files.items() if count}


def allowed() -> dict[str, int]:
    lines = (line.split() for line in LEFT.read_text().splitlines())
    return {path: int(count) for count, path in lines}


def test_no_name_is_empty_where_it_was_mended() -> None:
    left = allowed()
    more = {path: count for path, count in now().items() if count > left.get(path, 0)}
    assert not more, f"give these values the names of what they are; at most as many as {LEFT.name} says: {more}"


def test_the_mended_rooms_stay_mended() -> None:
    rooms = {path.split("/")[1] for path in allowed()}
    assert not rooms & {"cli", "config", "report"}


def test_it_sees_what_it_must(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "one = 1\ndef f(told, *, x):\n    made: int = x\n    return [found for found in (lambda one: one)(x)]\n"
    )
    assert sorted(name for _, name in names(file)) == ["found", "made", "one", "told"]


if __name__ == "__main__":
    LEFT.write_text("".join(f"{count} {path}\n" for path, count in now().items()))
