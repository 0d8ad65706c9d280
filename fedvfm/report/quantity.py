"""A number and what it counts, in the right form: ``1 round``, ``2 rounds``."""

from __future__ import annotations


def of(number: int, noun: str, plural: str = "") -> str:
    """The number, with commas between thousands, and the noun; the plural takes an s where none is given."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
