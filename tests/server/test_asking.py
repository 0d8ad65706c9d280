"""Asking sites: an answer that is none is asked for again at once, and nobody is waited for beyond the deadline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict

from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.server.rounds import messaging

QUICK, SLOW = 1, 2


class Line:
    """A Grid whose clock goes on by a second a look: QUICK answers at the next look, SLOW after so many."""

    def __init__(self, slow: int, missing: int) -> None:
        self.now, self.slow, self.missing = 0.0, slow, missing
        self.pushed: list[tuple[int, float, float]] = []
        self._waiting: dict[str, tuple[Message, float]] = {}

    def clock(self) -> float:
        return self.now

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node, name = message.metadata.dst_node_id, f"i{len(self.pushed)}"
            internals.set_message_id(message, name)
            self.pushed.append((node, self.now, message.metadata.ttl))
            self._waiting[name] = message, self.now + (self.slow if node == SLOW else 1)
            ids.append(name)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        self.now += 1
        ready = [one for one in ids if one in self._waiting and self._waiting[one][1] <= self.now]
        return [self._answer(self._waiting.pop(one)[0]) for one in ready]

    def _answer(self, message: Message) -> Message:
        if message.metadata.dst_node_id == QUICK and self.missing:
            self.missing -= 1
            return Message(Error(protocol.ERROR_CODES[protocol.MISSING], protocol.MISSING), reply_to=message)
        return Message(RecordDict(), reply_to=message)


def answers(line: Line, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool, float]]:
    """Node, whether it answered with an error, and when, of each answer."""
    internals.be_server_task(1)
    monkeypatch.setattr(messaging.time, "sleep", lambda seconds: None)
    grid: Any = line
    asker, asked = messaging.Asker(grid, 10.0), set[int]()

    def again(node: int, message: Message) -> bool:
        first = message.has_error() and node not in asked
        asked.add(node)
        return first

    nodes = {QUICK: "quick", SLOW: "slow"}
    found = asker.ask(nodes, protocol.TRAIN, lambda node: RecordDict(), 1, again)
    return [(node, message.has_error(), line.now) for node, message in found]


def test_who_lacks_something_is_asked_again_while_others_still_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(slow=8, missing=1)
    assert answers(line, monkeypatch) == [(QUICK, False, 2.0), (SLOW, False, 8.0)]
    assert line.pushed == [(QUICK, 0.0, 10.0), (SLOW, 0.0, 10.0), (QUICK, 1.0, 9.0)], "until the same deadline"


def test_who_lacks_it_twice_is_asked_no_third_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers(Line(slow=3, missing=2), monkeypatch) == [(QUICK, True, 2.0), (SLOW, False, 3.0)]


def test_who_never_answers_ends_the_round_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(slow=99, missing=1)
    assert answers(line, monkeypatch) == [(QUICK, False, 2.0)]
    assert line.now == 10.0
