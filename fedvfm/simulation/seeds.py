"""One experiment under several seeds: a parent folder with a run folder a seed, resumed as one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.report import progress
from fedvfm.simulation import experiment, run, run_folder
from fedvfm.storage import storage

SCHEMA_VERSION = 1


def simulate(
    what: schema.Experiment | Mapping[str, Any] | str | os.PathLike[str],
    seeds: Sequence[int],
    *,
    output: str | os.PathLike[str] | None = None,
    observer: progress.Observer = progress.silent,
) -> list[run.Result]:
    """Run an experiment once a seed, into ``seed-N`` below one folder.

    Args:
        what: as for :func:`fedvfm.simulation.run.simulate`.
        seeds: each once.
        output: the parent, a folder that does not exist or is empty; by default ``runs/NAME-DATE``.
        observer: told of progress.

    Raises:
        FedvfmError: with cause, value, limit and remedy; what is wrong under any seed is found before the first run.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise errors.ConfigError("seeds", [f"{list(seeds)}: give at least one, each once, from 0"])
    prepared, _ = run.prepare(what)
    parent = run_folder.RunFolder(Path(output) if output else run.default_output(prepared.name))
    parent.require_free()
    for seed in seeds:
        experiment.hospitals(prepared.with_seed(seed))
    new = parent.create()
    with run_folder.Lock(parent.path):
        parent.require_free()
        storage.sweep(parent.path)
        with parent.freed_unless_trained(new):
            values = prepared.model_dump(mode="json")
            parent.write_seeds({"schema_version": SCHEMA_VERSION, "experiment": values, "seeds": list(seeds)})
            return _all(prepared, seeds, parent, observer)


def resume(
    path: str | os.PathLike[str],
    *,
    observer: progress.Observer = progress.silent,
    workers: schema.Workers | None = None,
) -> list[run.Result]:
    """Go on with all seeds: finished ones are left as they are, others are resumed or begun.

    Args:
        path: the parent folder.
        observer: told of progress.
        workers: processes that compute, in place of the experiment's.

    Raises:
        CheckpointError: if the folder is no parent of seeds, or was changed.
    """
    parent = run_folder.RunFolder(Path(path))
    what, seeds = _recorded(parent)
    what = what if workers is None else what.model_copy(update={"workers": workers})
    with run_folder.Lock(parent.path):
        return _all(what, seeds, parent, observer)


def _recorded(parent: run_folder.RunFolder) -> tuple[schema.Experiment, list[int]]:
    """The experiment and the seeds the parent was begun with."""
    damaged = f"{parent.seeds} is damaged. Restore it from a backup, or resume each seed-N folder by itself"
    found = run_folder.read_json(parent.seeds, damaged)
    seeds = found.get("seeds")
    if found.get("schema_version") != SCHEMA_VERSION or not isinstance(seeds, list):
        raise errors.CheckpointError(damaged)
    if not all(isinstance(seed, int) for seed in seeds) or not isinstance(found.get("experiment"), dict):
        raise errors.CheckpointError(damaged)
    return experiment.parse(found["experiment"], str(parent.seeds)), seeds


def _all(
    what: schema.Experiment, seeds: Sequence[int], parent: run_folder.RunFolder, observer: progress.Observer
) -> list[run.Result]:
    results = []
    for number, seed in enumerate(seeds, start=1):
        observer("note", text=f"seed {seed} ({number} of {len(seeds)})")
        results.append(_one(what.with_seed(seed), run_folder.RunFolder(parent.path / f"seed-{seed}"), observer))
    return results


def _one(what: schema.Experiment, own: run_folder.RunFolder, observer: progress.Observer) -> run.Result:
    """The run of one seed, from wherever it is."""
    if own.finished:
        return run.Result(
            own.path, run_folder.read_json(own.summary, f"{own.summary} is damaged; remove it and resume")
        )
    if own.experiment.exists():
        return run.resume(own.path, observer=observer, workers=what.workers)
    return run.simulate(what, output=own.path, observer=observer)
