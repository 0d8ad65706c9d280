"""The run folder: what lies where, and one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedvfm import errors
from fedvfm.storage import hash_chain, storage

WRITTEN = (
    *("experiment.json", "seeds.json", "setup.json", "precision.json", "journal.jsonl"),
    *("arms", "checkpoints", "deployment", "features", "personal", "private", "received", "residuals"),
)
"""What may lie in a run folder before the first round is finished."""


@dataclass
class RunFolder:
    """The folder of one run.

    ``experiment.json`` (as resolved), ``precision.json``, ``journal.jsonl`` and ``checkpoints/`` (the federated arm),
    ``arms/NAME/`` (the others), ``evaluation.json`` of each arm, ``metrics.csv``, ``samples.csv``, ``summary.json``,
    ``adapter/``, ``report.html``, written last. The parent of several seeds holds ``seeds.json`` and a run folder a
    seed. All of it is private: the folder is 0700 where it is made here, files are 0600.
    """

    path: Path

    def arm(self, name: str) -> Path:
        """The folder of an arm; the federated one has the run's own."""
        return self.path if name == "federated" else self.path / "arms" / name

    @property
    def experiment(self) -> Path:
        """The experiment as resolved."""
        return self.path / "experiment.json"

    @property
    def seeds(self) -> Path:
        """Experiment and seeds, in the parent of several runs."""
        return self.path / "seeds.json"

    @property
    def residuals(self) -> Path:
        """What coding updates lost, until the run is finished."""
        return self.path / "residuals"

    def personal_arrays(self, site: str) -> Path:
        """Where a site keeps the arrays that are its own, under a recipe with ``personal``; they stay."""
        return self.path / "personal" / hashlib.sha256(site.encode()).hexdigest()[:16]

    @property
    def features(self) -> Path:
        """What the frozen blocks computed of images, until the run is finished."""
        return self.path / "features"

    @property
    def summary(self) -> Path:
        """The machine's view of a finished run."""
        return self.path / "summary.json"

    @property
    def precision(self) -> Path:
        """How the run began to compute."""
        return self.path / "precision.json"

    @property
    def begun(self) -> bool:
        """Whether there is something to resume."""
        return self.experiment.exists() or self.seeds.exists()

    @property
    def finished(self) -> bool:
        """Whether the run has come to its report."""
        return self.summary.exists() and (self.path / "report.html").exists()

    @property
    def trained(self) -> bool:
        """Whether a round of any arm is finished, here or in the run of a seed."""
        journals = self.path.rglob("journal.jsonl")
        return any(path.stat().st_size for path in journals) or any(self.path.rglob("evaluation.json"))

    def require_free(self) -> None:
        """Refuse a folder that holds anything but what a killed write leaves.

        Raises:
            OutputInUse: saying what is there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise errors.OutputInUse(f"output folder {self.path} is a file. Choose another --output")
        if self.path.is_dir() and not all(storage.is_part(path) for path in self.path.iterdir()):
            resume = f", or go on with the run in it: fedvfm simulate --resume {self.path}" if self.begun else ""
            raise errors.OutputInUse(f"output folder {self.path} is not empty. Choose another --output{resume}")

    def create(self) -> bool:
        """Make the folder; whether it was not there.

        Raises:
            StorageError: if it cannot be made.
        """
        new = not self.path.exists()
        with storage.guard(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
        return new

    @contextlib.contextmanager
    def freed_unless_trained(self, new: bool) -> Iterator[None]:
        """Where the work inside ends before any round is finished, free the folder: it may be named again at once.

        Not so where the disk refused: there the remedy is to make room and resume; nor where an engine broke: its error
        names the logs that lie in the folder. Only what a run writes is removed,
        and the folder if it is empty then. Whoever calls holds the folder's lock.

        Args:
            new: whether the folder was made for this run.
        """
        try:
            yield
        except BaseException as error:
            if not self.trained and not isinstance(error, errors.StorageError | errors.EngineError):
                with contextlib.suppress(OSError, errors.StorageError):
                    self._free(new)
            raise

    def _free(self, new: bool) -> None:
        for name in WRITTEN:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                storage.remove_folder(path)
            else:
                path.unlink(missing_ok=True)
        storage.sweep(self.path)
        if new:
            self.path.rmdir()

    def write_experiment(self, values: dict[str, Any]) -> None:
        """Write the experiment as resolved, before anything else."""
        storage.write_text(self.experiment, as_text(values))

    def write_seeds(self, values: dict[str, Any]) -> None:
        """Write experiment and seeds into the parent of their runs, before anything else."""
        storage.write_text(self.seeds, as_text(values))

    def read_experiment(self) -> dict[str, Any]:
        """The experiment as resolved.

        Raises:
            CheckpointError: if this is no run folder.
        """
        if self.path.is_dir() and all(storage.is_part(path) for path in self.path.iterdir()):
            raise errors.CheckpointError(
                f"{self.path} is no run folder yet: nothing was saved in it. Start anew: fedvfm "
                f"simulate EXPERIMENT --output {self.path}"
            )
        if self.seeds.exists():
            raise errors.CheckpointError(
                f"{self.path} holds one run a seed. Go on with all of them: fedvfm simulate --resume {self.path}, "
                "or fedvfm.simulation.seeds.resume"
            )
        return read_json(
            self.experiment, f"{self.path} is no run folder of fedvfm simulate: it holds no readable experiment.json"
        )

    def evaluation(self, arm: str) -> dict[str, Any] | None:
        """What an arm's test found, or None while it is not finished."""
        path = self.arm(arm) / "evaluation.json"
        return read_json(path, f"{path} is damaged; remove it and resume") if path.exists() else None

    def write_evaluation(self, arm: str, values: dict[str, Any]) -> None:
        """Mark an arm as finished."""
        storage.write_text(self.arm(arm) / "evaluation.json", hash_chain.canonical(values) + "\n")


def of_arm(path: Path) -> Path:
    """The run's folder, of which an arm's is part."""
    for one in (path, *path.parents):
        if (one / "experiment.json").exists():
            return one
    return path


def as_text(values: dict[str, Any]) -> str:
    """JSON that people read."""
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_json(path: Path, otherwise: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: saying ``otherwise``.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise errors.CheckpointError(otherwise) from None
    if not isinstance(values, dict):
        raise errors.CheckpointError(otherwise)
    return values


class Lock:
    """Holds a run folder for one process; the operating system lets go when the process ends, however it ends.

    Raises:
        OutputInUse: if another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        with storage.guard(self._folder):
            self._handle = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            raise errors.OutputInUse(
                f"{self._folder} is in use by another running fedvfm. Wait for it or stop it"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)
