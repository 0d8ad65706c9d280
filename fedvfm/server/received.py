"""Admitted updates of the round that runs, on disk before they count: a server that was killed asks nobody twice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from fedvfm import errors, state
from fedvfm.server import checkpoint


class Received:
    """The updates of one round in a folder.

    Args:
        folder: made when needed; emptied when a round is over.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

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
        }
        path = self._folder / f"{number:05d}-{_safe(update.site)}.safetensors"
        checkpoint.write(path, update.state, {"round": str(number), "update": json.dumps(about)}, update.extra)

    def find(self, number: int, bases: Mapping[str, state.AdapterState]) -> dict[str, state.SiteUpdate]:
        """Updates of this round that start from these adapters, by site; a damaged file is asked for again."""
        found = {}
        for path in sorted(self._folder.glob(f"{number:05d}-*.safetensors")):
            with contextlib.suppress(errors.CheckpointError, ValueError, KeyError):
                adapter, extra, marks = checkpoint.read(path)
                about = json.loads(marks["update"])
                base = bases.get(about["site"])
                if base is not None and base.fingerprint == about["base"]:
                    found[about["site"]] = state.SiteUpdate(
                        about["site"], adapter, about["examples"], number - 1, about["base"], extra, about["metrics"]
                    )
        return found

    def clear(self) -> None:
        """The round is in the journal: its updates are not needed any more, and go."""
        for path in self._folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)


def _safe(site: str) -> str:
    """A file name for a site's name, whatever stands in it."""
    return site.encode().hex()[:180]
