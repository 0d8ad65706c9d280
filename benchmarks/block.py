"""A block of a page that a script writes: all that stands between two comments of its name, and what stands in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(page: Path, name: str, text: str) -> None:
    """Put ``text`` in place of what stands in the block; a page that has none gets it at its end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def interval(row: Mapping[str, Any], form: str) -> str:
    """From where to where, or that there are too few cases for one."""
    if row["low"] is None:
        return "none: too few cases"
    return f"{row['low']:{form}} to {row['high']:{form}}"
