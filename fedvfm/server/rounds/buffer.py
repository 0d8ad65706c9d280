"""Buffered asynchronous rounds: a round ends with the first updates, and what slow sites send later still counts.

A round asks every site that is not training. It ends when ``buffer_size`` updates are there; sites that are still
training are *out*: they are asked for nothing, and what they send is folded into the round that is open when it comes.
Such an update is the difference to the adapter that its site was sent, and counts less the staler it is:

    adapter <- adapter + sum_i w_i s(t_i) (sent_i - start_i) / sum_i w_i,    s(t) = (1 + t)^-staleness_power

with w_i the recipe's weights and t_i the rounds between asking and folding. Where all t_i are 0 that is the mean, bit
for bit. A site is in a round once at most, so a round is of as many sites as updates. The last round waits for all.

Who is out stands in the journal's lines; the adapters they were sent are checkpoints, at most ``staleness_limit`` of
them. So a coordinator that was killed asks for the same rounds again, and a site that has answered sends what it sent.

In a simulation time is counted: a site's answer comes ``site_times`` after it was asked, and answers are taken in the
order of that time, those asked for longest first where they come together.

Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, alg. 1 (FedBuff), with
    examples as weights and one update of a site in a round.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedvfm.aggregators import base
from fedvfm.config import asynchronous, schema
from fedvfm.server.rounds import aggregation, cohort, handshake, messaging
from fedvfm.state import state

OUT, STALENESS, CLOCK = "out", "staleness", "clock"
"""Keys of a journal's line: who is still training, and since which round; how late an update came; counted time."""
TOO_STALE = "too-stale"
PAUSE_S = 60.0
"""A site in place of whose answer came that it is away is asked again no sooner, while others can fill a round."""
Bases = Callable[[int], state.AdapterState]
"""The adapter that a round began with."""


@dataclass(frozen=True)
class Version:
    """What a site is training.

    Attributes:
        round: that it was asked for.
        due: when its answer comes, by the counted clock; 0 where no clock is counted.
    """

    round: int
    due: float = 0.0


class Buffer:
    """Who is out between rounds, and when a round has enough.

    Args:
        settings: the recipe's.
        times: site -> how long it trains, by the counted clock (others: 1); None looks at no clock.
        line: the last one of the journal; None before the first.
        first_round: of the recipe.
    """

    def __init__(
        self,
        settings: asynchronous.Asynchronous,
        times: Mapping[str, float] | None,
        line: Mapping[str, Any] | None = None,
        first_round: int = 1,
    ) -> None:
        self.settings, self._times = settings, times
        self.clock = float(line.get(CLOCK, 0.0)) if line is not None else 0.0
        standing = line.get(OUT, {}) if line is not None else {}
        self.out = {
            site: Version(int(row["round"]), float(row.get("due", 0.0)))
            for site, row in standing.items()
            if int(row["round"]) >= first_round  # of the recipe that this one goes on from nothing is waited for
        }
        self.messages = messaging.Standing()
        self._asked_again: dict[str, float] = {}
        self._adapters: dict[int, state.AdapterState] = {}

    def give_up(self, number: int) -> dict[str, dict[str, str]]:
        """Before a round: sites whose updates would be too stale, each with why; they are out no longer."""
        limit = self.settings.staleness_limit
        late = {site: row.round for site, row in sorted(self.out.items()) if number - row.round > limit}
        for site in late:
            del self.out[site]
        return {
            site: {
                "reason": TOO_STALE,
                "detail": f"trains since round {since}; an update may be {limit} rounds late (staleness_limit)",
            }
            for site, since in late.items()
        }

    def ask(self, number: int, sites: Iterable[str]) -> None:
        """These are asked in a round, and out until they answer."""
        self.out |= {site: Version(number, self.clock + self._time(site)) for site in sites}

    def back(self, sites: Iterable[str]) -> None:
        """These answered, or are waited for no longer."""
        for site in sites:
            self.out.pop(site, None)

    def was_away(self, site: str, now: float) -> None:
        """Its answer was that it is away; ``now`` by any clock that goes on."""
        self._asked_again[site] = now + PAUSE_S

    def resting(self, sites: Collection[str], number: int, enough: int, now: float) -> set[str]:
        """Of sites that a round waits for those that are not asked in it, since they were away a moment ago.

        None where fewer than ``enough`` of the others begin in this round: those that still train an earlier one may
        take hours, and so long would a site rest that is back by now.
        """
        rest = {site for site in sites if now < self._asked_again.get(site, -math.inf)}
        quick = sum(self.out[site].round == number for site in sites if site not in rest)
        return rest if quick >= enough else set()

    def _time(self, site: str) -> float:
        return 0.0 if self._times is None else float(self._times.get(site, 1.0))

    def enough(self, sites: int, *, last: bool) -> int:
        """So many updates end a round with so many sites that may answer."""
        return sites if last else min(self.settings.buffer_size, sites)

    def quorum(self, sites: int, server: schema.ServerConfig) -> int:
        """So many updates a round needs to go on."""
        return cohort.quorum(min(self.settings.buffer_size, sites), server)

    def turns(self, names: Mapping[int, str]) -> Callable[[Collection[int]], Collection[int]] | None:
        """Of nodes that were asked the one whose answer comes next by the counted clock, which goes on to then."""
        if self._times is None:
            return None

        def next_of(nodes: Collection[int]) -> Collection[int]:
            def order(node: int) -> tuple[float, int, str]:
                row = self.out[names[node]]
                return row.due, row.round, names[node]

            first = min((node for node in nodes if node in names), key=order)
            self.clock = max(self.clock, self.out[names[first]].due)
            return (first,)

        return next_of

    def adapter(self, number: int, read: Bases) -> state.AdapterState:
        """What a round began with; read once, and held while a site is out with it."""
        if number not in self._adapters:
            self._adapters[number] = read(number)
        return self._adapters[number]

    def bases(self) -> set[int]:
        """The rounds after which the adapters were made that sites are out with; 0 for the initial one."""
        rounds = {row.round for row in self.out.values()}
        self._adapters = {number: adapter for number, adapter in self._adapters.items() if number in rounds}
        return {number - 1 for number in rounds}

    def record(self) -> dict[str, Any]:
        """What a line of the journal states: who is out, and the counted time."""
        counted = self._times is not None
        rows = {
            site: {"round": row.round, **({"due": row.due} if counted else {})}
            for site, row in sorted(self.out.items())
        }
        return {OUT: rows, **({CLOCK: self.clock} if counted else {})}


