"""Which adapters a site takes: the one that the recipe names, then each within a bounded step of one it took before.

A coordinator that may send any numbers can send a trap: weights under which an update or a score tells of one patient.
So the first round starts from what the approved recipe says: the adapter that its seed makes here, or the one that
``start`` names. From there on a step, the distance to the adapter of the round before, is at most what admitted updates
can come to: ``recipe.admission.max_update_norm``, and ``policy.max_step`` times the largest update that this site sent.
Nothing that does not train may move. An adapter is scored only if this site trains in the recipe, or has no image to
train on: for such a site the recipe's bound stands alone.

What this stops: numbers of the asker's own making, all at once. What it does not stop: a coordinator that walks away
from the sites' work step by step, each within the bound, over the rounds that the policy gives. Under a mechanism at
site level the coordinator adds noise of its own, which no update bounds: there the recipe's bound stands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.client.gate import held_adapters
from fedvfm.config import privacy, schema
from fedvfm.protocol import protocol
from fedvfm.state import control_variates, factors, groups, state
from fedvfm.trust import locked_recipe

REASON, SHAPES, SAME = "policy-base", "adapter", "secure-base"
SLACK = 1.1
"""What coding and rounding may add to a step."""
ALIKE, NOTHING = 1e-4, 1e-6
"""Relative and absolute: two machines draw the same first adapter up to rounding."""
_LONGEST = 2.0
"""How much longer a factor may be than its partner, or than 1, under a rule that makes both anew."""

EVENTS = ("trained", "evaluated")
"""Of the audit log, after which an adapter counts as taken."""


class Taken:
    """The adapters of one recipe that a site trained from or scored, as its audit log says.

    Attributes:
        names: round -> fingerprints of its adapters, the one that was taken last at the end.
        bases: fingerprint of an adapter that was trained from -> the first round that it was.
        largest: the largest norm of an update that this site made; None where it made none.
    """

    def __init__(self) -> None:
        self.names: dict[int, dict[str, None]] = {}
        self.bases: dict[str, int] = {}
        self.largest: float | None = None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take an entry of the log, of this recipe and one of :data:`EVENTS`."""
        trained = entry["event"] == "trained"
        name = str(entry["base"] if trained else entry["fingerprint"])
        names = self.names.setdefault(int(entry["round"]) - trained, {})
        names.pop(name, None)
        names[name] = None
        if trained:
            self.bases.setdefault(name, int(entry["round"]))
        if trained and "norm" in entry:
            self.largest = max(float(entry["norm"]), self.largest or 0.0)


