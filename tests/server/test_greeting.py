"""Greetings of sites that are there and say nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from fedvfm import aggregators
from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.server.coordinator import admission_handshakes

NODE = 10


class Grid:
    """One site, which answers what it is told to.

    Attributes:
        sent: every greeting.
        answers: which of them have an answer, and what.
    """

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.answers: dict[int, RecordDict] = {}

    def present(self) -> dict[str, int]:
        return {"east": NODE}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            internals.set_message_id(message, f"m{len(self.sent)}")
            self.sent.append(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = [number for number in sorted(self.answers) if f"m{number}" in set(message_ids)]
        return [Message(self.answers.pop(number), reply_to=self.sent[number]) for number in found]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(admission_handshakes.time, "monotonic", lambda: now[0])
    return now


def test_a_site_that_is_there_but_silent_is_greeted_again(sites: Any, clock: list[float]) -> None:
    """A greeting that got stuck on the way kept a site out for ten minutes."""
    internals.be_server_task(1)
    grid, locked = Grid(), sites.lock(sites.make_recipe())
    rule = aggregators.TABLE.get(locked.recipe.aggregation.rule)()
    found = admission_handshakes.Greetings(grid, locked, rule)  # type: ignore[arg-type]
    when = []
    while clock[0] < 900.0:
        before = len(grid.sent)
        found.look()
        when += [clock[0]] * (len(grid.sent) - before)
        clock[0] += 1.0
    assert when[:5] == [0.0, 30.0, 90.0, 210.0, 450.0], "ever more rarely: it may be at work"
    assert found.words() == {"east": admission_handshakes.ASKED}
    site = sites.NumpySite("east")
    hello = site.hello(protocol.Task(locked.recipe))
    grid.answers = dict.fromkeys((0, len(grid.sent) - 2, len(grid.sent) - 1), hello)
    found.look()
    assert found.words() == {"east": admission_handshakes.GREETED}
    assert set(found.members()) == {"east"}
    assert 0 in grid.answers, "one whose life was over is asked for no more"
    before, clock[0] = len(grid.sent), clock[0] + 3600.0
    found.look()
    assert len(grid.sent) == before, "who takes part is greeted no more"
