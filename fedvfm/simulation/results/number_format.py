"""The numbers a run computes with: decided once, kept in its folder, the same in every engine and after a resume."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.model import device as devices
from fedvfm.model import precision
from fedvfm.report import progress
from fedvfm.simulation import run_folder


@contextlib.contextmanager
def of_run(run: run_folder.RunFolder, what: schema.Experiment, observer: progress.Observer) -> Iterator[None]:
    """Compute as the run began, and say so where this machine would decide otherwise.

    Raises:
        CheckpointError: if the file that says how it began is damaged.
        StorageError: if it cannot be written.
    """
    asked, device = what.recipe.precision, devices.choose(what.device)
    if asked == precision.FLOAT32:
        yield
        return
    here = precision.of(asked, device)
    if here == precision.FLOAT32:
        observer("note", text=precision.words(asked, device))
    with precision.taken(device, _kept(run, asked, precision.ratio(device))):
        began = precision.of(asked, device)
        if began != here:
            observer("note", text=f"this run began in {began} and goes on so, though {here} is quicker on this machine")
        if not run.precision.exists():
            precision.write(run.precision, device)
        yield


def _kept(run: run_folder.RunFolder, asked: str, here: float) -> float:
    """The ratio that decides: of when the run began, else of this machine."""
    if run.precision.exists():
        return precision.read(run.precision)
    if not any((run.path / name).exists() for name in ("journal.jsonl", "arms", "evaluation.json")):
        return here
    if asked == precision.BFLOAT16:  # begun by a release that took the word literally
        return min(here, precision.LIMIT)
    raise errors.CheckpointError(
        f"{run.precision} is missing, which says how this run computes. Restore it from a backup"
    )
