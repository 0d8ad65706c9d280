"""A block of a page that a script writes: all that stands between two comments of its name."""

from __future__ import annotations

from pathlib import Path


def write(page: Path, name: str, text: str) -> None:
    """Put ``text`` in place of what stands in the block; a page that has none gets it at its end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
