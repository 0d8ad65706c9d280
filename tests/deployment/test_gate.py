"""What passes a site's gate, what the server keeps of a round, and who is asked again: without processes."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict

from fedvfm import errors
from fedvfm.client.gate import exchange, gate, reply_cache
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.server.grid import retrying
from fedvfm.server.rounds import update_store
from fedvfm.state import state

RECIPE = schema.parse(
    schema.Recipe,
    {"backbone": {"name": "dinov2-small"}, "data": {"class_names": ["a", "b"], "input_size": [28, 28]}},
    "recipe",
)
BASE = state.AdapterState({"head.w": np.ones((2, 2), np.float32)})


@pytest.fixture(autouse=True)
def _be_server() -> None:
    internals.be_server_task(1)


def ask(kind: str = protocol.TRAIN, number: int = 1, base: state.AdapterState | None = BASE) -> Message:
    made = Message(protocol.encode_task(protocol.Task(RECIPE, number, base)), 7, kind, ttl=60.0, group_id="1")
    internals.set_message_id(made, "m1")
    return internals.copy(made)


class App:
    """Trains: every time other numbers."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, message: Message, context: Context) -> Message:
        self.calls += 1
        task = protocol.decode_task(message.content)
        after = state.AdapterState({"head.w": np.full((2, 2), self.calls, np.float32)})
        update = state.SiteUpdate("north", after, 5, task.round - 1, BASE.fingerprint, metrics={"loss": 0.5})
        return Message(protocol.encode_update(update), reply_to=message)


def make(
    tmp_path: Path, app: Any, judge: tuple[gate.Step, ...] = (), leave: tuple[gate.Step, ...] = ()
) -> tuple[gate.Gate, list[Exception]]:
    """The gate of a virtual hospital, with more steps at both ends."""
    seen: list[Exception] = []
    kept = reply_cache.Sent(tmp_path / "sent")
    order = gate.Order((*gate.VIRTUAL.judge, *judge), gate.VIRTUAL.answer, leave)
    return gate.Gate(app, kept, gate.NoTerms(), lambda where, error: seen.append(error), order), seen


CONTEXT = internals.context(1, 7, {})


def test_asked_again_for_the_same_a_site_sends_the_same_bytes_and_does_not_train(tmp_path: Path) -> None:
    app = App()
    entry, _ = make(tmp_path, app)
    first = entry(ask(), CONTEXT)
    again, _ = make(tmp_path, app)  # as after a restart
    second = again(ask(), CONTEXT)
    assert app.calls == 1
    one, two = (protocol.decode_update(reply.content) for reply in (first, second))
    assert one.state.fingerprint == two.state.fingerprint
    assert second.metadata.reply_to_message_id == "m1"
    (kept,) = (tmp_path / "sent").glob("*")
    assert kept.stat().st_mode & 0o777 == 0o600
    # Another round is trained, and only the last one is kept.
    entry(ask(number=2), CONTEXT)
    assert app.calls == 2
    assert len(list((tmp_path / "sent").glob("*"))) == 1
    # What is damaged counts as none.
    (kept,) = (tmp_path / "sent").glob("*")
    kept.write_bytes(kept.read_bytes()[:-3])
    entry(ask(number=2), CONTEXT)
    assert app.calls == 3


def test_what_the_terms_refuse_is_never_computed_and_the_coordinator_gets_a_word(tmp_path: Path) -> None:
    left: list[tuple[str, bool]] = []

    def refuse(own: Any, of: exchange.Exchange) -> None:
        raise errors.PolicyRefused("approval-pending", "patient Miller")

    def note(own: Any, of: exchange.Exchange) -> None:
        left.append((of.kind, of.answer.has_error()))

    app = App()
    entry, seen = make(tmp_path, app, (refuse,), (note,))
    reply = entry(ask(), CONTEXT)
    assert app.calls == 0
    assert (reply.error.code, reply.error.reason) == (1020, "approval-pending")
    assert "Miller" not in str(internals.serialise(reply))
    assert left == [("train", True)]
    assert isinstance(seen[0], errors.PolicyRefused)


