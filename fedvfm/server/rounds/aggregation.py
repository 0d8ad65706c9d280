"""One round's admitted updates become one adapter, by the recipe's rule, folded as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fedvfm.aggregators import averaging_error, base, products, table
from fedvfm.config import unlabelled as unlabelled_config
from fedvfm.server.rounds import divergence, handshake
from fedvfm.state import factors, state


@dataclass(frozen=True)
class Joined:
    """What a round's updates came to.

    Attributes:
        adapter: the aggregate.
        kept: the rule's own state for the next round.
        record: what the journal states of it.
    """

    adapter: state.AdapterState
    kept: dict[str, state.Array]
    record: dict[str, Any] = field(default_factory=dict)


class Intake(Protocol):
    """Takes a round's admitted updates one by one, in any order."""

    @property
    def sites(self) -> Collection[str]:
        """Whose updates were taken."""
        ...

    def take(self, update: state.SiteUpdate) -> None:
        """Take an admitted update; of each site at most one."""
        ...

    def go_without(self, site: str) -> None:
        """No update of this site will come in this round."""
        ...

    def finish(self, record: Mapping[str, Any]) -> Joined:
        """The aggregate of all that was taken.

        Args:
            record: what the journal states of the round so far, ``cohort`` and ``refused`` among it.
        """
        ...


class Fold:
    """The plain intake: each update goes into the rule's accumulator, and is let go.

    Under a rule whose bits depend on the order (``any_order`` false) an update waits until those of all sites before it
    by name were folded, or will not come. It waits in memory, or on disk where it is there anyway.

    Args:
        rule: the recipe's.
        asked: the sites that were asked.
        members: the sites, with their own manifests.
        weighting: the recipe's.
        manifest: of the global adapter.
        kept: what the rule left in the round before.
        start: the global adapter that the round begins with.
        stored: reads an update that is on disk; None where none is.
        unlabelled: the recipe's: what a site without labels counts.
    """

    def __init__(
        self,
        rule: base.Aggregator,
        asked: Sequence[str],
        members: Mapping[str, handshake.Member],
        weighting: str,
        manifest: state.Manifest,
        kept: Mapping[str, state.Array],
        start: state.AdapterState | None = None,
        stored: Callable[[str], state.SiteUpdate] | None = None,
        unlabelled: unlabelled_config.UnlabelledConfig | None = None,
    ) -> None:
        self._rule, self._members, self._weighting, self._unlabelled = rule, members, weighting, unlabelled
        self._acc = rule.init(manifest, kept)
        self._error = averaging_error.AveragingError(manifest)
        self._stored, self._start = stored, start
        self._divergence = divergence.Divergence(asked, manifest, start)
        self._manifest = manifest
        self._turns = [] if getattr(rule, "any_order", False) else sorted(asked, reverse=True)
        self._waiting: dict[str, state.SiteUpdate | None] = {}
        self._absent: set[str] = set()
        self._weights: dict[str, float] = {}
        self._examples: dict[str, int] = {}
        self._train: dict[str, dict[str, float]] = {}

    @property
    def sites(self) -> Collection[str]:
        """Whose updates were taken."""
        return sorted(self._weights)

    def take(self, update: state.SiteUpdate) -> None:
        """See :class:`Intake`."""
        self._weights[update.site] = self._weigh(update)
        self._examples[update.site] = update.num_examples
        self._train[update.site] = dict(update.metrics)
        if not self._turns:
            self._fold(update)
            return
        # One whose turn it is goes in as it is; another one is let go where it can be read again.
        now = self._turns[-1] == update.site or self._stored is None
        self._waiting[update.site] = update if now else None
        self._advance()

    def _weigh(self, update: state.SiteUpdate) -> float:
        without = self._members[update.site].without_labels
        return weight(update, self._weighting, self._unlabelled, without_labels=without)

    def go_without(self, site: str) -> None:
        """See :class:`Intake`."""
        self._absent.add(site)
        self._advance()

    def finish(self, record: Mapping[str, Any]) -> Joined:
        """See :class:`Intake`.

        Raises:
            EmptyCohort: if nothing was taken.
        """
        self._absent |= set(self._turns) - set(self._waiting)
        self._advance()
        with products.blas().limit(limits=1, user_api="blas"):
            aggregate, left = self._rule.finish(self._acc)
            factor = self._error.factor()
            # Factors of different ranks have no mean; what the rule itself loses can still be told.
            lost = self._error.aggregate(aggregate) if self._error.mixed else None
            if table.keeps_residual(self._rule) and self._start is not None:
                lost = self._error.aggregate(factors.whole(aggregate, self._manifest, self._start))
            by_pair = self._error.factor_by_pair()
            unlike = self._divergence.record()
            rank = divergence.effective_rank(aggregate, self._manifest)
        total = math.fsum(self._weights.values())  # rounded once, so in any order the same
        line = {
            "examples": dict(sorted(self._examples.items())),
            "weights": {name: own / total for name, own in sorted(self._weights.items())},
            "train": dict(sorted(self._train.items())),
            "factor_error": factor,
            "aggregate_error": lost,
            **self._error.sample(),
            "factor_error_by_pair": by_pair,
            "divergence": unlike,
            "effective_rank": rank,
        }
        return Joined(aggregate, left, {**record, **line})

    def _advance(self) -> None:
        while self._turns and (self._turns[-1] in self._absent or self._turns[-1] in self._waiting):
            site = self._turns.pop()
            if site in self._waiting:
                update = self._waiting.pop(site)
                if update is None and self._stored is not None:
                    update = self._stored(site)
                if update is not None:
                    self._fold(update)

    def _fold(self, update: state.SiteUpdate) -> None:
        own = self._members[update.site].manifest
        contribution = base.Contribution(self._weights[update.site], update.state, own, self._start)
        with products.blas().limit(limits=1, user_api="blas"):
            self._acc = self._rule.fold(self._acc, contribution)
            self._error.add(contribution)
            self._divergence.add(update.site, update.state, own)


def folded(
    rule: base.Aggregator,
    contributions: list[base.Contribution],
    manifest: state.Manifest,
    kept: Mapping[str, state.Array],
) -> tuple[state.AdapterState, dict[str, state.Array]]:
    """The rule from its empty accumulator to its end."""
    acc = rule.init(manifest, kept)
    for contribution in contributions:
        acc = rule.fold(acc, contribution)
    return rule.finish(acc)


def weight(
    update: state.SiteUpdate,
    weighting: str,
    unlabelled: unlabelled_config.UnlabelledConfig | None = None,
    *,
    without_labels: bool = False,
) -> float:
    """The site's unnormalised weight, 1 or more and a float32; admission has bounded the number it rests on."""
    if weighting == "loss":
        return float(np.float32(update.metrics["loss"])) * 2**20
    if weighting == "examples":
        count = update.num_examples
        return float(unlabelled.examples(count) if without_labels and unlabelled is not None else count)
    if unlabelled is None or unlabelled.weight == 1.0:
        return 1.0
    return float(np.float32(unlabelled.weight if without_labels else 1.0)) * 2**20
