"""A coordinator that went back is found at the site: at site level it would draw the noise of a round a second time.

The noise is added at the coordinator, once a round, and its journal counts it once. A folder that was restored from an
older copy knows nothing of the draws since; two draws have a mean with less noise than the journal states. The sites
know: they were sent what came of each draw, and noted the length of the coordinator's audit log with every message.

A log that is shorter than it was is refused, but may only be a message that was overtaken: the next one is judged
anew, and by then a restored log may have grown over all that was noted. So there is proof, too: what no order of
arrival explains. It is read from the site's own log of this recipe alone, so it holds for good, over restarts, and
never against a recipe that began after the restoring:

- two heads of the log at one length: it was written twice from there;
- two runs (each start of a coordinator is a run, one ends before the next begins) of which one lies, by the lengths of
  the log, between two messages of the other, or reaches into it;
- a round that was asked for when the log was longer than as its result was sent (a later round, or scores).

What was not sent to this site proves nothing to it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedvfm import errors
from fedvfm.config import privacy
from fedvfm.protocol import protocol

_TRAIN, _EVALUATE = protocol.WORDS[protocol.TRAIN], protocol.WORDS[protocol.EVALUATE]
_SAME = ("recipe", "round", "fingerprint", "kind")
"""Messages that agree in these are one, sent again."""


class _Row(NamedTuple):
    """A message of a coordinator: the length and head of its log, and what makes it another message than others."""

    length: int
    head: str | None
    message: tuple[Any, ...]


class _Longest:
    """Of row coordinator's messages those that showed the longest log, and as many as leaving one message out needs."""

    def __init__(self) -> None:
        self._rows: set[_Row] = set()

    def add(self, new: _Row) -> None:
        self._rows.add(new)
        top = max(row.length for row in self._rows)
        names = {row.message for row in self._rows if row.length == top}
        rest = [row.length for row in self._rows if row.message not in names] if len(names) == 1 else []
        least = max(rest, default=top)
        self._rows = {
            row for row in self._rows if row.length == top or (row.length == least and row.message not in names)
        }

    def without(self, message: tuple[Any, ...]) -> tuple[int, set[str]]:
        """The longest log that other messages than this one showed, and its heads."""
        others = [row for row in self._rows if row.message != message]
        most = max((row.length for row in others), default=0)
        return most, {row.head for row in others if row.length == most and row.head is not None}


