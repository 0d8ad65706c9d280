"""Who is there: nodes on the roster by their keys, waited for visibly and never for ever.

What a node calls itself counts for nothing: its site is the one whose key the roster has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from fedvfm import errors, protocol
from fedvfm.server import reach
from fedvfm.trust import roster as rosters

AGAIN_S = 5.0
"""How often a site that waits for a person's approval is asked again."""


class RosterGrid(reach.SteadyGrid):
    """A grid on which only sites of the roster are, each under the name its key was approved for.

    Args:
        grid: Flower's.
        roster: the roster as it is now, by site.
        check, note: as :class:`fedvfm.server.reach.SteadyGrid`.
        record: told "sent" or "received", the site and the message, for the audit log.
    """

    def __init__(
        self,
        grid: Grid,
        roster: Callable[[], Mapping[str, rosters.Entry]],
        check: Callable[[], None],
        note: Callable[[str], None],
        record: Callable[[str, str, Message], None] = lambda event, site, message: None,
    ) -> None:
        super().__init__(grid, check, note)
        self._roster, self._record = roster, record
        self._names: dict[int, str] = {}
        self.greeted: set[str] = set()

    def present(self) -> dict[str, int]:
        """Site -> node of the approved sites that are online."""
        by_key = {entry.public_key: name for name, entry in self._roster().items() if entry.status == rosters.APPROVED}
        found = {by_key[node.public_key]: node.id for node in self.nodes() if node.online and node.public_key in by_key}
        self._names |= {node: name for name, node in found.items()}
        return found

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of :meth:`present`."""
        self._check()
        return sorted(self.present().values())

    def name(self, node: int) -> str:
        """The site of a node, for notes."""
        return self._names.get(node, f"node {node}")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push, and record what was sent to whom."""
        kept = list(messages)
        ids = super().push_messages(kept)
        for message in kept:
            self._record("sent", self.name(message.metadata.dst_node_id), message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that came; a greeting under another name is a refusal, a pending approval is waited for."""
        found = []
        for reply in super().pull_messages(message_ids):
            if reply.metadata.src_node_id in self._names:
                self._record("received", self._names[reply.metadata.src_node_id], reply)
            found.append(self._bound(reply))
        return found

    def _wait_for(self, reply: Message, asked: reach.Asked) -> bool:
        """Whether the reply says that a person has not approved yet, and there is time left to ask again."""
        waits = reply.has_error() and protocol.error_word(reply) == "approval-pending"
        if waits and asked.deadline > time.monotonic() + AGAIN_S:
            site = self.name(asked.message.metadata.dst_node_id)
            left = asked.deadline - time.monotonic()
            self._note(f"site '{site}' waits for a person's approval of the recipe; asked again for {left:.0f} s more")
            asked.rest_until = time.monotonic() + AGAIN_S
            return True
        return False

    def _bound(self, reply: Message) -> Message:
        if reply.has_error() or reply.metadata.message_type != protocol.HANDSHAKE:
            return reply
        site = self._names.get(reply.metadata.src_node_id)
        try:
            hello = protocol.decode_hello(reply.content)
        except errors.ProtocolError:
            return reply
        if hello.site == site:
            self.greeted.add(hello.site)
            return reply
        self._note(f"the node of site '{site}' calls itself by another name; it is left out")
        reply.content = protocol.encode_hello(_nobody(hello))
        return reply


def _nobody(hello: protocol.Hello) -> protocol.Hello:
    """The greeting of a site that nobody wants."""
    return protocol.Hello("", hello.backbone_sha256, hello.manifest_fingerprint, hello.rank, {})
