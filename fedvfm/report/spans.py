"""Times and spans of time as people read them, and as scripts do (ISO 8601)."""

from __future__ import annotations

from datetime import UTC, datetime


def plain_time(stamp: str | None) -> str:
    """``2026-11-03 12:00 UTC``; a dash where there is none."""
    return f"{stamp[:10]} {stamp[11:16]} UTC" if stamp else "-"


def stamp_of(seconds: float) -> str:
    """ISO 8601 of seconds since 1970, in whole seconds."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def stamp_or_none(seconds: float | None) -> str | None:
    """ISO 8601; None where there is no time."""
    return None if seconds is None else stamp_of(seconds)


def span(seconds: float) -> str:
    """A time span in two units at most: ``45 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 d 4 h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    units = ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    size, name, small, small_name = next(row for row in units if whole >= row[0])
    rest = whole % size // small
    return f"{whole // size} {name}" + (f" {rest} {small_name}" if rest else "")
