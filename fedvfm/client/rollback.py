"""A coordinator that went back is found at the site: at site level it would draw the noise of a round a second time.

The noise is added at the coordinator, once a round, and its journal counts it once. A folder that was restored from an
older copy knows nothing of the draws since; two draws have a mean with less noise than the journal states. The sites
know: they were sent what came of each draw, and noted the length of the coordinator's audit log with every message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedvfm import errors, privacy_config, protocol

_TRAIN, _EVALUATE = protocol.WORDS[protocol.TRAIN], protocol.WORDS[protocol.EVALUATE]
Entries = Sequence[Mapping[str, Any]]


def require_onward(kind: str, task: protocol.Task, came: Mapping[str, Any], entries: Entries) -> None:
    """Check that a round of site level was not drawn before, as far as this site can tell.

    Args:
        kind: of the message; only an update can be drawn into a mean once more.
        task: what is asked.
        came: what the log notes of the message, its coordinator's mark among it.
        entries: of the site's own audit log.

    Raises:
        LedgerError: if the coordinator asks for a round whose result came here, or its log is shorter than it was.
    """
    if task.recipe.privacy.mechanism != privacy_config.SITE_LEVEL or kind != protocol.TRAIN or task.state is None:
        return
    listed = [one for one in entries if one["event"] == "received"]
    drawn = max((_drawn(one) for one in listed if one.get("recipe") == task.recipe.hash), default=0)
    if task.round <= drawn:
        raise _refused(task, f"it asks for a round whose result was sent here before, up to round {drawn}")
    # The same message twice may come in either order; it is still one round, and nothing of it was sent here.
    same = {"recipe": task.recipe.hash, "round": task.round, "fingerprint": task.state.fingerprint, "kind": _TRAIN}
    others = [one for one in listed if not same.items() <= one.items() and one.get("peer") == came.get("peer")]
    length = int(came.get("peer_length", 0))
    most = max((int(one.get("peer_length", 0)) for one in others), default=0)
    if length < most:
        raise _refused(task, f"its audit log has {length} entries, and had {most} by this site's own log")
    heads = {one["peer_head"] for one in others if one.get("peer_length") == length and "peer_head" in one}
    if heads - {came.get("peer_head")}:
        raise _refused(task, f"entry {length} of its audit log is another one than it was")


def _drawn(entry: Mapping[str, Any]) -> int:
    """The last round whose private mean a message that came shows to be drawn: it carries what came of it."""
    number = int(entry.get("round", 0))
    return {_TRAIN: number - 1, _EVALUATE: number}.get(str(entry["kind"]), 0)


def _refused(task: protocol.Task, why: str) -> errors.LedgerError:
    return errors.LedgerError(
        f"round {task.round}: the coordinator went back: {why}. It was restored from an older copy, would draw noise "
        "for one round twice, and epsilon would be more than its journal states. This recipe is over here: ask its "
        "people for another recipe, or for another federation if that is refused too"
    )
