"""A Grid that reaches a site again: what Flower lost with a process that died is asked once more, within its deadline.

A SuperNode that was killed, restarted or whose executor died never answers the message it had. Flower reports that
late or never; a site that is asked again for what it has answered sends the same bytes, so asking twice costs nothing.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedvfm.flower import internals

LOG = logging.getLogger(__name__)
LOOK_S = 2.0
"""How often the nodes are looked at while replies are outstanding."""


@dataclass
class Asked:
    """A message on its way.

    Attributes:
        message: as it was first pushed.
        deadline: by this process's clock; the message's own time to live.
        ids: under which Flower knows it and its repetitions that may still be answered.
        since: when it was last pushed.
    """

    message: Message
    deadline: float
    ids: list[str]
    since: datetime.datetime


class SteadyGrid(Grid):
    """Another Grid, whose losses it makes good; the log has when a site is asked again.

    Args:
        grid: Flower's.
        check: called at every look for replies; raises to end the run.
    """

    def __init__(self, grid: Grid, check: Callable[[], None]) -> None:
        self._grid, self._check = grid, check
        self._asked: dict[str, Asked] = {}
        self._looked = 0.0

    @property
    def run(self) -> Any:
        """Flower's record of this run."""
        return self._grid.run

    def set_run(self, run: Any) -> None:
        """Take another record."""
        self._grid.set_run(run)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message from the server to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are online."""
        self._check()
        return self._grid.get_node_ids()

    def nodes(self) -> list[internals.Node]:
        """The nodes that are online, with their keys."""
        return internals.nodes(self._grid)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push, and remember until the reply came."""
        kept = list(messages)
        now = time.monotonic()
        self._asked = {key: asked for key, asked in self._asked.items() if asked.deadline > now}
        ids = self._push(kept)
        for message_id, message in zip(ids, kept, strict=True):
            self._asked[message_id] = Asked(message, now + message.metadata.ttl, [message_id], _now())
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that came; a loss is no reply until the deadline."""
        self._check()
        ids = list(message_ids)
        wanted = {one: key for key in ids if key in self._asked for one in self._asked[key].ids}
        found = []
        for reply in self._pull(sorted(wanted)) if wanted else ():
            key = wanted[reply.metadata.reply_to_message_id]
            asked = self._asked.get(key)
            if asked is None:
                continue
            if self._lost(reply) and time.monotonic() < asked.deadline:
                asked.ids = [one for one in asked.ids if one != reply.metadata.reply_to_message_id]
                continue
            internals.set_reply_to(reply, key)
            del self._asked[key]
            found.append(reply)
        self._look([key for key in ids if key in self._asked])
        return found

    def wait(self, message_ids: Iterable[str], seconds: float) -> None:
        """Until there may be something new of these, at most so long."""
        pause = getattr(self._grid, "wait", None)  # Flower's own grids have none
        ids = [one for key in message_ids if key in self._asked for one in self._asked[key].ids]
        if pause is None or not ids:
            time.sleep(seconds)
        else:
            pause(ids, seconds)

    def _push(self, messages: list[Message]) -> list[str]:
        """Push, for the first time or again."""
        return list(self._grid.push_messages(messages))

    def _pull(self, message_ids: list[str]) -> list[Message]:
        """All that came, a loss too."""
        return list(self._grid.pull_messages(message_ids))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and wait for all replies, or until ``timeout``."""
        outstanding = set(self.push_messages(messages))
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        found: list[Message] = []
        while outstanding and time.monotonic() < deadline:
            for reply in self.pull_messages(sorted(outstanding)):
                outstanding.discard(reply.metadata.reply_to_message_id)
                found.append(reply)
            if outstanding:
                self.wait(outstanding, 0.5)
        return found

    def name(self, node: int) -> str:
        """What a node is called in the log."""
        return f"node {node}"

    @staticmethod
    def _lost(reply: Message) -> bool:
        return reply.has_error() and reply.error.code in internals.TRANSPORT_ERRORS

    def _look(self, keys: list[str]) -> None:
        """Ask again where the reply was lost, or the node began anew since it was asked, once it is online."""
        if not keys or time.monotonic() < self._looked + LOOK_S:
            return
        self._looked = time.monotonic()
        online = {node.id: node for node in self.nodes() if node.online}
        for asked in [self._asked[key] for key in keys]:
            node = online.get(asked.message.metadata.dst_node_id)
            if node is not None and (not asked.ids or _moment(node.activated) > asked.since):
                self._again(asked)

    def _again(self, asked: Asked) -> None:
        old = asked.message.metadata
        left = asked.deadline - time.monotonic()
        if left <= 1.0:
            return
        again = Message(asked.message.content, old.dst_node_id, old.message_type, ttl=left, group_id=old.group_id)
        asked.ids.extend(self._push([again]))
        asked.since = _now()
        LOG.warning(f"{self.name(old.dst_node_id)} began anew before it answered; it is asked again")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _moment(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text) if text else datetime.datetime.min.replace(tzinfo=datetime.UTC)