@dataclass(frozen=True)
class Lineage:
    """The adapters of one recipe at one site.

    Attributes:
        locked: what the site itself makes of the recipe, at the recipe's rank.
        manifest: every array of the adapter at the site's own rank.
        taken: the adapters that were taken before.
        held: the adapters that came last.
        trains: whether this site has images to train on.
    """

    locked: locked_recipe.LockedRecipe
    manifest: state.Manifest
    taken: Taken
    held: held_adapters.Adapters
    trains: Callable[[], bool] = lambda: True

    @property
    def _recipe(self) -> schema.Recipe:
        return self.locked.recipe

    def require(self, kind: str, task: protocol.Task, max_step: float) -> None:
        """Check the adapter of a message.

        Args:
            kind: of the message.
            task: the message.
            max_step: the policy's.

        Raises:
            PolicyRefused: "policy-base", "adapter" where it does not fit this site's model, or "secure-base" where it
                was trained from in another round under secure aggregation.
        """
        adapter, number = task.state, task.round - (kind == protocol.TRAIN)
        if adapter is None or kind == protocol.HANDSHAKE:
            return
        if kind == protocol.TRAIN and self._recipe.secure_aggregation is not None:
            self._require_new(task.round, adapter)
        if number == self._recipe.first_round - 1:
            self._require_first(adapter)
            return
        if not self.manifest.fits(adapter):
            raise errors.PolicyRefused(SHAPES, f"the adapter of round {number} does not fit this site's model")
        first = self.first()
        if (first is not None and adapter.fingerprint == first.fingerprint) or self._took(number, adapter, kind):
            return
        if kind == protocol.EVALUATE and self.taken.largest is None and self.trains():
            raise _refused(f"this site has trained nothing of the recipe, so it scores no adapter of round {number}")
        self._require_near(number, adapter, max_step)

    def require_correction(self, task: protocol.Task, images: int, max_step: float) -> None:
        """Check the correction of a round's steps: it moves the weights too, and no farther than an adapter may move.

        Args:
            task: the message.
            images: that this site trains on.
            max_step: the policy's.

        Raises:
            ProtocolError: if it is not of the form that the recipe says.
            PolicyRefused: "policy-base" if it would move them farther, or is more than zero before any site trained.
        """
        recipe, correction = self._recipe, task.correction
        control_variates.require(correction, self.manifest, recipe, task.round)
        if correction is None:
            return
        lengths = control_variates.lengths(self.manifest, recipe, task.round, images)
        bound = 0.0 if task.round == 1 else self._bound(max_step)
        reach = control_variates.reach(correction, lengths)
        if not reach <= bound:
            raise _refused(
                f"the correction of round {task.round} moves the adapter by {reach:.4g}; what sites may send comes to "
                f"{bound:.4g} at most. If it is honest work, raise policy.max_step = {max_step:g}"
            )

    def moved(self, before: state.AdapterState, after: state.AdapterState) -> float:
        """How far apart two adapters are.

        The Euclidean norm of the difference; of the products scale B A where the rule makes both factors anew, so that
        the difference of the factors means nothing.
        """
        if not rules.refactors(rules.make(self._recipe.aggregation)):
            return (after - before).norm()
        dense = [spec.name for spec in self.manifest if spec.role == "dense" and spec.group != factors.RESIDUAL]
        after, before = factors.whole(after, self.manifest), factors.whole(before, self.manifest)
        total = (after.select(dense) - before.select(dense)).norm() ** 2
        for a, b in self.manifest.pairs().values():
            _, left = np.linalg.qr(np.hstack([after[b.name], before[b.name]]).astype(np.float64))
            _, right = np.linalg.qr(np.vstack([after[a.name], -before[a.name]]).T.astype(np.float64))
            total += (a.scale * float(np.linalg.norm(left @ right.T))) ** 2
        return float(np.sqrt(total))

    # -- the first one ---------------------------------------------------------------------------------------------

    def first(self) -> state.AdapterState | None:
        """The adapter of round 0 as this site makes it; None where the recipe goes on from one that is not made."""
        if self._recipe.start is not None:
            return None
        return rules.make(self._recipe.aggregation).for_site(self.locked.adapter, self.manifest)

    def _require_first(self, adapter: state.AdapterState) -> None:
        start, shown = self._recipe.start, adapter.fingerprint[:12]
        if start is not None:
            # Cut to the exact shapes of this site's own rank it cannot be told from another.
            cut = self.manifest.fingerprint != self.locked.manifest.fingerprint and self.manifest.fits(adapter)
            if adapter.fingerprint != start and not cut:
                raise _refused(
                    f"round {self._recipe.first_round} is to start from adapter {start[:12]} and came with {shown}"
                )
            return
        first = self.first()
        if first is None or not self.manifest.fits(adapter):
            raise errors.PolicyRefused(SHAPES, "the first adapter does not fit this site's model")
        if adapter.fingerprint != first.fingerprint and not _alike(adapter, first):
            raise _refused(
                f"round 1 is to start from adapter {first.fingerprint[:12]}, which the recipe's seed makes here, and "
                f"came with {shown}"
            )

    def _require_new(self, number: int, adapter: state.AdapterState) -> None:
        """Two sums from one base differ by the update of a site that is in one of them alone."""
        before = self.taken.bases.get(adapter.fingerprint, number)
        if before != number:
            raise errors.PolicyRefused(
                SAME, f"round {number} comes with the adapter that round {before} was trained from: two sums of it"
            )

    # -- the later ones --------------------------------------------------------------------------------------------

    def _took(self, number: int, adapter: state.AdapterState, kind: str) -> bool:
        """Whether it was taken before as the adapter of this round.

        Raises:
            PolicyRefused: if it is to be scored in place of the one that was.
        """
        known = self.taken.names.get(number, {})
        if adapter.fingerprint in known:
            return True
        if known and kind == protocol.EVALUATE:
            raise _refused(f"adapter {adapter.fingerprint[:12]} is not the one of round {number} that came here before")
        return False

    def _before(self, number: int) -> tuple[int, state.AdapterState | None]:
        """The latest adapter before a round that is at hand, and its round; None where it is not even the first."""
        for earlier, names in sorted(self.taken.names.items(), key=lambda row: row[0], reverse=True):
            for name in reversed(names) if earlier < number else ():
                adapter = self.held.find(name)
                if adapter is not None and self.manifest.fits(adapter):
                    return earlier, adapter
        return 0, self.first()

    def _require_near(self, number: int, adapter: state.AdapterState, max_step: float) -> None:
        if not adapter.finite():
            raise _refused(f"the adapter of round {number} holds NaN or infinity")
        earlier, before = self._before(number)
        if before is None:
            raise _refused(f"the adapter of round {number} cannot be held to an earlier one: none is at hand here")
        self._require_still(earlier, number, before, adapter)
        bound = (number - earlier) * self._bound(max_step)
        with np.errstate(over="ignore", invalid="ignore"):
            step = self.moved(before, adapter)
        if not step <= bound:
            raise _refused(
                f"the adapter of round {number} is {step:.4g} away from that of round {earlier}; what sites may send "
                f"comes to {bound:.4g} at most. If it is honest work, raise policy.max_step = {max_step:g}"
            )
        self._require_balanced(earlier, number, before, adapter)

    def _bound(self, max_step: float) -> float:
        settings, largest = self._recipe.aggregation, self.taken.largest
        anew = rules.refactors(rules.make(settings))
        most = np.inf if anew and largest is not None else self._recipe.admission.max_update_norm
        noised = {privacy.SITE_LEVEL, *privacy.SHARED}  # a mean with noise moves farther than what this site sent
        if largest is not None and self._recipe.privacy.mechanism not in noised:
            most = min(most, max_step * largest)
        rate = SLACK * settings.server_learning_rate
        if settings.server_optimiser == "momentum":
            return float(rate / (1.0 - settings.server_momentum) * most)
        # Each number moves by its moment over the root of its square, and the floor: of small updates less.
        farthest = np.sqrt(self.manifest.parameters / (1.0 - settings.server_beta2))
        return float(rate * min(most / settings.server_floor, farthest))

    def _require_still(
        self, earlier: int, number: int, before: state.AdapterState, adapter: state.AdapterState
    ) -> None:
        """What trains in none of the rounds between stays as it was, to the bit."""
        moving: set[str] = set()
        for between in range(earlier + 1, min(number, earlier + 2) + 1):  # two rounds show all that ever leaves
            moving |= set(groups.moving(self.manifest, self._recipe, between))
        for name in set(adapter) - moving:
            if not np.array_equal(adapter[name], before[name]):
                raise _refused(f"the adapter of round {number} differs in '{name}', which no site sends")

    def _require_balanced(
        self, earlier: int, number: int, before: state.AdapterState, adapter: state.AdapterState
    ) -> None:
        """A rule that makes factors anew leaves both of a pair of one length, so that none blows up a gradient.

        Those that a rule averages beside a residual are of any length, and move no farther than an update may.
        """
        rule = rules.make(self._recipe.aggregation)
        if not rules.refactors(rule):
            return
        averaged = rules.averages_factors(rule)
        if averaged:
            names = [spec.name for spec in self.manifest if spec.group != factors.RESIDUAL]
            bound = (number - earlier) * SLACK * self._recipe.admission.max_update_norm
            with np.errstate(over="ignore", invalid="ignore"):
                step = (adapter.select(names) - before.select(names)).norm()
            if not step <= bound:
                raise _refused(
                    f"the factors of round {number} are {step:.4g} away from those of round {earlier}; what sites may "
                    f"send comes to {bound:.4g} at most"
                )
        whole = factors.whole(adapter, self.manifest)
        for a, b in self.manifest.pairs().values():
            down, up = factors.residual_names(a.pair)
            wide, tall = (adapter[down], adapter[up]) if averaged else (whole[a.name], whole[b.name])
            rows, columns = np.linalg.norm(wide, axis=1), np.linalg.norm(tall, axis=0)
            short, long = np.minimum(rows, columns), np.maximum(rows, columns)
            if (long > _LONGEST * np.maximum(short, 1.0)).any():
                raise _refused(f"the adapter of round {number}: the factors of '{a.pair}' differ in length")


def _alike(one: state.AdapterState, other: state.AdapterState) -> bool:
    return all(np.allclose(one[name], other[name], ALIKE, NOTHING) for name in other)


def _refused(detail: str) -> errors.PolicyRefused:
    return errors.PolicyRefused(REASON, detail)