class _Steps:
    """Pairs of numbers of which both only grow: of a pair that another one makes needless nothing is kept."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.values: list[int] = []

    def add(self, key: int, value: int) -> None:
        at = bisect_right(self.keys, key)
        if at and self.values[at - 1] >= value:
            return
        end = bisect_right(self.values, value)
        begin = bisect_left(self.keys, key)
        self.keys[begin:end], self.values[begin:end] = [key], [value]

    def before(self, key: int) -> tuple[int, int]:
        """The last pair whose key is less; (0, 0) where there is none."""
        at = bisect_left(self.keys, key)
        return (self.keys[at - 1], self.values[at - 1]) if at else (0, 0)


class _Marks:
    """The messages of one coordinator for one recipe, and the first proof they gave that no growing log sent them."""

    def __init__(self) -> None:
        self.proof = ""
        self._heads: dict[int, str] = {}
        self._drawn = _Steps()  # length of the log -> the last round that was drawn by then
        self._asked = _Steps()  # round that was asked for -> the longest log by which it was
        self._runs: dict[Any, tuple[int, int]] = {}

    def add(self, entry: Mapping[str, Any]) -> None:
        length, drawn = int(entry["peer_length"]), _drawn(entry)
        asked = int(entry.get("round", 0)) if entry["kind"] == _TRAIN else 0
        if drawn > 0:
            self._drawn.add(length, drawn)
        if asked > 0:
            self._asked.add(asked, length)
        proof = self._two_heads(length, str(entry["peer_head"])) or self._asked_again(length, asked, drawn)
        self.proof = self.proof or proof or self._overlap(entry.get("run"), length)

    def _two_heads(self, length: int, head: str) -> str:
        same = self._heads.setdefault(length, head) == head
        return "" if same else f"entry {length} of its audit log is another one than it was"

    def _asked_again(self, length: int, asked: int, drawn: int) -> str:
        """Whether this message, or one that came before it, asks for a round that was drawn by a shorter log."""
        at, latest = self._drawn.before(length)
        if 0 < asked <= latest:
            return f"it asked for round {asked} at entry {length} of its log, and had drawn it by {at}"
        number, longest = self._asked.before(drawn + 1)
        if number and longest > length:
            return f"it asked for round {number} at entry {longest} of its log, and had drawn it by {length}"
        return ""

    def _overlap(self, run: Any, length: int) -> str:
        """Two runs of which one began before the other ended."""
        if run is None:
            return ""
        least, most = self._runs.get(run, (length, length))
        self._runs[run] = (min(least, length), max(most, length))
        for first, second in itertools.pairwise(sorted(self._runs.values())):
            if second[0] < first[1]:
                return (
                    f"it was started anew with {second[0]} entries in its audit log or less, and had {first[1]} before"
                )
        return ""


class Coordinators:
    """What a site's audit log says of coordinators: kept message by message, as they come."""

    def __init__(self) -> None:
        self._longest: dict[Any, _Longest] = {}
        self._marks: dict[tuple[Any, str], _Marks] = {}
        self._last_drawn: dict[str, int] = {}

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take an entry of the log that notes a message."""
        recipe, peer = str(entry.get("recipe", "")), entry.get("peer")
        self._last_drawn[recipe] = max(self._last_drawn.get(recipe, 0), _drawn(entry))
        if entry.get("peer_length"):
            row = _Row(int(entry["peer_length"]), entry.get("peer_head"), tuple(map(entry.get, _SAME)))
            self._longest.setdefault(peer, _Longest()).add(row)
        if "peer_head" in entry:
            self._marks.setdefault((peer, recipe), _Marks()).add(entry)

    def drawn(self, recipe: str) -> int:
        """The last round of a recipe whose private mean was sent here."""
        return self._last_drawn.get(recipe, 0)

    def proof(self, peer: Any, recipe: str) -> str:
        """Why the messages of a recipe show that their coordinator went back; "" where they do not."""
        return self._marks[peer, recipe].proof if (peer, recipe) in self._marks else ""

    def longest(self, peer: Any, message: tuple[Any, ...]) -> tuple[int, set[str]]:
        """The longest log that a coordinator showed with other messages than this one, and its heads."""
        return self._longest[peer].without(message) if peer in self._longest else (0, set())


def require_onward(kind: str, task: protocol.Task, came: Mapping[str, Any], noted: Coordinators) -> None:
    """Check that a round of site level was not drawn before, as far as this site can tell.

    Args:
        kind: of the message; only an update can be drawn into a mean once more.
        task: what is asked.
        came: what the log notes of the message, its coordinator's mark among it.
        noted: what the site's own audit log says of its coordinators; the message is noted there already.

    Raises:
        LedgerError: if it is proved that the coordinator was put back since this recipe began, if it asks for a round
            whose result came here, or if its log is shorter than it was.
    """
    if task.recipe.privacy.mechanism != privacy.SITE_LEVEL or kind != protocol.TRAIN or task.state is None:
        return
    peer, recipe = came.get("peer"), task.recipe.hash
    proof, drawn = noted.proof(peer, recipe), noted.drawn(recipe)
    if proof:
        raise _over(task, proof)
    if task.round <= drawn:
        raise _not_now(task, f"it asks for a round whose result was sent here before, up to round {drawn}")
    # The same message twice may come in either order; it is still one round, and nothing of it was sent here.
    most, heads = noted.longest(peer, (recipe, task.round, task.state.fingerprint, _TRAIN))
    length = int(came.get("peer_length", 0))
    if length < most:
        raise _not_now(task, f"its audit log has {length} entries, and had {most} by this site's own log")
    if length == most and heads - {came.get("peer_head")}:
        raise _not_now(task, f"entry {length} of its audit log is another one than it was")


def _drawn(entry: Mapping[str, Any]) -> int:
    """The last round whose private mean a message that came shows to be drawn: it carries what came of it."""
    number = int(entry.get("round", 0))
    return {_TRAIN: number - 1, _EVALUATE: number}.get(str(entry["kind"]), 0)


_BACK = "restored from an older copy, it would draw noise for one round twice, and epsilon would be more than is stated"


def _over(task: protocol.Task, why: str) -> errors.LedgerError:
    return errors.LedgerError(
        f"round {task.round}: the coordinator went back: {why}. It was {_BACK}. This recipe is over here: ask "
        "its people for another recipe, or for another federation if that is refused too"
    )


def _not_now(task: protocol.Task, why: str) -> errors.LedgerError:
    return errors.LedgerError(
        f"round {task.round}: the coordinator went back, or a later message overtook this one: {why}. If it was "
        f"{_BACK}. If this is said again, ask its people, and for another recipe where it was"
    )
