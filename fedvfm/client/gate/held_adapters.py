"""What a site holds between messages: adapters that came, what coding its updates lost, and its personal arrays.

An adapter that came is what a later message may hold a difference to. What coding an update lost is its residual. It
counts from when the update may leave, and not before: an update that was trained and never left would else go on in the
next one, uncharged under a mechanism. So it is proposed when the update is coded, and settled once the update is on
disk and charged. Asked for the same round again, a site starts from the residual of the round before. Personal arrays
(see :mod:`fedvfm.state.groups`) are kept by the same rule: those of a round count once its update may leave.

    <recipe>-<fingerprint>.adapter           an adapter that came
    <recipe>-<round>-<site>-<base>.proposed  the residual of an update that was coded, by the adapter it started from
    <recipe>-<round>-<site>.residual         ... and may leave
    <recipe>-<round>-<site>-<base>.trained   personal arrays of an update that was trained
    <recipe>-<round>-<site>.personal         ... and may leave
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import safetensors
import safetensors.numpy

from fedvfm import errors
from fedvfm.state import state
from fedvfm.storage import storage

ADAPTERS = 8
"""That are held in memory; sites that share a process share them."""
ADAPTERS_ON_DISK = 2
RESIDUALS_ON_DISK = 3
"""Of a recipe, in files. A coordinator whose disk lost the last line of its journal asks for the round before again."""
_ADAPTER = ".adapter"
_AFTER = "after"

Residual = dict[str, state.Array]


class Adapters:
    """Adapters that came.

    Args:
        folder: where they outlive the process, or other processes find them; None where neither is needed.
        on_disk: how many of a recipe stay there. Processes of a simulation share as many as one of them would hold:
            sites with ranks of their own are sent an adapter of each rank.
    """

    def __init__(self, folder: Path | None = None, on_disk: int = ADAPTERS_ON_DISK) -> None:
        self._folder, self._on_disk = folder, on_disk
        self._held: OrderedDict[str, state.AdapterState] = OrderedDict()

    def find(self, fingerprint: str) -> state.AdapterState | None:
        """The adapter of this fingerprint; None where it is not held, or its file is damaged."""
        if fingerprint in self._held:
            self._held.move_to_end(fingerprint)
            return self._held[fingerprint]
        if self._folder is not None and fingerprint.isalnum():
            for path in self._folder.glob(f"*-{fingerprint[:32]}{_ADAPTER}"):
                found = state.AdapterState(_read(path))
                if found.fingerprint == fingerprint:
                    return found
        return None

    def keep(self, recipe: str, adapter: state.AdapterState) -> None:
        """Hold an adapter that came with a message of this recipe.

        Raises:
            StorageError: if the disk refuses.
        """
        name = adapter.fingerprint
        if name not in self._held and self._folder is not None:
            path = self._folder / f"{recipe}-{name[:32]}{_ADAPTER}"
            if not path.exists():
                storage.write_bytes(path, safetensors.numpy.save(dict(adapter)))
                _trim(sorted(self._folder.glob(f"{recipe}-*{_ADAPTER}"), key=_age), self._on_disk)
        self._held[name] = adapter
        self._held.move_to_end(name)
        while len(self._held) > ADAPTERS:
            self._held.popitem(last=False)


class Residuals:
    """What the updates of a site, or of the virtual sites of a run, lost when they were coded.

    Args:
        folder: private; made when needed. None where nothing outlives the process.
        at_once: an update may leave as soon as it is coded, as in a simulation.
    """

    _proposed: ClassVar[str] = ".proposed"
    _settled: ClassVar[str] = ".residual"

    def __init__(self, folder: Path | None = None, *, at_once: bool = False) -> None:
        self._folder, self._at_once = folder, at_once
        self._memory: dict[tuple[str, str], list[tuple[int, Residual]]] = {}
        self._dropped: dict[tuple[str, str], int] = {}

    def before(self, recipe: str, site: str, number: int) -> Residual:
        """What the last update before this round lost; nothing where there was none."""
        if self._folder is None:
            rows = [row for row in self._memory.get((recipe, site), []) if row[0] < number]
            return rows[-1][1] if rows else {}
        earlier = [path for path in self._paths(recipe, site) if _round(path) < number]
        return self._open(earlier[-1]) if earlier else {}

    def _paths(self, recipe: str, site: str) -> list[Path]:
        """Files that may leave, the last round at the end."""
        folder = self._folder
        return [] if folder is None else sorted(folder.glob(f"{recipe}-*-{_word(site)}{self._settled}"))

    def _open(self, path: Path) -> Residual:
        """What a file holds; what is lost with a damaged one is a little precision."""
        return _read(path)

    def _marks(self, recipe: str, site: str, number: int) -> dict[str, str] | None:
        """What is written beside the arrays of this round."""
        return None

    def propose(self, recipe: str, site: str, number: int, base: str, residual: Residual) -> None:
        """What the update of this round lost, should it leave.

        Args:
            recipe: hash of the recipe.
            site: its name.
            number: of the round.
            base: fingerprint of the adapter that the update started from: a round may be asked for with another one.
            residual: what it lost.

        Raises:
            StorageError: if the disk refuses.
        """
        if self._folder is None:
            kept = [row for row in self._memory.get((recipe, site), []) if row[0] < number]
            if len(kept) >= RESIDUALS_ON_DISK:
                self._dropped[recipe, site] = kept[-RESIDUALS_ON_DISK][0]
            self._memory[recipe, site] = [*kept[1 - RESIDUALS_ON_DISK :], (number, residual)]
            return
        path = self._folder / f"{recipe}-{number:06d}-{_word(site)}-{base[:32]}{self._proposed}"
        storage.write_bytes(path, safetensors.numpy.save(residual, self._marks(recipe, site, number)))
        storage.fault_point(f"{self._settled[1:]}-proposed")
        if self._at_once:
            with storage.guard(self._folder):
                self._settle(path)

    def settle(self, recipe: str, number: int, base: str) -> None:
        """The update of this round may leave: what it lost goes into the next one. Once, however often it is called.

        What an update of the same round from another adapter lost stays proposed: that one may never have left.

        All that is proposed in the folder is of this site, or of sites whose updates leave together.

        Raises:
            StorageError: if the disk refuses; then the update must not leave.
        """
        if self._folder is None:
            return
        with storage.guard(self._folder):
            for path in self._folder.glob(f"{recipe}-{number:06d}-*-{base[:32]}{self._proposed}"):
                self._settle(path)

    def _settle(self, path: Path) -> None:
        """One site's; processes that share the folder have sites of their own, and touch no other's files."""
        recipe, number, word, _ = path.stem.rsplit("-", 3)
        path.replace(path.with_name(f"{recipe}-{number}-{word}{self._settled}"))
        for never in path.parent.glob(f"{recipe}-*-{word}-*{self._proposed}"):
            if _round(never) < int(number):  # of a round that is over: its update never left
                never.unlink(missing_ok=True)
        kept = sorted(path.parent.glob(f"{recipe}-*-{word}{self._settled}"))
        # A coordinator that went back comes to the rounds after this one anew.
        for later in [path for path in kept if _round(path) > int(number)]:
            later.unlink(missing_ok=True)
            kept.remove(later)
        _trim(kept, RESIDUALS_ON_DISK)


class PersonalArrays(Residuals):
    """The arrays that a site keeps for itself, round by round; kept and settled as residuals are.

    Another state than the right one would be a wrong adapter that nobody sees. So what is damaged, or of a round that
    was let go, is said and never taken for "this site has not trained yet".
    """

    _proposed: ClassVar[str] = ".trained"
    _settled: ClassVar[str] = ".personal"

    def before(self, recipe: str, site: str, number: int) -> Residual:
        """The arrays of the last round before this one; nothing where the site had trained in none.

        Raises:
            CheckpointError: if they are not here any more, or damaged.
        """
        arrays = super().before(recipe, site, number)
        if not arrays and self._first(recipe, site) > 0:
            raise errors.CheckpointError(
                f"site '{site}': its personal arrays from before round {number} of recipe {recipe[:12]} were let go; "
                f"the last {RESIDUALS_ON_DISK} rounds are kept. Let the coordinator go on from its last round"
            )
        return arrays

    def proposed(self, recipe: str, site: str, number: int, base: str) -> Residual:
        """The arrays of this round as long as its update was not settled; nothing where there are none."""
        if self._folder is None:
            return {}
        path = self._folder / f"{recipe}-{number:06d}-{_word(site)}-{base[:32]}{self._proposed}"
        return self._open(path) if path.exists() else {}

    def has(self, recipe: str, number: int | None = None) -> bool:
        """Whether there is a file of this recipe, or of this round of it, whatever became of its update."""
        start = f"{recipe}-" if number is None else f"{recipe}-{number:06d}-"
        return self._folder is not None and any(
            True for ending in (self._proposed, self._settled) for _ in self._folder.glob(f"{start}*{ending}")
        )

    def _first(self, recipe: str, site: str) -> int:
        """After which round the earliest ones that are kept were trained; 0 where that was the first adapter.

        Raises:
            CheckpointError: if the file that says it is damaged.
        """
        if self._folder is None:
            rows = self._memory.get((recipe, site), [])
            return self._dropped.get((recipe, site), 0) if rows else 0
        paths = self._paths(recipe, site)
        if not paths:
            return 0
        self._open(paths[0])
        return int(_marks(paths[0])[_AFTER])

    def _marks(self, recipe: str, site: str, number: int) -> dict[str, str] | None:
        earlier = [_round(path) for path in self._paths(recipe, site) if _round(path) < number]
        return {_AFTER: str(earlier[-1] if earlier else 0)}

    def _open(self, path: Path) -> Residual:
        arrays = _read(path)
        if not arrays:
            raise errors.CheckpointError(f"{path}: these personal arrays are damaged. Restore the file from a backup")
        return arrays


def _round(path: Path) -> int:
    """Of a file of a round, by its name."""
    return int(path.name.split("-")[1])


def _marks(path: Path) -> dict[str, str]:
    """What is written beside the arrays of a file; nothing where it is damaged."""
    with contextlib.suppress(OSError, safetensors.SafetensorError), safetensors.safe_open(path, "np") as file:
        return dict(file.metadata() or {})
    return {}


def _word(site: str) -> str:
    """A site's name as part of a file's name, whatever stands in it."""
    return hashlib.sha256(site.encode()).hexdigest()[:16]


def _read(path: Path) -> Residual:
    with contextlib.suppress(OSError, safetensors.SafetensorError, errors.ProtocolError, TypeError):
        return dict(state.AdapterState(safetensors.numpy.load(path.read_bytes())))
    return {}


def _age(path: Path) -> tuple[int, str]:
    """For sorting, the oldest first; another worker may have let go of the file already."""
    try:
        return path.stat().st_mtime_ns, path.name
    except FileNotFoundError:
        return 0, path.name


def _trim(paths: list[Path], most: int) -> None:
    """Let go of all but the last ones."""
    for path in paths[:-most]:
        path.unlink(missing_ok=True)
