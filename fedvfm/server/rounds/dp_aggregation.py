"""Privacy at the server: a round's aggregate is made private once, put on disk, and only then used.

A server that was killed after that finds it there and draws no second time for the same round: the mean of two draws
has less noise than the journal states. Which rounds were drawn is never forgotten here, and a round before one of them
is not drawn anew: the folder was put back then. Where all of it was put back, the sites notice
(:mod:`fedvfm.client.gate.rollback_detection`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.aggregators import base, exact_sum
from fedvfm.privacy import accountant, planner, randomness
from fedvfm.privacy import base as mechanisms
from fedvfm.privacy import table as mechanism_table
from fedvfm.server.rounds import aggregation
from fedvfm.state import checkpoint, groups, state
from fedvfm.storage import hash_chain, storage
from fedvfm.trust import locked_recipe

FOLDER = "private"
DRAWN = ".drawn"
"""What is kept of a draw for ever: an empty file of this suffix. The mean itself is kept as its checkpoint is."""
ENTRY = "privacy"
"""Key of a journal line, and of what is kept beside a private mean."""
_COMPUTED = ("norm", "examples")
"""Reasons of a refusal whose detail is a number made from a site's images."""

Rounds = Sequence[Mapping[str, Any]]


def of(locked: locked_recipe.LockedRecipe, rule: base.Aggregator, folder: Path, *, simulated: bool) -> Private | None:
    """The server's part of the recipe's mechanism; None where it has none.

    Raises:
        ConfigError: if the recipe has a mechanism that is not known here, or cannot keep what it promises.
    """
    mechanism_table.require(locked.recipe)
    part = mechanism_table.get(locked.recipe.privacy).server()
    return None if part is None else Private(part, locked, rule, folder, simulated=simulated)


class Private:
    """Makes the rounds of one federation private.

    Args:
        part: the mechanism's.
        locked: recipe and manifest.
        rule: a sum: it is given the private mean as if it were one update of all sites asked.
        folder: of the federation.
        simulated: noise comes from the recipe's seed; only a simulation, whose engines must agree, may say so.
    """

    def __init__(
        self,
        part: mechanisms.ServerPart,
        locked: locked_recipe.LockedRecipe,
        rule: base.Aggregator,
        folder: Path,
        *,
        simulated: bool,
    ) -> None:
        self._part, self._locked, self._rule, self._simulated = part, locked, rule, simulated
        self._recipe = locked.recipe
        self._folder = folder / FOLDER

    def found(
        self, number: int, start: state.AdapterState, kept: Mapping[str, state.Array]
    ) -> aggregation.Joined | None:
        """What was drawn for this round before the server was stopped, if anything was.

        Raises:
            CheckpointError: if it is damaged or gone, or was drawn from another adapter. There is no second draw.
        """
        path = checkpoint.path_of(self._folder, number)
        if not path.exists():
            self._require_undrawn(number)
            return None
        mean, _, marks = checkpoint.read(path)
        if (marks.get("recipe"), marks.get("base")) != (self._recipe.hash, start.fingerprint):
            raise errors.CheckpointError(
                f"{path}: noise was drawn for round {number} before, from another adapter, and is not drawn twice: "
                "epsilon would be more than the journal states. Restore the folder from a backup"
            )
        return self._joined(mean, json.loads(marks["record"]), kept)

    def intake(
        self, number: int, start: state.AdapterState, asked: int, kept: Mapping[str, state.Array], before: Rounds
    ) -> Clipped:
        """Takes the updates of a round: each is clipped and summed as it comes.

        Args:
            number: of the round.
            start: the global adapter that the sites start from.
            asked: number of sites asked.
            kept: what the rule left in the round before.
            before: the journal's lines.
        """
        names = groups.leaving(self._locked.manifest, self._recipe, number)
        memory = self._part.configure(self._recipe, asked, before[-1].get(ENTRY, {}) if before else {})

        def finish(clipped: Clipped, record: Mapping[str, Any]) -> aggregation.Joined:
            return self._finish(number, clipped, kept, record, before)

        return Clipped(self._part, start, names, memory, finish)

    def _finish(
        self,
        number: int,
        clipped: Clipped,
        kept: Mapping[str, state.Array],
        record: Mapping[str, Any],
        before: Rounds,
    ) -> aggregation.Joined:
        """Add noise, divide by the number asked, put it on disk, and give it to the rule."""
        asked = len(record["cohort"])
        moved, memory = self._part.finish(clipped.total(), clipped.memory, self._draws(number))
        start = clipped.start
        after = {name: (start[name].astype(np.float64) + moved[name]).astype(np.float32) for name in moved}
        mean = state.AdapterState({**start, **after})
        line = {
            **record,
            "refused": {name: _without_numbers(why) for name, why in record["refused"].items()},
            "examples": dict(sorted(clipped.examples.items())),
            "weights": dict.fromkeys(sorted(clipped.examples), 1 / asked),
            "train": {name: {} for name in sorted(clipped.examples)},
            "factor_error": None,
            "aggregate_error": None,
            ENTRY: self._told(memory, before),
        }
        marks = {"round": str(number), "recipe": self._recipe.hash, "base": start.fingerprint}
        path = checkpoint.path_of(self._folder, number)
        checkpoint.write(path, mean, {**marks, "record": hash_chain.canonical(line)})
        storage.fault_point("private-kept")
        self._let_go(number - 1)
        return self._joined(mean, line, kept)

    def _rounds(self) -> list[int]:
        """Rounds that noise was drawn for, whatever is left of them."""
        kept = [path for path in self._folder.glob("round-*") if path.suffix in (DRAWN, ".safetensors")]
        return sorted({int(path.stem.partition("-")[2]) for path in kept})

    def _require_undrawn(self, number: int) -> None:
        last = max(self._rounds(), default=0)
        if number <= last:
            raise errors.CheckpointError(
                f"{self._folder}: noise was drawn up to round {last} before, and what was drawn for round {number} is "
                "gone: this folder was put back to an older copy. Noise is not drawn twice: epsilon would be more than "
                "the journal states. Restore the newest copy of the whole folder, or begin another recipe"
            )

    def _let_go(self, keep_from: int) -> None:
        """Remove means of rounds before, but not that they were drawn.

        The one before the last is kept as its checkpoint is: its journal line may be lost with the disk's cache.
        """
        for number in self._rounds():
            mark = checkpoint.path_of(self._folder, number).with_suffix(DRAWN)
            if number < keep_from and not mark.exists():
                storage.write_bytes(mark, b"")
        checkpoint.prune(self._folder, keep_from)

    def _draws(self, number: int) -> randomness.Draws:
        if self._simulated:
            return randomness.Seeded(self._recipe.seed, "privacy", number, "server")
        return randomness.System()

    def _told(self, memory: mechanisms.Memory, before: Rounds) -> dict[str, Any]:
        """The journal's entry: what was done, and epsilon of all rounds so far."""
        own = self._recipe.privacy
        noises = [float(line[ENTRY]["noise_multiplier"]) for line in before if ENTRY in line]
        noises.append(float(memory["noise_multiplier"]))
        spent = accountant.joined(accountant.steps(1.0, noise, 1) for noise in noises)
        bound = accountant.epsilon(spent, float(own.delta or 0.0))
        return {
            "mechanism": own.mechanism,
            "unit": mechanism_table.get(own).unit,
            **memory,
            "steps": len(noises),
            "epsilon": planner.finite(bound.value),
            "delta": bound.delta,
            "accountant": bound.accountant,
            "simulated": self._simulated,
        }

    def _joined(
        self, mean: state.AdapterState, line: dict[str, Any], kept: Mapping[str, state.Array]
    ) -> aggregation.Joined:
        """The rule's aggregate. A sum of equal weights sees no more of the updates than this."""
        manifest = self._locked.manifest
        one = base.Contribution(float(len(line["cohort"])), mean, manifest)
        return aggregation.Joined(*aggregation.folded(self._rule, [one], manifest, kept), line)


