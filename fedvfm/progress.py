"""Events a run tells its watcher: a plain callable, so that a terminal, a test or a notebook can be one."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Receives events by name; unknown events must be ignored.

    Events: ``arm`` (name, index, count, rounds, sites), ``round`` (arm, round, rounds, sites), ``reply`` (arm, round,
    phase, site, loss), ``round-end`` (arm, round, record), ``note`` (text). Prediction: ``input`` (name, index, count),
    ``slice`` (name, index, count). Data check: ``check`` (done, total).
    """

    def __call__(self, event: str, /, **fields: object) -> None:
        """Take one event."""
        ...


def silent(event: str, /, **fields: object) -> None:
    """The observer that says nothing."""