def test_a_message_that_is_none_and_an_app_that_breaks_are_words(tmp_path: Path) -> None:
    def broken(message: Message, context: Context) -> Message:
        raise ValueError("/data/patients/Miller.dcm")

    entry, _ = make(tmp_path, broken)
    strange = Message(RecordDict(), 7, protocol.TRAIN, ttl=60.0)
    internals.set_message_id(strange, "m2")
    replies = [entry(ask(), CONTEXT), entry(internals.copy(strange), CONTEXT), entry(ask("query.other"), CONTEXT)]
    assert [reply.error.reason for reply in replies] == ["error", "refused", "refused"]
    assert all(b"Miller" not in internals.serialise(reply) for reply in replies)


def test_what_cannot_be_written_down_does_not_leave(tmp_path: Path) -> None:
    def full(own: Any, of: exchange.Exchange) -> None:
        raise errors.StorageError("the disk is full")

    entry, _ = make(tmp_path, App(), leave=(full,))
    assert entry(ask(), CONTEXT).error.reason == "storage"


def test_admitted_updates_are_found_again_by_round_and_base(tmp_path: Path) -> None:
    kept = update_store.Received(tmp_path / "received")
    names = ("north", "St. Mary's ../x")
    for name in names:
        kept.keep(state.SiteUpdate(name, BASE, 5, 2, BASE.fingerprint, metrics={"loss": 0.25}), 3)
    bases = dict.fromkeys(names, BASE)
    found = {one.site: one for one in update_store.Received(tmp_path / "received").find(3, bases)}
    assert sorted(found) == sorted(names)
    assert (found["north"].num_examples, found["north"].base_round, found["north"].metrics) == (5, 2, {"loss": 0.25})
    assert found["north"].state.fingerprint == BASE.fingerprint
    assert list(kept.find(4, bases)) == []
    assert not list(kept.find(3, {"north": state.AdapterState({"head.w": np.zeros((2, 2), np.float32)})}))
    assert kept.read(3, names[1]).state == BASE
    files = sorted((tmp_path / "received").iterdir())
    assert len(files) == 2, "no name leads out of the folder"
    files[0].write_bytes(b"damaged")
    assert len(list(kept.find(3, bases))) == 1
    with pytest.raises(errors.CheckpointError):
        [kept.read(3, name) for name in names]
    kept.clear()
    assert list(kept.find(3, bases)) == []


class Losing:
    """A Grid of one node that loses what it is told to."""

    def __init__(self) -> None:
        self.pushed: list[Message] = []
        self.answers: dict[str, Error | RecordDict] = {}
        self.activated = "2020-01-01T00:00:00+00:00"

    def get_nodes(self) -> list[Any]:
        class Info:
            node_id, status, last_activated_at = 7, "online", self.activated
            public_key = PEM

        return [Info()]

    def push_messages(self, messages: list[Message]) -> list[str]:
        ids = []
        for message in messages:
            internals.set_message_id(message, f"i{len(self.pushed)}")
            self.pushed.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, ids: list[str]) -> list[Message]:
        known = {message.metadata.message_id: message for message in self.pushed}
        return [Message(self.answers.pop(one), reply_to=known[one]) for one in ids if one in self.answers]


def _pem() -> bytes:
    from cryptography.hazmat.primitives import serialization

    from fedvfm.trust import keys

    public = keys.make().public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


PEM = _pem()


@pytest.mark.parametrize("how", ["error", "restarted"])
def test_a_lost_reply_is_asked_for_again_under_its_first_number(
    how: str, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(retrying, "LOOK_S", 0.0)
    grid = Losing()
    steady = retrying.SteadyGrid(grid, lambda: None)  # type: ignore[arg-type]
    (first,) = steady.push_messages([Message(RecordDict(), 7, "train", ttl=60.0, group_id="1")])
    if how == "error":
        grid.answers[first] = Error(next(iter(internals.TRANSPORT_ERRORS)), "gone")
    else:
        grid.activated = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)).isoformat()
    assert steady.pull_messages([first]) == []
    assert len(grid.pushed) == 2
    assert "asked again" in said()[0]
    grid.answers["i1"] = RecordDict()
    (reply,) = steady.pull_messages([first])
    assert reply.metadata.reply_to_message_id == first
    assert not reply.has_error()


def test_a_sites_own_refusal_is_an_answer() -> None:
    grid = Losing()
    steady = retrying.SteadyGrid(grid, lambda: None)  # type: ignore[arg-type]
    (first,) = steady.push_messages([Message(RecordDict(), 7, "train", ttl=60.0, group_id="1")])
    grid.answers[first] = Error(1005, "refused")
    (reply,) = steady.pull_messages([first])
    assert reply.error.reason == "refused"
    assert len(grid.pushed) == 1
