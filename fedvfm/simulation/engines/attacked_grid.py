"""A Grid with bad sites: it stands between an arm's own Grid and its server, in a simulation alone.

A bad site trains honestly; its reply to a train message is replaced once those of all honest sites of the round are
there, since a bad site is assumed to know them. Arms of one site are left alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.protocol import envelope, protocol
from fedvfm.server.rounds import federation
from fedvfm.simulation import attacks
from fedvfm.state import state


@dataclass
class _Round:
    """What came of the messages that went out together.

    Attributes:
        open: ids of those that are not answered yet.
        honest: updates of honest sites.
        held: replies of bad ones.
    """

    open: set[str]
    honest: list[state.AdapterState] = field(default_factory=list)
    held: list[Message] = field(default_factory=list)


class AttackedGrid(Grid):
    """Carries an arm's messages; replies of bad sites to train messages are replaced as the last honest one came.

    Args:
        grid: of the arm.
        attack: what bad sites send.
        bad: their nodes.
    """

    def __init__(self, grid: Grid, attack: attacks.Attack, bad: Iterable[int]) -> None:
        self._grid, self._attack, self._bad = grid, attack, frozenset(bad)
        self._rounds: list[_Round] = []
        self._starts: dict[str, state.AdapterState] = {}

    def __getattr__(self, name: str) -> Any:
        """What only some Grids have: their clock, their memory."""
        return getattr(self._grid, name)

    @property
    def run(self) -> Any:
        """See Flower's Grid."""
        return self._grid.run

    def set_run(self, run: Any) -> None:
        """See Flower's Grid."""
        self._grid.set_run(run)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See Flower's Grid."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See Flower's Grid."""
        return self._grid.get_node_ids()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See Flower's Grid; our servers ask by push and pull alone."""
        raise NotImplementedError("an attacked Grid answers push_messages and pull_messages")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send them on; of train messages what training starts from is kept for the replies of bad sites."""
        messages = list(messages)
        ids = list(self._grid.push_messages(messages))
        training = [key for key, one in zip(ids, messages, strict=True) if one.metadata.message_type == protocol.TRAIN]
        if training:
            self._rounds = [*(one for one in self._rounds if one.open), _Round(set(training))]
        for key, message in zip(ids, messages, strict=True):
            if key in training and message.metadata.dst_node_id in self._bad:
                start = envelope.of(message).task.state
                self._starts |= {} if start is None else {key: start}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies as they come; those of bad sites once every honest one of their round is there."""
        ready: list[Message] = []
        wanted = sorted(message_ids)
        while not ready:
            replies = list(self._grid.pull_messages(wanted))
            ready = [one for reply in replies for one in self._taken(reply)]
            if not replies:
                break
        return ready

    @staticmethod
    def _answers(reply: Message) -> str:
        return str(reply.metadata.reply_to_message_id)

    def _taken(self, reply: Message) -> list[Message]:
        """What may go on to the server now that this reply came."""
        key = self._answers(reply)
        row = next((one for one in self._rounds if key in one.open), None)
        if row is None:
            return [reply]
        row.open.discard(key)
        passed: list[Message] = []
        if reply.metadata.src_node_id in self._bad and not reply.has_error():
            row.held.append(reply)
        else:
            passed.append(reply)
            row.honest += [] if reply.has_error() else [envelope.of(reply).update.state]
        if not row.open:
            passed += [self._replaced(one, row.honest) for one in row.held]
            row.held = []
        return passed

    def _replaced(self, reply: Message, honest: attacks.Batch) -> Message:
        update = envelope.of(reply).update
        made = self._attack.update(update.state, honest, self._starts.pop(self._answers(reply)))
        reply.content = protocol.encode_update(dataclasses.replace(update, state=made))
        return internals.copy(reply)


def between(grid: Grid, job: federation.Job, what: schema.Experiment, names: Mapping[int, str]) -> Grid:
    """The Grid that an arm's server is given: the arm's own, unless bad sites of it send what they should not.

    Args:
        grid: of the arm.
        job: the arm.
        what: the experiment.
        names: of the sites, by node.
    """
    if what.attack is None or len(job.train_sites) < 2 or not attacks.make(what.attack).sends:
        return grid
    bad = [node for node, name in names.items() if name in what.attack.sites]
    return AttackedGrid(grid, attacks.make(what.attack), bad)
