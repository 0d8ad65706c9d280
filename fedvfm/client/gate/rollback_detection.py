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
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from fedvfm import errors
from fedvfm.config import privacy
from fedvfm.protocol import protocol

_TRAIN, _EVALUATE = protocol.WORDS[protocol.TRAIN], protocol.WORDS[protocol.EVALUATE]
Entries = Sequence[Mapping[str, Any]]


def require_onward(kind: str, task: protocol.Task, came: Mapping[str, Any], entries: Entries) -> None:
    """Check that a round of site level was not drawn before, as far as this site can tell.

    Args:
        kind: of the message; only an update can be drawn into a mean once more.
        task: what is asked.
        came: what the log notes of the message, its coordinator's mark among it.
        entries: of the site's own audit log; the message is noted there already.

    Raises:
        LedgerError: if it is proved that the coordinator was put back since this recipe began, if it asks for a round
            whose result came here, or if its log is shorter than it was.
    """
    if task.recipe.privacy.mechanism != privacy.SITE_LEVEL or kind != protocol.TRAIN or task.state is None:
        return
    listed = [one for one in entries if one["event"] == "received"]
    drawn = max((_drawn(one) for one in listed if one.get("recipe") == task.recipe.hash), default=0)
    theirs = [one for one in listed if one.get("peer") == came.get("peer")]
    proof = _proof([one for one in theirs if one.get("recipe") == task.recipe.hash and "peer_head" in one])
    if proof:
        raise _over(task, proof)
    if task.round <= drawn:
        raise _not_now(task, f"it asks for a round whose result was sent here before, up to round {drawn}")
    # The same message twice may come in either order; it is still one round, and nothing of it was sent here.
    same = {"recipe": task.recipe.hash, "round": task.round, "fingerprint": task.state.fingerprint, "kind": _TRAIN}
    others = [one for one in theirs if not same.items() <= one.items()]
    length = int(came.get("peer_length", 0))
    most = max((int(one.get("peer_length", 0)) for one in others), default=0)
    if length < most:
        raise _not_now(task, f"its audit log has {length} entries, and had {most} by this site's own log")
    heads = {one["peer_head"] for one in others if one.get("peer_length") == length and "peer_head" in one}
    if heads - {came.get("peer_head")}:
        raise _not_now(task, f"entry {length} of its audit log is another one than it was")


def _drawn(entry: Mapping[str, Any]) -> int:
    """The last round whose private mean a message that came shows to be drawn: it carries what came of it."""
    number = int(entry.get("round", 0))
    return {_TRAIN: number - 1, _EVALUATE: number}.get(str(entry["kind"]), 0)


def _proof(noted: Entries) -> str:
    """What of these messages of one recipe, in whatever order they came, no log that only grows can have sent."""
    heads: dict[int, str] = {}
    for one in noted:
        if heads.setdefault(one["peer_length"], one["peer_head"]) != one["peer_head"]:
            return f"entry {one['peer_length']} of its audit log is another one than it was"
    shown = (0, 0)
    for one in sorted(noted, key=lambda one: (one["peer_length"], _drawn(one))):
        length = one["peer_length"]
        if one["kind"] == _TRAIN and 0 < one.get("round", 0) <= shown[0]:
            return f"it asked for round {one['round']} at entry {length} of its log, and had drawn it by {shown[1]}"
        shown = max(shown, (_drawn(one), length), key=lambda mark: mark[0])
    runs = _spans((one["run"], one["peer_length"]) for one in noted if "run" in one)
    for first, second in itertools.pairwise(sorted(runs.values())):
        if second[0] < first[1]:
            return f"it was started anew with {second[0]} entries in its audit log or less, and had {first[1]} before"
    return ""


def _spans(marks: Iterable[tuple[Any, int]]) -> dict[Any, tuple[int, int]]:
    """The least and the largest length of each."""
    found: dict[Hashable, tuple[int, int]] = {}
    for key, length in marks:
        least, most = found.get(key, (length, length))
        found[key] = (min(least, length), max(most, length))
    return found


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
