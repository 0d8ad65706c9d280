"""Names that strangers gave are text in a terminal: no markup, no control characters."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table

import fedvfm
from fedvfm.report import terminal

NAME = "[red]a[/red] \x1b[2J\x1b]0;title\x07 \x9b31m \u202eb \x7f"


def test_texts_are_written_out() -> None:
    assert terminal.plain("a\x1b[2Jb\r\n\u202ec") == "a\\x1b[2Jb\\r\n\\u202ec"


@pytest.mark.parametrize("tty", [True, False])
def test_a_console_shows_names_as_they_are(tty: bool) -> None:
    console = terminal.console()
    console.file, console._force_terminal = io.StringIO(), tty
    table = Table(title=NAME)
    table.add_column(NAME)
    table.add_row(NAME)
    console.print(table)
    console.print(NAME, style="bold")
    with Progress(TextColumn("{task.description}", markup=False), console=console) as bar:
        bar.add_task(NAME)
    shown = console.file.getvalue()
    assert "[red]a[/red]" in shown
    assert not [bad for bad in ("\x1b[2J\x1b]0", "\x1b]0;", "\x07", "\x9b", "\u202e", "\x7f") if bad in shown]


def test_consoles_are_made_in_one_place() -> None:
    root = Path(fedvfm.__file__).parent
    others = [
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Console"
    ]
    assert others == []
