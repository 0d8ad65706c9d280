"""Messages of the round loop: sent in the order of the sites' names, answers taken as they come, until a deadline."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedvfm.protocol import envelope
from fedvfm.server.grid import retrying

POLL_S = 0.5


def _never(node: int, message: Message) -> bool:
    return False


@dataclass
class Traffic:
    """Bytes of serialised messages, both ways."""

    down: int = 0
    up: int = 0


@dataclass
class Limit:
    """When answers are waited for no longer, beside the timeout; whoever takes them may set ``until``.

    Attributes:
        seconds: from the asking.
        until: a time of the asker's clock.
        began: when was asked, by that clock.
        now: when the last answers came, by that clock.
    """

    seconds: float = math.inf
    until: float = math.inf
    began: float = 0.0
    now: float = 0.0

    @property
    def lasts(self) -> float:
        """Seconds from the asking."""
        return min(self.seconds, self.until - self.began)


@dataclass
class Standing:
    """Messages that outlast the asking: what is not answered when it ends may be answered in the next.

    Attributes:
        sent: message -> its node, and until when it is waited for, by the asker's clock.
        next_of: of the nodes that were asked those whose answers are taken now; None for all. Each asking waits anew
            then, since no clock decides who answers.
    """

    sent: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    next_of: Callable[[Collection[int]], Collection[int]] | None = None

    @property
    def nodes(self) -> set[int]:
        """The nodes whose answers are waited for."""
        return {node for node, _ in self.sent.values()}

    def forget(self, nodes: Collection[int]) -> None:
        """The answers of these nodes are waited for no longer."""
        self.sent = {key: row for key, row in self.sent.items() if row[0] not in nodes}

    def open(self, now: float) -> list[str]:
        """The messages that may be answered now; those that are waited for no longer go."""
        self.sent = {key: row for key, row in self.sent.items() if now < row[1]}
        chosen = self.nodes if self.next_of is None or not self.sent else self.next_of(self.nodes)
        return sorted(key for key, (node, _) in self.sent.items() if node in chosen)

    def wait_until(self, deadline: float) -> None:
        """Wait so long for all, where no clock decides."""
        if self.next_of is not None:
            self.sent = {key: (node, deadline) for key, (node, _) in self.sent.items()}


class Asker:
    """Asks sites on a Grid and counts what travels.

    Args:
        grid: Flower's; any engine's.
        timeout_s: how long answers are waited for, and how long a message lives.
    """

    def __init__(self, grid: Grid, timeout_s: float) -> None:
        self.grid, self.timeout_s = grid, timeout_s
        # A Grid whose sites wait for each other's turn knows for how much of the time this federation's worked.
        self._clock: Callable[[], float] = getattr(grid, "clock", time.monotonic)
        self.traffic = Traffic()
        self._recorded = Traffic()

    def ask(
        self,
        nodes: Mapping[int, str],
        kind: str,
        content: Callable[[int], Any],
        number: int | Mapping[int, int],
        again: Callable[[int, Message], bool] = _never,
        limit: Limit | None = None,
        standing: Standing | None = None,
    ) -> Iterator[tuple[int, Message]]:
        """Send one message to each node in order of name; yield answers as they come, until all or the deadline.

        Args:
            nodes: node -> name.
            kind: the message type.
            content: the records for a node.
            number: the round, or that of each node.
            again: whether a node that answered so is asked again, at once and until the same deadline; its answer is
                not yielded then.
            limit: ends the waiting earlier than the timeout.
            standing: messages that were sent before, whose nodes are sent nothing; takes those that are sent now.
        """
        limit, standing = limit or Limit(), standing or Standing()
        timeout_s = min(self.timeout_s, limit.seconds)
        rounds = number if isinstance(number, Mapping) else dict.fromkeys(nodes, number)

        def send(some: Sequence[int], seconds: float) -> None:
            messages = [Message(content(node), node, kind, ttl=seconds, group_id=str(rounds[node])) for node in some]
            envelope.share(messages)
            self.traffic.down += sum(map(envelope.size, messages))
            keys, until = list(self.grid.push_messages(messages)), self._clock() + seconds
            standing.sent |= {key: (node, until) for key, node in zip(keys, some, strict=True)}

        send(sorted(nodes.keys() - standing.nodes, key=lambda node: nodes[node]), timeout_s)
        limit.began = limit.now = self._clock()
        standing.wait_until(limit.began + timeout_s)
        while self._clock() < limit.until and (open_now := standing.open(self._clock())):
            replies = list(self.grid.pull_messages(open_now))
            limit.now = self._clock()
            for message in replies:
                _, deadline = standing.sent.pop(message.metadata.reply_to_message_id, (0, limit.now))
                self.traffic.up += envelope.size(message)
                node, left = message.metadata.src_node_id, deadline - self._clock()
                if node in nodes and left > 0 and again(node, message):
                    send([node], left)
                elif node in nodes:
                    yield node, message
            if not replies:
                self._wait(open_now)

    def _wait(self, outstanding: Collection[str]) -> None:
        """Until a reply may be there; a Grid of ours knows, of others it is looked for again after a while."""
        if isinstance(self.grid, retrying.SteadyGrid):
            self.grid.wait(outstanding, POLL_S)
        else:
            time.sleep(POLL_S)

    def new_traffic(self) -> dict[str, int]:
        """Bytes since the last record; those of the handshake fall to the first record after it."""
        new = {"up": self.traffic.up - self._recorded.up, "down": self.traffic.down - self._recorded.down}
        self._recorded = dataclasses.replace(self.traffic)
        return new
