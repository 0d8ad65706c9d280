"""What a terminal shows: names that strangers gave (files, classes, sites) are text, no markup and no commands."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def plain(text: str) -> str:
    """A text with its control characters written out; only the end of a line is one."""
    return "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as they must be; nothing where there are no rows."""
    if not rows:
        return []
    cells = [[plain(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def console(*, stderr: bool = False, plain_text: bool = False) -> Console:
    """A console of rich that takes nothing for markup and lets no control character of a text through.

    Args:
        stderr: whether it writes there.
        plain_text: whether a notebook, too, is written to as a stream.
    """
    return _kind()(stderr=stderr, markup=False, emoji=False, force_jupyter=False if plain_text else None)


@functools.cache
def _kind() -> type[Console]:
    from rich import console as consoles  # only who shows something pays for it
    from rich.segment import Segment

    class Plain(consoles.Console):
        """A console whose own commands (colours, bars) are the only ones."""

        def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
            """The segments of a text, cleaned."""
            for segment in super().render(*arguments, **options):
                yield segment if segment.control else Segment(plain(segment.text), segment.style)

    return Plain
