"""A simulation's runs for trackers: ``python -m fedvfm.simulation.tracked_runs SETTINGS OUTPUT`` is such a process."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.report import progress
from fedvfm.runtime import processes
from fedvfm.simulation import run_folder
from fedvfm.tracking import base, follower, targets, values


@contextlib.contextmanager
def tracked(output: Path, wanted: Sequence[targets.Target], observer: progress.Observer) -> Iterator[None]:
    """Follow a run with these trackers while the block runs.

    Args:
        output: the run's folder, or the parent of several seeds; need not be there yet.
        wanted: the trackers.
        observer: is told what a tracker could not take.
    """
    folder = Path(tempfile.mkdtemp(prefix="fedvfm-track-"))

    def begin(program: processes.Program) -> processes.Child:
        child = processes.Child(program, folder)
        child.start()
        return child

    def tell(text: str) -> None:
        observer("note", text=text)

    try:
        with follower.followed(wanted, begin, __spec__.name, output, tell, sites=True):
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def runs(output: Path) -> list[base.Run]:
    """Every arm of every seed that a round or a test was written of."""
    folders = [run_folder.RunFolder(path.parent) for path in sorted(output.glob("seed-*/experiment.json"))]
    folders += [run_folder.RunFolder(output)] if run_folder.RunFolder(output).experiment.exists() else []
    return [arm for folder in folders for arm in _arms(output, folder)]


def _arms(output: Path, run: run_folder.RunFolder) -> Iterator[base.Run]:
    try:
        experiment = run_folder.read_json(run.experiment, f"{run.experiment} cannot be read")
    except errors.CheckpointError:  # it is being written
        return
    recipe: dict[str, Any] = experiment.get("recipe", {})
    seed = f"{experiment.get('name', output.name)}, seed {recipe.get('seed', 0)}"
    place = Path(output.name) / run.path.relative_to(output)
    places = {path.parent for name in ("journal.jsonl", "evaluation.json") for path in (run.path / "arms").rglob(name)}
    arms = {"federated": run.path, **{str(path.relative_to(run.path / "arms")): path for path in sorted(places)}}
    for name, folder in arms.items():
        yield base.Run(f"{seed}, {name}", folder, str(place / name), values.parameters(recipe))


if __name__ == "__main__":
    settings, where = follower.arguments()
    follower.follow(settings, lambda: runs(where))
