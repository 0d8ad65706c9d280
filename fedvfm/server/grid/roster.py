"""Who is there: nodes on the roster by their keys, waited for visibly and never for ever.

What a node calls itself counts for nothing: its site is the one whose key the roster has. What goes to a site is in the
audit log before it goes, with the log's mark upon it; what comes is noted with the mark of the site's own log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.flower import internals
from fedvfm.protocol import envelope, protocol
from fedvfm.server.grid import retrying
from fedvfm.storage import hash_chain
from fedvfm.trust import roster as rosters

LOG = logging.getLogger(__name__)
UNKNOWN = "unknown"
_BACK = protocol.LEDGER_WENT_BACK


class RosterGrid(retrying.SteadyGrid):
    """A grid on which only sites of the roster are, each under the name its key was approved for.

    Args:
        grid: Flower's.
        roster: the roster as it is now, by site.
        check: as :class:`fedvfm.server.grid.retrying.SteadyGrid`.
        log: the coordinator's audit log; None notes nothing and marks nothing.
        recipe: hash of the recipe that runs.
    """

    def __init__(
        self,
        grid: Grid,
        roster: Callable[[], Mapping[str, rosters.Entry]],
        check: Callable[[], None],
        log: audit.Audit | None = None,
        recipe: str = "",
    ) -> None:
        super().__init__(grid, check)
        self._roster, self._log, self._recipe = roster, log, recipe
        self._names: dict[int, str] = {}
        self._ledgers: dict[str, int] = {}
        self._noted: dict[str, hash_chain.Mark] = {}
        self._holders: dict[str, str] = {}
        self._known: dict[str, int] = {}
        self._back: set[str] = set()
        for one in log.scan() if log is not None else ():
            if one["event"] == "received" and one.get("recipe") == recipe:
                self._note(one)
            if one["event"] == "enrolled":  # its new folder begins a log of its own
                self._noted.pop(str(one["site"]), None)
            if one["event"] == "received" and one.get("recipe") == recipe and "ledger" in one:
                self._longer(str(one["peer"]), hash_chain.Mark.parse(one["ledger"]).length)
            if one["event"] == "decided" and one.get("recipe") == recipe and one.get("reason") == _BACK:
                self._back.add(str(one["peer"]))

    def present(self) -> dict[str, int]:
        """Site -> node of the approved sites that are online."""
        approved = {name: entry for name, entry in self._roster().items() if entry.status == rosters.APPROVED}
        self._forget_old_logs(approved)
        by_key = {entry.public_key: name for name, entry in approved.items()}
        here = {by_key[node.public_key]: node.id for node in self.nodes() if node.online and node.public_key in by_key}
        self._names |= {node: name for name, node in here.items()}
        return here

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of :meth:`present`."""
        self._check()
        return sorted(self.present().values())

    def name(self, node: int) -> str:
        """The site of a node, for the log."""
        return self._names.get(node, f"node {node}")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that came; a greeting under another name is nobody's."""
        ids = list(message_ids)
        kinds = {key: self._asked[key].message.metadata.message_type for key in ids if key in self._asked}
        found = super().pull_messages(ids)
        return [self._bound(reply, kinds.get(reply.metadata.reply_to_message_id, "")) for reply in found]

    def _push(self, messages: list[Message]) -> list[str]:
        """Note what goes to whom, put the mark of the log that says so upon it, and push."""
        if self._log is not None:
            for message in messages:
                site = self.name(message.metadata.dst_node_id)
                # As long as the one it will carry.
                protocol.put_mark(message, hash_chain.NOWHERE, noted=self._noted.get(site))
                self._log.record("sent", peer=site, **self._about(message, message.metadata))
            mark = self._log.mark
            for message in messages:
                site = self.name(message.metadata.dst_node_id)
                protocol.put_mark(message, mark, noted=self._noted.get(site))
        ids = super()._push(messages)
        waiting = {one for asked in self._asked.values() for one in asked.ids}
        self._known = {one: length for one, length in self._known.items() if one in waiting}
        for one, message in zip(ids, messages, strict=True):
            self._known[one] = self._ledgers.get(self.name(message.metadata.dst_node_id), 0)
        return ids

    def _pull(self, message_ids: list[str]) -> list[Message]:
        """Note what came from whom, whatever becomes of it, and which mark its sender's log had."""
        found = super()._pull(message_ids)
        asked = {one: asked.message for asked in self._asked.values() for one in asked.ids}
        for at, reply in enumerate(found):
            site, message = self._names.get(reply.metadata.src_node_id), asked.get(reply.metadata.reply_to_message_id)
            if self._log is not None and site is not None and message is not None and not self._lost(reply):
                said, update = _said(reply, message.metadata.message_type)
                self._note(self._log.record("received", peer=site, **self._about(reply, message.metadata), **said))
                if update or message.metadata.message_type == protocol.HANDSHAKE:
                    found[at] = self._onward(site, reply, message)
        return found

    def _onward(self, site: str, reply: Message, asked: Message) -> Message:
        """The reply to a greeting, or an update; in its place a word where its site's ledger is shorter than it was.

        Shorter than noted before it was asked: answers may overtake each other. A site whose ledger went back trains no
        more in this recipe: its updates would be charged there and thrown away here, round after round.
        """
        before, length = self._known.get(reply.metadata.reply_to_message_id, 0), _ledger(reply)
        if asked.metadata.message_type == protocol.TRAIN:
            length = length or 0  # an update that says nothing after one that did is no way round it
            self._longer(site, length)
        if site not in self._back and length is not None and length < before:
            self._leave_out(site, length, before)
        if site not in self._back:
            return reply
        word = protocol.in_place_of_answer(_BACK, asked)
        internals.set_reply_to(word, reply.metadata.reply_to_message_id)
        return word

    def _leave_out(self, site: str, length: int, before: int) -> None:
        about = {"kind": "ledger", "verdict": "refused", "reason": _BACK, "recipe": self._recipe}
        if self._log is not None:
            self._log.record("decided", peer=site, **about)
        self._back.add(site)
        LOG.error(
            f"site '{site}' takes no part in this recipe any more: its privacy ledger has {length} entries and had "
            f"{before}: it was cut or put back. Its people run 'fedvfm ledger verify' and 'fedvfm ledger reconcile'; "
            "it takes part again in another recipe"
        )

    def _note(self, entry: Mapping[str, Any]) -> None:
        """Keep the longest mark of a site's own log: it is shown to the site, which knows by it if it went back.

        Not of refusals: a site that went back refuses, and its log grows over what it was.
        """
        site, length = str(entry["peer"]), int(entry.get("peer_length", 0)) * (entry["kind"] != "refusal")
        if length > self._noted.get(site, hash_chain.NOWHERE).length:
            self._noted[site] = hash_chain.Mark(length, str(entry["peer_head"]))

    def _forget_old_logs(self, approved: Mapping[str, rosters.Entry]) -> None:
        """A site that joined anew has another log; one that took a new key in its old folder has the same."""
        for site, entry in approved.items():
            if self._holders.setdefault(site, entry.public_key) == entry.public_key:
                continue
            for one in self._log.scan() if self._log is not None else ():
                if one["event"] in audit.KEY_EVENTS and one["site"] == site and one["key"] == entry.key_fingerprint:
                    self._holders[site] = entry.public_key  # else it is not noted yet, and looked for again
                    if one["event"] == "enrolled":
                        self._noted.pop(site, None)

    def _longer(self, site: str, length: int) -> None:
        self._ledgers[site] = max(length, self._ledgers.get(site, 0))

    def _about(self, message: Message, asked: Any) -> dict[str, Any]:
        """What the log says of a message, by the metadata it was asked with: nothing here is the other end's word."""
        surveyed = asked.message_type == protocol.SURVEY  # of no recipe; its hash groups them
        about = {"fingerprint": asked.group_id} if surveyed else {"recipe": self._recipe}
        found: dict[str, Any] = {**about, "bytes": envelope.size(message)}
        if asked.group_id.isdigit():
            found["round"] = int(asked.group_id)
        if message.has_error():
            return {**found, "kind": "refusal", "reason": protocol.error_word(message)}
        return {
            **found,
            "kind": protocol.WORDS.get(asked.message_type, UNKNOWN),
            "digest": envelope.of(message).digest,
        }

    def _bound(self, reply: Message, kind: str) -> Message:
        # What was asked decides, not what the reply says it is: else a greeting under another name could pass as
        # something else here and be taken for a greeting later.
        if reply.has_error() or kind != protocol.HANDSHAKE:
            return reply
        site = self._names.get(reply.metadata.src_node_id)
        try:
            hello = protocol.decode_hello(reply.content)
        except errors.ProtocolError:
            return reply
        if hello.site == site:
            return reply
        LOG.warning(f"the node of site '{site}' calls itself by another name; it is left out")
        reply.content = protocol.encode_hello(_nobody(hello))
        return reply