class Clipped:
    """The intake under a mechanism at the server: what each site changed, clipped, in one exact sum; no more stays.

    Args:
        part: the mechanism's.
        start: the global adapter that the sites started from.
        names: of the arrays that train.
        memory: the mechanism's, of this round.
        finish: makes the sum private.
    """

    def __init__(
        self,
        part: mechanisms.ServerPart,
        start: state.AdapterState,
        names: Sequence[str],
        memory: mechanisms.Memory,
        finish: Callable[[Clipped, Mapping[str, Any]], aggregation.Joined],
    ) -> None:
        self.start, self.memory = start, memory
        self.examples: dict[str, int] = {}
        self._part, self._names, self._finish = part, names, finish
        self._sum = exact_sum.ExactSum()

    @property
    def sites(self) -> Collection[str]:
        """See :class:`fedvfm.server.rounds.aggregation.Intake`."""
        return sorted(self.examples)

    def take(self, update: state.SiteUpdate) -> None:
        """See :class:`fedvfm.server.rounds.aggregation.Intake`."""
        change, self.memory = self._part.on_aggregate(difference(update.state, self.start, self._names), self.memory)
        self._sum = self._sum.add(1.0, change)
        self.examples[update.site] = update.num_examples

    def go_without(self, site: str) -> None:
        """See :class:`fedvfm.server.rounds.aggregation.Intake`."""

    def total(self) -> dict[str, NDArray[np.float64]]:
        """The sum; zeros where nothing was taken."""
        return self._sum.totals() or {name: np.zeros(self.start[name].shape) for name in self._names}

    def finish(self, record: Mapping[str, Any]) -> aggregation.Joined:
        """See :class:`fedvfm.server.rounds.aggregation.Intake`."""
        return self._finish(self, record)


def difference(
    after: state.AdapterState, before: state.AdapterState, names: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """What changed of these arrays, exact: a difference of two float32 numbers rounded in float64."""
    return {name: after[name].astype(np.float64) - before[name].astype(np.float64) for name in names}


def _without_numbers(why: Mapping[str, str]) -> dict[str, str]:
    return {**why, "detail": "not told: it is made from images"} if why["reason"] in _COMPUTED else dict(why)