class BufferedFold(aggregation.Fold):
    """The plain intake, for updates of which some start from adapters of earlier rounds.

    Args:
        settings: the recipe's.
        number: the round that takes them.
        bases: site -> the adapter that it was sent, of each that may answer.
        rule, members, weighting, manifest, kept, start: of :class:`fedvfm.server.rounds.aggregation.Fold`.
    """

    def __init__(
        self,
        settings: asynchronous.Asynchronous,
        number: int,
        bases: Mapping[str, state.AdapterState],
        rule: base.Aggregator,
        members: Mapping[str, handshake.Member],
        weighting: str,
        manifest: state.Manifest,
        kept: Mapping[str, state.Array],
        start: state.AdapterState,
    ) -> None:
        super().__init__(rule, sorted(bases), members, weighting, manifest, kept, start)
        self._settings, self._number, self._begin, self._bases = settings, number, start, bases
        self._staleness: dict[str, int] = {}
        self._timely: dict[str, float] = {}

    def take(self, update: state.SiteUpdate) -> None:
        """See :class:`fedvfm.server.rounds.aggregation.Intake`; a late one is moved to where this round begins."""
        late = self._number - 1 - update.base_round
        self._staleness[update.site] = late
        if late:
            update = moved(update, self._bases[update.site], self._begin)
        super().take(update)

    def _weigh(self, update: state.SiteUpdate) -> float:
        whole = super()._weigh(update)
        self._timely[update.site] = whole
        return float(np.float32(whole * self._settings.discount(self._staleness[update.site])))

    def finish(self, record: Mapping[str, Any]) -> aggregation.Joined:
        """See :class:`fedvfm.server.rounds.aggregation.Intake`; what staleness takes off the weights shortens the step.

        Raises:
            EmptyCohort: if nothing was taken.
        """
        late = {site: rounds for site, rounds in sorted(self._staleness.items()) if rounds}
        joined = super().finish({**record, STALENESS: late})
        share = math.fsum(self._weights.values()) / math.fsum(self._timely.values())
        if share == 1.0:
            return joined
        return aggregation.Joined(shortened(joined.adapter, self._begin, share), joined.kept, joined.record)


def moved(update: state.SiteUpdate, sent: state.AdapterState, start: state.AdapterState) -> state.SiteUpdate:
    """The update as if its site had begun at ``start``: that, and what it changed; in float64, rounded once."""
    arrays = {
        name: np.asarray(start[name] + (np.asarray(after, np.float64) - sent[name]), np.float32)
        for name, after in update.state.items()
    }
    return dataclasses.replace(update, state=state.AdapterState(arrays))


def shortened(after: state.AdapterState, before: state.AdapterState, share: float) -> state.AdapterState:
    """This share of the step from ``before`` to ``after``; in float64, rounded once."""
    return state.AdapterState(
        {
            name: np.asarray(before[name] + share * (np.asarray(array, np.float64) - before[name]), np.float32)
            for name, array in after.items()
        }
    )
