"""Admitted updates of the round that runs, on disk before they count: a server that was killed asks nobody twice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedvfm import errors
from fedvfm.state import checkpoint, state
from fedvfm.storage import storage

ASKED = ".asked"
"""Of an empty file: a round was asked for."""


class Received:
    """The updates of one round in a folder.

    Args:
        folder: made when needed; emptied when a round is over.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def asked_before(self, number: int) -> bool:
        """Whether the round was asked for before, by this process or an earlier one; from now on it was.

        Raises:
            StorageError: if the disk refuses.
        """
        path = self._folder / f"{number:05d}{ASKED}"
        before = path.exists()
        if not before:
            storage.write_bytes(path, b"")
        return before

    def keep(self, update: state.SiteUpdate, number: int) -> None:
        """Write an admitted update and wait until it is on disk.

        Raises:
            StorageError: if the disk refuses; the update does not count then.
        """
        about = {
            "site": update.site,
            "examples": update.num_examples,
            "base": update.base_fingerprint,
            "metrics": dict(update.metrics),
            "asked": update.base_round + 1,
        }
        checkpoint.write(
            self._path(number, update.site),
            update.state,
            {"round": str(number), "update": json.dumps(about)},
            update.extra,
        )

    def find(self, number: int, bases: Mapping[str, state.AdapterState]) -> Iterator[state.SiteUpdate]:
        """Updates that this round took, which start from these adapters, one at a time; a damaged file is left out."""
        for path in sorted(self._folder.glob(f"{number:05d}-*.safetensors")):
            update = None
            with contextlib.suppress(errors.CheckpointError, ValueError, KeyError):
                update = _read(path, number)
                base = bases.get(update.site)
                update = None if base is None or base.fingerprint != update.base_fingerprint else update
            if update is not None:
                yield update

    def read(self, number: int, site: str) -> state.SiteUpdate:
        """The update of a site that was kept in this round.

        Raises:
            CheckpointError: if it was damaged since, or is gone.
        """
        path = self._path(number, site)
        try:
            return _read(path, number)
        except (ValueError, KeyError):
            raise errors.CheckpointError(
                f"{path}: the update of site '{site}' was changed since it was admitted. Remove the file and resume: "
                "the site is asked again"
            ) from None

    def _path(self, number: int, site: str) -> Path:
        return self._folder / f"{number:05d}-{_safe(site)}.safetensors"

    def remove(self, site: str) -> None:
        """Remove what was kept of a site, of any round."""
        for path in self._folder.glob(f"*-{_safe(site)}.safetensors"):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """The round is in the journal: its updates are not needed any more, and go."""
        for path in (*self._folder.glob("*.safetensors"), *self._folder.glob(f"*{ASKED}")):
            path.unlink(missing_ok=True)


def _read(path: Path, number: int) -> state.SiteUpdate:
    adapter, extra, marks = checkpoint.read(path)
    about = json.loads(marks["update"])
    asked = int(about.get("asked", number))  # an earlier release kept updates of the round itself alone
    return state.SiteUpdate(
        about["site"], adapter, about["examples"], asked - 1, about["base"], extra, about["metrics"]
    )


def _safe(site: str) -> str:
    """A file name for a site's name, whatever stands in it."""
    return site.encode().hex()[:180]
