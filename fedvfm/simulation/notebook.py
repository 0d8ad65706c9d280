"""What a script or notebook calls: the same as on the command line, with values in place of options."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from fedvfm.backbones import stored
from fedvfm.config import overrides as assignments
from fedvfm.config import schema
from fedvfm.report import progress
from fedvfm.simulation import experiment, plan, run, seeds
from fedvfm.simulation.engines import live

What = schema.Experiment | Mapping[str, Any] | str | os.PathLike[str]
Overrides = Mapping[str, Any] | Sequence[str]


@overload
def simulate(
    what: What,
    *,
    rounds: int | None = ...,
    seeds: None = ...,
    overrides: Overrides = ...,
    output: str | os.PathLike[str] | None = ...,
    observer: progress.Observer | None = ...,
    engine: run.Engine | None = ...,
) -> run.Result: ...


@overload
def simulate(
    what: What,
    *,
    rounds: int | None = ...,
    seeds: Sequence[int],
    overrides: Overrides = ...,
    output: str | os.PathLike[str] | None = ...,
    observer: progress.Observer | None = ...,
) -> list[run.Result]: ...


def simulate(
    what: What,
    *,
    rounds: int | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Overrides = (),
    output: str | os.PathLike[str] | None = None,
    observer: progress.Observer | None = None,
    engine: run.Engine | None = None,
) -> run.Result | list[run.Result]:
    """Run an experiment to its report.

    Args:
        what: a bundled name, a TOML file, a table of the same values, or an Experiment.
        rounds: in place of the experiment's.
        seeds: run once per seed; the results are a list then.
        overrides: ``{"recipe.adapter.rank": 4}``, or what follows ``--set`` on the command line.
        output: a folder that does not exist or is empty; by default ``runs/NAME-DATE``.
        observer: told of progress; left out, a notebook shows bars and a line a round, and a script nothing.
        engine: carries the messages, in place of the one that the experiment names.

    Raises:
        FedvfmError: with cause, value, limit and remedy.
    """
    prepared = changed(what, overrides, rounds)
    with live.watch(quiet=not progress.in_notebook()) as watcher:
        told_to = watcher if observer is None else observer
        if seeds is None:
            return run.simulate(prepared, output=output, observer=told_to, engine=engine)
        return _seeded(prepared, seeds, output, told_to)


def _seeded(
    what: schema.Experiment,
    numbers: Sequence[int],
    output: str | os.PathLike[str] | None,
    observer: progress.Observer,
) -> list[run.Result]:
    return seeds.simulate(what, numbers, output=output, observer=observer)


def plan_of(what: What, *, rounds: int | None = None, overrides: Overrides = ()) -> dict[str, Any]:
    """What a run would do, as ``fedvfm simulate --dry-run --json`` says it; needs neither weights nor network.

    Raises:
        FedvfmError: with cause, value, limit and remedy.
    """
    prepared = changed(what, overrides, rounds)
    return plan.plan(prepared, experiment.hospitals(prepared), experiment.examine(prepared))


def changed(what: What, overrides: Overrides = (), rounds: int | None = None) -> schema.Experiment:
    """The experiment with these values in place of its own.

    Raises:
        ConfigError: with all faults of form at once.
    """
    if isinstance(what, str | os.PathLike):
        values, name = experiment.read(os.fspath(what))
    else:
        values = what.model_dump(mode="json") if isinstance(what, schema.Experiment) else dict(what)
        name = "experiment"
    sets = [] if isinstance(overrides, Mapping) else overrides
    values = assignments.put(assignments.apply(values, sets), overrides if isinstance(overrides, Mapping) else {})
    if rounds is not None:
        values = assignments.put(values, {"recipe.rounds": rounds})
    return experiment.parse(values, name)


def fetch_weights(name: str, *, revision: str | None = None) -> Path:
    """Bring a backbone's weights to this machine, or prove that they are here; the folder they are in.

    Raises:
        WeightsError: if they cannot be brought here.
    """
    settings = schema.parse(schema.BackboneConfig, {"name": name, "revision": revision}, "fetch_weights")
    return stored.fetch(settings).folder
