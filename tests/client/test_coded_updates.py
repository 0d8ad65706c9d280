"""Updates that are coded differences, through the real gate: what is kept, what is settled, and what SIGKILL leaves."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from fedvfm import errors, seeding
from fedvfm.client.gate import gate, held_adapters, reply_cache
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.protocol import codecs, protocol
from fedvfm.state import state
from tests.client import private_site

ROUNDS = 4
SHAPE = (3, 5)
START = state.AdapterState({"head.w": np.zeros(SHAPE, np.float32)})
CONTEXT = internals.context(1, 7, {})
POINTS = ("residual-proposed", "trained", "update-on-disk", "update-charged", "residual-settled")


@pytest.fixture(autouse=True)
def _be_server() -> None:
    internals.be_server_task(1)


def recipe(codec: str = "int4") -> schema.Recipe:
    values = {"backbone": {"name": "none"}, "data": {"class_names": ["a", "b"]}, "codec": codec}
    return schema.parse(schema.Recipe, values, "recipe")


class Training:
    """Moves by numbers that only the round decides, and codes that as the real app does."""

    def __init__(self, kept: reply_cache.Sent) -> None:
        self.kept, self.rounds = kept, list[int]()

    def __call__(self, message: Message, context: Context) -> Message:
        task = protocol.decode_task(message.content, self.kept.adapters.find)
        assert task.state is not None
        self.rounds.append(task.round)
        moved = seeding.stream(0, task.round).standard_normal(SHAPE).astype(np.float32)
        update = state.SiteUpdate(
            "north", state.AdapterState({"head.w": task.state["head.w"] + moved}), 5, task.round - 1,
            task.state.fingerprint, metrics={"loss": 0.5},
        )  # fmt: skip
        before = self.kept.residuals.before(task.recipe.hash, "north", task.round)
        coded = codecs.encode(task.recipe.codec, update.state, task.state, before)
        self.kept.residuals.propose(task.recipe.hash, "north", task.round, task.state.fingerprint, coded.residual)
        return Message(protocol.encode_update(update, coded.difference), reply_to=message)


class Site:
    """The gate of a site, as a restart finds it."""

    def __init__(self, folder: Path) -> None:
        kept = reply_cache.Sent(folder / "sent")
        self.app, self.faults = Training(kept), list[Exception]()
        self.door = gate.Gate(self.app, kept, gate.NoTerms(), lambda where, error: self.faults.append(error))

    def ask(self, number: int, start: state.AdapterState, difference: codecs.Difference | None = None) -> Message:
        content = protocol.encode_task(protocol.Task(recipe(), number, start), difference)
        message = Message(content, 7, protocol.TRAIN, ttl=60.0, group_id=str(number))
        internals.set_message_id(message, "m1")
        return internals.copy(self.door(internals.copy(message), CONTEXT))

    def update(self, number: int, start: state.AdapterState) -> state.AdapterState:
        reply = self.ask(number, start)
        assert not reply.has_error(), self.faults
        return protocol.decode_update(reply.content, start).state


def undisturbed(folder: Path) -> list[state.AdapterState]:
    """What a site answers in each round; every round starts from its own last answer."""
    found = [START]
    for number in range(1, ROUNDS + 1):
        found.append(Site(folder).update(number, found[-1]))
    return found[1:]


def killed(work: Any, point: str) -> bool:
    status = os.waitpid(private_site.child(work, FEDVFM_FAULT_POINT=point), 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_and_asked_again_a_site_ends_with_the_same_bits(tmp_path: Path, point: str) -> None:
    expected = undisturbed(tmp_path / "whole")
    start = START
    for number, wanted in enumerate(expected, 1):
        assert killed(lambda number=number, start=start: Site(tmp_path / "site").ask(number, start), point)
        site = Site(tmp_path / "site")
        assert site.update(number, start) == wanted
        assert site.app.rounds == ([] if point in POINTS[2:] else [number]), "what was kept is not trained again"
        start = wanted
        assert site.update(number, expected[number - 2] if number > 1 else START) == wanted, "a third time, too"


@pytest.mark.parametrize("point", POINTS)
def test_what_an_update_lost_counts_only_if_the_update_may_leave(tmp_path: Path, point: str) -> None:
    """Killed in round 2 and not asked for it again: round 3 goes on from round 1, unless 2 was charged and settled."""
    site = Site(tmp_path / "site")
    first = site.update(1, START)
    residuals = reply_cache.Sent(tmp_path / "site" / "sent").residuals
    after_one = residuals.before(recipe().hash, "north", 2)
    assert np.abs(after_one["head.w"]).max() > 0
    assert killed(lambda: Site(tmp_path / "site").ask(2, first), point)
    found = residuals.before(recipe().hash, "north", 3)
    assert (found["head.w"] == after_one["head.w"]).all() == (point != "residual-settled")


def test_the_same_round_from_another_adapter_starts_from_the_round_before(tmp_path: Path) -> None:
    """A coordinator that went back: what the lost round's update lost is not in the new one."""
    site = Site(tmp_path / "site")
    first = site.update(1, START)
    second = site.update(2, first)
    site.update(3, second)
    other = first * 2.0
    again = site.update(2, other)
    plain = Site(tmp_path / "plain")
    plain.update(1, START)
    assert plain.update(2, other) == again
    assert not list((tmp_path / "site" / "sent").glob("*-000003-*.residual"))


