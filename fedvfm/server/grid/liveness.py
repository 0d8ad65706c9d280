"""Who left: an answer is not waited for when its site was taken off the roster or stays away.

A site that is revoked while it computes is answered for at once; whatever it still sends is not looked at.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

from flwr.app import Message

from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.server.grid import retrying
from fedvfm.server.grid import roster as presence
from fedvfm.trust import roster as rosters

LOG = logging.getLogger(__name__)
PAUSE_S = 30.0
"""How long nobody may have been asked before who is away counts from the beginning."""


class WatchfulGrid(presence.RosterGrid):
    """A grid of the sites on the roster that notices who leaves it.

    Args:
        away_s: how long the answer of a site that is not online is waited for.
        arguments: of :class:`fedvfm.server.grid.roster.RosterGrid`.
    """

    def __init__(self, *arguments: Any, away_s: float, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._away_s = away_s
        self._keys: dict[int, str] = {}
        self._seen: dict[str, float] = {}
        self._counted = float("-inf")

    def present(self) -> dict[str, int]:
        """Site -> node of the approved sites that are online."""
        found = super().present()
        roster = self._roster()
        self._keys |= {node: roster[name].public_key for name, node in found.items() if name in roster}
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answers that came; in place of those of sites that left, a word that says why."""
        ids = list(message_ids)
        return [*self._missed(ids), *super().pull_messages(ids)]

    def _missed(self, ids: list[str]) -> list[Message]:
        asked = {key: self._asked[key].message for key in ids if key in self._asked}
        roster = self._roster() if asked else {}
        away = self._away({self.name(message.metadata.dst_node_id) for message in asked.values()})
        found = []
        for key, message in asked.items():
            node = message.metadata.dst_node_id
            word = self._left(node, roster.get(self.name(node))) or ("away" if self.name(node) in away else "")
            if word:
                LOG.warning(f"the answer of site '{self.name(node)}' is not waited for: {word}")
                found.append(protocol.in_place_of_answer(word, message))
                internals.set_reply_to(found[-1], key)
                del self._asked[key]
        return found

    def _left(self, node: int, entry: rosters.Entry | None) -> str:
        """Why a node's answer counts no more; empty if it does."""
        if entry is not None and entry.public_key == self._keys.get(node):
            return {rosters.APPROVED: "", rosters.DROPPED: "dropped"}.get(entry.status, "revoked")
        return "revoked"

    def _away(self, names: set[str]) -> set[str]:
        """Of sites with an answer to give those that are not online for too long."""
        now = time.monotonic()
        if names and now > self._counted + retrying.LOOK_S:
            # Where nobody was asked for a while nobody was looked for: the time begins anew.
            begins = now > self._counted + PAUSE_S
            self._counted = now
            there = names if begins else set(self.present())
            self._seen |= dict.fromkeys(there, now)
        longest = max(self._away_s, 2 * retrying.LOOK_S)  # who was there at the last look is not away
        return {name for name in names if now > self._seen.setdefault(name, now) + longest}
