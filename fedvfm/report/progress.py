"""Events a run tells its watcher: a plain callable, so that a terminal, a test or a notebook can be one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from fedvfm.report import terminal

if TYPE_CHECKING:
    from rich.progress import Progress


class Observer(Protocol):
    """Receives events by name; unknown events must be ignored.

    Events: ``arm`` (name, index, count, rounds, sites), ``round`` (arm, round, rounds, sites), ``reply`` (arm, round,
    phase, site, loss), ``step`` (arm, round, phase, site, done, total; only from engines that see their sites compute,
    and a few times a second at most), ``refused`` (arm, round, site, reason), ``round-end`` (arm, round, record),
    ``test`` (arm, round, sites), ``finished`` (arm, round, record), ``note`` (text). Arms may go on side by side: an
    event belongs to the arm that it names. Prediction: ``input`` (name, index, count), ``slice`` (name, index, count).
    Data check: ``check`` (done, total).
    """

    def __call__(self, event: str, /, **fields: object) -> None:
        """Take one event."""
        ...


Step = Callable[[int, int], None]
"""Receives how many steps, or samples, of how many are done."""


def no_step(done: int, total: int, /) -> None:
    """The receiver of steps that does nothing with them."""


def silent(event: str, /, **fields: object) -> None:
    """The observer that says nothing."""


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook."""
    return "ipykernel" in sys.modules


@contextlib.contextmanager
def watch(quiet: bool, live: Callable[[Progress], Observer], plain: Callable[[], Observer]) -> Iterator[Observer]:
    """The observer for this output: silent, ``live`` with bars where a person looks on, ``plain`` lines elsewhere."""
    if quiet:
        yield silent
    elif in_notebook():
        from fedvfm.report import notebook_bars

        with notebook_bars.Bars() as bars:
            yield live(bars)
    elif sys.stderr.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=terminal.console(stderr=True), transient=True) as bar:
            yield live(bar)
    else:
        yield plain()