def test_what_an_update_from_another_adapter_lost_does_not_count_where_that_never_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for one round with two adapters; the second update met a full disk, so it was not charged."""
    site = Site(tmp_path / "site")
    first = site.update(1, START)
    second = site.update(2, first)
    residuals = reply_cache.Sent(tmp_path / "site" / "sent").residuals
    lost = residuals.before(recipe().hash, "north", 3)["head.w"]

    def full(*given: Any) -> None:
        raise errors.StorageError("full")

    with monkeypatch.context() as patch:
        patch.setattr(reply_cache.Sent, "keep", full)
        assert site.ask(2, first * 2.0).has_error()
    assert site.update(2, first) == second, "the one that was kept"
    assert (residuals.before(recipe().hash, "north", 3)["head.w"] == lost).all()
    site.update(3, second)
    assert not list((tmp_path / "site" / "sent").glob("*.proposed")), "a round that is over proposes nothing"


def test_a_difference_to_an_adapter_that_the_site_holds_after_a_restart(tmp_path: Path) -> None:
    site = Site(tmp_path / "site")
    first = site.update(1, START)
    coded = codecs.encode("int4", first, START, {})
    step = codecs.Difference("int4", START.fingerprint, coded.after.fingerprint, coded.difference.shapes,
                             coded.difference.data)  # fmt: skip
    reply = Site(tmp_path / "site").ask(2, coded.after, step)
    assert not reply.has_error()
    assert protocol.decode_update(reply.content, coded.after).base_fingerprint == coded.after.fingerprint
    empty = Site(tmp_path / "empty")
    reply = empty.ask(2, coded.after, step)
    assert reply.error.reason == protocol.MISSING
    assert isinstance(empty.faults[0], errors.AdapterMissing)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "site" / "sent").iterdir())


def test_little_is_kept(tmp_path: Path) -> None:
    undisturbed(tmp_path)
    kept = [path.suffix for path in (tmp_path / "sent").iterdir()]
    assert sorted(kept) == [".adapter", ".adapter", ".reply", ".residual", ".residual", ".residual"]


def test_a_damaged_adapter_counts_as_none(tmp_path: Path) -> None:
    adapters = held_adapters.Adapters(tmp_path)
    adapters.keep("r", START)
    assert held_adapters.Adapters(tmp_path).find(START.fingerprint) == START
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    assert held_adapters.Adapters(tmp_path).find(START.fingerprint) is None
    assert held_adapters.Adapters(tmp_path).find("../../etc/passwd") is None


def test_processes_that_share_a_folder_let_go_of_the_same_adapter(tmp_path: Path) -> None:
    """One of them finds a name whose file the other has just removed."""
    (tmp_path / "recipe-gone.adapter").symlink_to("nothing")
    held_adapters.Adapters(tmp_path).keep("recipe", START)
    other = held_adapters.Adapters(tmp_path)
    other.keep("recipe", state.AdapterState({"head.w": np.ones(SHAPE, np.float32)}))
    assert other.find(START.fingerprint) == START