def _said(reply: Message, kind: str) -> tuple[dict[str, Any], bool]:
    """What a reply says that the log may hold: its sender's marks, and the fingerprint of an update.

    Returns: that, and whether the reply is an update, whole or a difference.
    """
    update = kind == protocol.TRAIN and not reply.has_error()
    try:
        mark = protocol.find_mark(reply)
        found: dict[str, Any] = {} if mark is None else {"peer_length": mark.length, "peer_head": mark.head}
        if update:
            spent = protocol.find_ledger(reply)
            found |= {} if spent is None else {"ledger": str(spent)}
            if (
                not protocol.is_masked(reply.content) and not envelope.of(reply).coded
            ):  # a difference is named by its digest alone
                found["fingerprint"] = envelope.of(reply).update.state.fingerprint
    except errors.ProtocolError:  # whoever takes the reply says what is wrong with it
        return {}, False
    return found, update


def _ledger(reply: Message) -> int | None:
    """Length of the privacy ledger of a reply's sender as it says; None where it says nothing that can be read."""
    try:
        mark = protocol.find_ledger(reply)
    except errors.ProtocolError:  # whoever takes the reply says what is wrong with it
        return None
    return None if mark is None else mark.length


def _nobody(hello: protocol.Hello) -> protocol.Hello:
    """The greeting of a site that nobody wants."""
    return protocol.Hello("", hello.backbone_sha256, hello.manifest_fingerprint, hello.rank, {})
