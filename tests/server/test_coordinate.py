"""The coordinator between two rounds: who comes, who leaves, and what was ordered; on a Grid without processes."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message

from fedvfm import errors
from fedvfm.client import state_folder as joining
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.runtime import logs
from fedvfm.server import state_folder as enrolment
from fedvfm.server.coordinator import admission_handshakes, coordinator, orders, status_file
from fedvfm.server.coordinator import waiting as patience
from fedvfm.server.grid import liveness, retrying
from fedvfm.server.rounds import messaging
from fedvfm.storage import hash_chain
from fedvfm.trust import signed_documents

ROUNDS = 4
AWAY_S = 1.0
"""Longer than the grid's looks at who is there are apart, on a machine that does much else too."""


class Town:
    """A server's state folder, and sites that answer with arithmetic.

    Attributes:
        away: sites that are not connected.
        refuses: site -> the reason it refuses everything with.
        silent: sites whose answers to training get lost.
        when: (event, round) -> what is done as it happens; a note's "round" is its text's first word.
    """

    def __init__(self, sites: Any, folder: Path, names: Iterable[str], **recipe: Any) -> None:
        self.sites, self.folder, self._recipe = sites, folder, recipe
        self.members: list[Any] = []
        self.nodes: dict[str, internals.Node] = {}
        self.away: set[str] = set()
        self.refuses: dict[str, str] = {}
        self.silent: set[str] = set()
        self.when: dict[tuple[str, Any], Callable[[], object]] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._later: list[tuple[float, Callable[[], object]]] = []
        self.server = enrolment.init(
            folder / "server", enrolment.Plan("town", "127.0.0.1:8443", (), tuple(names)), self.lock()
        )
        for name in names:
            self.join(name)

    def lock(self, **values: Any) -> Any:
        backbone = {"name": "none", "sha256": self.sites.SHA}
        recipe = {"rounds": ROUNDS, "backbone": backbone, **self._recipe, **values}
        locked = self.sites.lock(self.sites.make_recipe(**recipe))
        return locked

    def join(self, name: str) -> None:
        """Enrol a site and connect it."""
        invite = joining.read_invite(self.server.invite_path(name), self.server.fingerprint())
        joined = joining.join(self.folder / f"{name}-{len(self.members)}", invite, invite.lock.hash)
        entry, _ = enrolment.approve(self.server, joined.request)
        node = internals.Node(10 + len(self.members), entry.public_key, True, "")
        self.nodes[name] = node
        self.members.append(self.sites.NumpySite(name))

    def add(self, name: str) -> None:
        enrolment.invite(self.server, name)
        self.join(name)

    def run(self, **values: Any) -> dict[str, Any] | None:
        """The run until the present recipe is finished or put aside; its evaluation."""
        # Whatever a test does not give is more than a machine needs that does much else.
        settings = {"join_timeout_s": 60.0, "round_timeout_s": 60.0, "away_timeout_s": AWAY_S, **values}
        where = enrolment.open_state(self.server.folder)
        run = coordinator.Coordinator(where, schema.ServerConfig(**settings), self._observe)
        inner = self.sites.LoopGrid(self._app(), 30)
        grid = _Grid(self, inner, where.sites, run.look, None, where.about.recipe, away_s=AWAY_S)
        with self._listening():
            run.run(grid, internals.context(1, 1, {}))
        path = where.run_path(where.about.recipe) / "evaluation.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _app(self) -> Any:
        inner = self.sites.client_app(_Later(self.members))

        def answer(message: Message, context: Any) -> Message:
            name = self.members[int(context.node_config["partition-id"])].name
            if name in self.refuses:
                return Message(protocol.refusal(errors.PolicyRefused(self.refuses[name], "")), reply_to=message)
            reply: Message = inner(message, context)
            return reply

        return answer

    def _observe(self, event: str, /, **fields: Any) -> None:
        self.events.append((event, fields))
        key = str(fields["text"]).split()[0].strip(":") if event == "note" else fields.get("round")
        action = self.when.pop((event, key), None)
        if action is not None:
            action()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """A line of the log is an event as it is written."""
        logger, ears = logging.getLogger("fedvfm"), logging.Handler()
        ears.emit = lambda record: self._observe("note", text=record.getMessage())  # type: ignore[method-assign]
        logger.addHandler(ears)
        try:
            with logs.limited(logging.INFO, "fedvfm"):
                yield
        finally:
            logger.removeHandler(ears)

    def at(self, moment: float, action: Callable[[], object]) -> None:
        """Do something at a time of the monotonic clock, between two answers."""
        self._later.append((moment, action))

    def pass_time(self) -> None:
        for moment, action in [one for one in self._later if time.monotonic() >= one[0]]:
            self._later.remove((moment, action))
            action()

    def notes(self) -> str:
        return "\n".join(fields["text"] for event, fields in self.events if event == "note")

    def cohorts(self, recipe: str = "") -> list[list[str]]:
        return [line["cohort"] for line in self.journal(recipe)]

    def journal(self, recipe: str = "") -> list[dict[str, Any]]:
        return hash_chain.read(self.server.run_path(recipe or self.server.about.recipe) / "journal.jsonl")

    def trained(self, name: str) -> list[int]:
        return [number for one in self.members if one.name == name for kind, number in one.asked if kind == "train"]

    def stands(self) -> dict[str, Any]:
        return status_file.read(self.server.folder / coordinator.RUN)


class _Later(list[Any]):
    """The members as they are when they are asked for: sites may join while it runs."""

    def __init__(self, members: list[Any]) -> None:
        self._members = members

    def __getitem__(self, index: Any) -> Any:
        return self._members[index]


class _Grid(liveness.WatchfulGrid):
    """Without a SuperLink: nodes are the town's."""

    def __init__(self, town: Town, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._town = town

    def nodes(self) -> list[internals.Node]:
        self._town.pass_time()
        return [node for name, node in self._town.nodes.items() if name not in self._town.away]

    def _pull(self, message_ids: list[str]) -> list[Message]:
        waiting = self._grid._waiting  # type: ignore[attr-defined]
        for key in message_ids:
            node, kind = waiting[key].metadata.dst_node_id, waiting[key].metadata.message_type
            if kind == protocol.TRAIN and self.name(node) in self._town.silent & self._town.nodes.keys():
                message_ids = [one for one in message_ids if one != key]
        return super()._pull(message_ids)


@pytest.fixture
def make(sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Town]:
    (tmp_path / "server").mkdir()
    monkeypatch.setattr(coordinator, "LOOK_S", 0.01)
    monkeypatch.setattr(admission_handshakes, "LOOK_S", 0.0)
    monkeypatch.setattr(admission_handshakes, "FIRST_S", 0.05)
    monkeypatch.setattr(admission_handshakes, "LONGEST_S", 0.2)
    monkeypatch.setattr(retrying, "LOOK_S", 0.01)
    monkeypatch.setattr(messaging, "POLL_S", 0.02)

    def made(*names: str, **recipe: Any) -> Town:
        town = Town(sites, tmp_path, names or ("east", "west"), **recipe)
        (town.server.folder / coordinator.RUN).mkdir(mode=0o700)
        return town

    return made


# -- who takes part ----------------------------------------------------------------------------------------------------


def test_two_sites_to_the_end(make: Callable[..., Town]) -> None:
    town = make()
    found = town.run()
    assert found is not None
    assert (found["round"], sorted(found["last"]["sites"]), found["acceptance"]) == (ROUNDS, ["east", "west"], {})
    assert town.cohorts() == [["east", "west"]] * ROUNDS
    assert town.trained("east") == [1, 2, 3, 4]


def test_a_site_approved_while_rounds_run_is_taken_in_at_the_next(make: Callable[..., Town]) -> None:
    town = make()
    town.when["round", 2] = lambda: town.add("late")
    town.run()
    assert town.cohorts() == [["east", "west"]] * 2 + [["east", "late", "west"]] * 2
    assert "sites now: east, late, west" in town.notes()


def test_a_late_site_that_nobody_approved_for_holds_up_nobody(make: Callable[..., Town]) -> None:
    town = make()

    def arrive() -> None:
        town.refuses["late"] = "approval-pending"
        town.add("late")

    town.when["round", 2] = arrive
    town.when["round", 3] = lambda: town.refuses.clear()
    town.run()
    assert town.cohorts()[2] == ["east", "west"]
    assert "site 'late' waits for a person's approval of the recipe" in town.notes()


def test_a_site_that_leaves_and_comes_back(make: Callable[..., Town]) -> None:
    town = make("east", "north", "west")
    town.when["round-end", 1] = lambda: town.away.add("north")
    town.when["round-end", 3] = lambda: town.away.clear()
    town.run(quorum=2)
    assert town.cohorts() == [["east", "north", "west"], *[["east", "west"]] * 2, ["east", "north", "west"]]


def test_an_approval_withdrawn_in_the_middle_of_a_round(make: Callable[..., Town]) -> None:
    """The round goes on without the site; with an approval of its person it is back."""
    town = make("east", "north", "west")
    town.when["round", 2] = lambda: town.refuses.update(north="approval-pending")
    town.when["round", 4] = lambda: town.refuses.clear()
    town.run(quorum=2)
    assert town.cohorts() == [["east", "north", "west"]] * 2 + [["east", "west"]] * 2
    assert town.journal()[1]["refused"]["north"]["reason"] == "site-approval-pending"


@pytest.mark.parametrize(("how", "word"), [("revoke", "revoked"), ("drop", "dropped")])
def test_a_site_taken_off_while_it_computes_is_not_waited_for(make: Callable[..., Town], how: str, word: str) -> None:
    """Its answer counts no more; those of the others do, and nobody trains twice, though the quorum was all."""
    town = make("east", "north", "west")
    town.silent.add("north")
    act = {"revoke": enrolment.revoke, "drop": orders.drop}[how]
    town.when["reply", 2] = lambda: (act(town.server, "north"), town.silent.clear())
    town.when["round", 2] = lambda: town.silent.add("north")
    town.when["round", 1] = lambda: town.silent.clear()
    town.run(round_timeout_s=60.0)
    assert town.cohorts() == [["east", "north", "west"], *[["east", "west"]] * 3]
    assert town.trained("east") == [1, 2, 3, 4]
    assert f"the answer of site 'north' is not waited for: {word}" in town.notes()
    assert town.server.sites()["north"].status == word
    assert "north" not in town.stands()["sites"]


def test_a_dropped_site_is_readmitted(make: Callable[..., Town]) -> None:
    town = make("east", "west")
    town.when["round-end", 1] = lambda: orders.drop(town.server, "west")
    town.when["round-end", 2] = lambda: orders.readmit(town.server, "west")
    town.run()
    assert town.cohorts() == [["east", "west"], ["east"], *[["east", "west"]] * 2]


def test_a_site_that_stays_away_is_waited_for_no_longer_than_told(make: Callable[..., Town]) -> None:
    town = make("east", "north", "west")

    def vanish() -> None:
        town.silent.add("north")
        town.away.add("north")

    town.when["round", 2] = vanish
    town.run(quorum=2, round_timeout_s=60.0)
    assert town.journal()[1]["refused"]["north"]["reason"] == "site-away"
    assert town.cohorts()[2:] == [["east", "west"]] * 2


@pytest.mark.parametrize("how", ["another-joins", "away-and-back", "paused"])
def test_who_still_trains_is_asked_for_the_same_round_when_the_sites_change(
    make: Callable[..., Town], how: str
) -> None:
    """Its late update counts, whatever happens between two rounds."""
    town = make("east", "north", "west", asynchronous={"buffer_size": 2})
    town.silent.add("west")

    def change() -> None:
        if how == "another-joins":
            town.add("late")
        elif how == "away-and-back":
            town.away.add("west")
        else:
            orders.pause(town.server)
            town.at(time.monotonic() + 0.2, lambda: orders.resume(town.server))

    def back() -> None:
        town.away.clear()
        town.silent.clear()

    town.when["round-end", 1] = change
    town.when["round-end", 2] = back
    found = town.run(quorum=2)
    assert found is not None
    lines = town.journal()
    assert lines[0]["out"] == lines[1]["out"] == {"west": {"round": 1}}
    assert lines[2]["staleness"] == {"west": 2}
    assert all(line["refused"] == {} for line in lines)
    assert set(town.trained("west")) - {4} == {1}
    assert lines[2]["examples"].keys() >= {"west"}


def test_settings_that_exclude_asynchronous_rounds_stop_the_start(make: Callable[..., Town]) -> None:
    town = make("east", "north", "west", asynchronous={"buffer_size": 2})
    with pytest.raises(errors.ConfigError, match=r"server\.patience = 2: with recipe\.asynchronous no round waits"):
        town.run(patience=2.0)
    assert town.members[0].asked == []


# -- quorum ------------------------------------------------------------------------------------------------------------


def test_pending_approvals_are_shown_and_waited_for(make: Callable[..., Town]) -> None:
    town = make()
    town.refuses["west"] = "approval-pending"
    seen: dict[str, Any] = {}

    def approve() -> None:
        seen.update(town.stands())
        town.refuses.clear()

    town.when["note", "waiting"] = lambda: town.when.update({("note", "waiting"): approve})
    town.run()
    assert "missing: west (approval-pending)" in town.notes()
    assert (seen["phase"], seen["reason"].split(":")[0]) == ("waiting", "waiting")
    assert town.cohorts() == [["east", "west"]] * ROUNDS


def test_the_time_is_over_and_it_goes_on_with_the_quorum(make: Callable[..., Town]) -> None:
    town = make()
    town.refuses["west"] = "policy-backbone"
    found = town.run(quorum=1, join_timeout_s=0.5)
    assert found is not None
    assert town.cohorts() == [["east"]] * ROUNDS
    assert "goes on without: west (policy-backbone)" in town.notes()


@pytest.mark.parametrize(
    ("word", "limit"), [("approval-pending", "approval"), ("policy-closed", "approval"), ("not-connected", "join")]
)
def test_the_time_is_over_and_there_is_no_quorum(make: Callable[..., Town], word: str, limit: str) -> None:
    town = make()
    town.away.update({"west"} if word == "not-connected" else ())
    town.refuses["west"] = word
    with pytest.raises(
        errors.QuorumMissed,
        match=rf"after 0\.3 s waiting: 1 of 2 sites are there, the quorum is 2; missing: west \({word}\)",
    ):
        town.run(**{"join_timeout_s": 60.0, "approval_timeout_s": 60.0, f"{limit}_timeout_s": 0.3})
    assert not (town.server.run_path(town.server.about.recipe) / "journal.jsonl").exists()


def test_a_person_has_longer_than_a_site_that_is_absent(make: Callable[..., Town]) -> None:
    """An approval that takes a night does not end a federation whose sites are all there."""
    town = make()
    town.refuses["west"] = "approval-pending"
    begins = time.monotonic()

    def approve() -> None:
        assert time.monotonic() > begins + 3.0
        town.refuses.clear()

    town.at(begins + 3.1, approve)
    found = town.run(join_timeout_s=1.5)
    assert found is not None
    assert town.cohorts() == [["east", "west"]] * ROUNDS
    assert town.notes().count("missing: west (approval-pending)") == 1, "told once, and shown all the time"


def test_a_site_that_comes_and_goes_is_not_waited_for_without_end() -> None:
    now = [0.0]
    waits = patience.Patience(
        schema.ServerConfig(join_timeout_s=100.0, approval_timeout_s=500.0), again=False, clock=lambda: now[0]
    )
    for now[0] in range(0, 501, 50):
        assert waits.given_up({"west": "not-connected" if now[0] % 100 else "asked"} if now[0] % 150 else {}) == {}
    now[0] = 501.0
    assert waits.given_up({"west": "asked"}) == {"west": 500.0}


def test_a_server_that_starts_again_goes_on_with_its_quorum(make: Callable[..., Town]) -> None:
    """Rounds were done: who is not back soon may join later; at the first start all of them had an hour."""
    town = make()
    town.when["round-end", 1] = lambda: orders.pause(town.server)
    sleep = coordinator.time.sleep
    with pytest.MonkeyPatch.context() as patch:

        def stop(seconds: float) -> None:
            if town.stands().get("phase") == "paused":
                raise KeyboardInterrupt
            sleep(seconds)

        patch.setattr(coordinator.time, "sleep", stop)
        with pytest.raises(KeyboardInterrupt):
            town.run(quorum=1, join_timeout_s=60.0)
    orders.resume(town.server)
    town.away.add("west")
    found = town.run(quorum=1, join_timeout_s=60.0, away_timeout_s=0.3)
    assert found is not None
    assert town.cohorts() == [["east", "west"], *[["east"]] * 3]
    assert "goes on without: west (not-connected)" in town.notes()


# -- who was invited ---------------------------------------------------------------------------------------------------


def test_a_federation_does_not_begin_without_a_site_that_was_invited(make: Callable[..., Town]) -> None:
    """Whoever approves the first request and starts has no federation of one: the second site is waited for."""
    town = make("east")
    enrolment.invite(town.server, "west")
    town.when["note", "waiting"] = lambda: town.join("west")
    assert town.run() is not None
    assert town.cohorts() == [["east", "west"]] * ROUNDS
    assert "0 of 2 sites are there, the quorum is 2; missing: east (asked), west (invited, not yet approved)" in (
        town.notes()
    )


def test_a_site_that_never_joins_ends_the_wait_with_what_to_do(make: Callable[..., Town]) -> None:
    town = make("east")
    enrolment.invite(town.server, "west")
    with pytest.raises(errors.QuorumMissed, match=r"west \(invited, not yet approved\).*server start --without west"):
        town.run(approval_timeout_s=0.3)
    assert town.run(without=("west",), approval_timeout_s=0.3) is not None
    assert town.cohorts() == [["east"]] * ROUNDS
    assert "goes on without: west (invited, not yet approved)" in town.notes()


def test_with_a_quorum_a_site_that_was_invited_is_waited_for_like_an_absent_one(make: Callable[..., Town]) -> None:
    town = make("east")
    enrolment.invite(town.server, "west")
    assert town.run(quorum=1, join_timeout_s=0.3) is not None
    assert "goes on without: west (invited, not yet approved)" in town.notes()


def test_a_site_invited_while_rounds_run_holds_up_nobody(make: Callable[..., Town]) -> None:
    town = make()
    town.when["round", 2] = lambda: (enrolment.invite(town.server, "later"), orders.pause(town.server))
    town.when["note", "paused"] = lambda: orders.resume(town.server)
    assert town.run() is not None
    orders.extend(town.server, 1)
    assert town.run() is not None
    assert "later" not in town.notes()


def test_without_a_site_that_is_there_it_takes_part_all_the_same(make: Callable[..., Town]) -> None:
    town = make()
    assert town.run(without=("west",)) is not None
    assert "west" in town.cohorts()[-1]


def test_a_round_that_misses_the_quorum_is_asked_for_again_and_then_given_up(make: Callable[..., Town]) -> None:
    town = make()
    town.silent.add("west")
    with pytest.raises(errors.QuorumMissed, match=r"round 1: 1 of 2 sites were admitted.*west: no-answer"):
        town.run(round_timeout_s=0.2)
    assert "It is asked for again (2 of 2)" in town.notes()
    assert town.trained("east") == [1], "who answered is not asked twice"
    town.when["round", 1] = lambda: town.silent.clear()
    assert town.run() is not None


def test_a_node_that_calls_itself_by_another_name_takes_no_part(make: Callable[..., Town]) -> None:
    town = make("east", "north")
    town.members[1].name = "east"
    town.run(quorum=1, join_timeout_s=0.3)
    assert town.cohorts() == [["east"]] * ROUNDS


def test_a_site_with_another_backbone_takes_no_part(make: Callable[..., Town]) -> None:
    town = make("east", "north")
    town.members[1].sha256 = "cd" * 32
    town.run(quorum=1, join_timeout_s=0.3)
    assert "site 'north' holds backbone cdcdcdcdcdcd" in town.notes()
    assert town.cohorts() == [["east"]] * ROUNDS


def test_a_refusal_by_admission_is_no_word_of_the_site(make: Callable[..., Town]) -> None:
    """Admission says "site-name" of an update; what a site says itself comes as "site-" and its word."""
    town = make()

    def other(kind: str, number: int, reply: Any) -> Any:
        if kind == "train" and number == 2 and town.trained("west").count(2) == 1:
            return dataclasses.replace(reply, site="east")
        return reply

    town.members[1].change = other
    assert town.run() is not None
    assert "west: site-name" in town.notes()
    assert "It is asked for again (1 of 2)" in town.notes(), "at once: nobody refused"
    assert "missing: west" not in town.notes()
    assert town.trained("west") == [1, 2, 2, 3, 4]


def test_a_site_whose_ledger_went_back_is_asked_no_more_in_this_recipe(make: Callable[..., Town]) -> None:
    town = make()
    town.when["round", 2] = lambda: town.refuses.update(west=protocol.LEDGER_WENT_BACK)
    seen: list[str] = []
    town.when["round", 4] = lambda: (seen.append(town.stands()["sites"]["west"]), town.refuses.clear())
    assert town.run(quorum=1) is not None
    assert town.cohorts() == [["east", "west"]] * 2 + [["east"]] * 2
    assert town.journal()[1]["refused"]["west"]["reason"] == "site-ledger-went-back"
    assert seen == ["ledger-went-back"], "as the server's status shows it"
    assert "goes on without: west (ledger-went-back)" in town.notes()
    town.refuses["west"] = protocol.LEDGER_WENT_BACK
    orders.add_recipe(town.server, town.lock(seed=7))
    begins = time.monotonic()
    assert town.run(quorum=1) is not None
    assert time.monotonic() < begins + 50.0, "nobody waits for it"
    orders.add_recipe(town.server, town.lock(seed=8))
    with pytest.raises(errors.QuorumMissed, match=r"whose privacy ledger went back: .*server start --without west"):
        town.run(join_timeout_s=0.3)


@pytest.mark.parametrize("how", ["revoke", "drop"])
def test_a_quorum_that_the_roster_lacks_is_waited_for(make: Callable[..., Town], how: str) -> None:
    """A site is taken off, and another one, or the same one, comes in time: nothing ends meanwhile."""
    town = make()
    act = {"revoke": enrolment.revoke, "drop": orders.drop}[how]

    def back() -> None:
        town.add("north") if how == "revoke" else orders.readmit(town.server, "west")

    town.when["round-end", 1] = lambda: (act(town.server, "west"), town.when.update({("note", "waiting"): back}))
    assert town.run(quorum=2) is not None
    assert town.cohorts() == [["east", "west"], *[["east", "north" if how == "revoke" else "west"]] * 3]
    waiting = {
        "revoke": "1 of 1 sites are there, the quorum is 2; 1 too few are on the roster: fedvfm server invite NAME",
        "drop": "1 of 2 sites are there, the quorum is 2; missing: west (dropped, not readmitted)",
    }[how]
    assert waiting in town.notes()


@pytest.mark.parametrize(
    ("how", "limit", "told"),
    [("revoke", "join", "or lower the quorum"), ("drop", "approval", "take 'west' in again: fedvfm server readmit")],
)
def test_a_quorum_that_the_roster_lacks_is_given_up_in_time(
    make: Callable[..., Town], how: str, limit: str, told: str
) -> None:
    town = make()
    act = {"revoke": enrolment.revoke, "drop": orders.drop}[how]
    town.when["round-end", 1] = lambda: act(town.server, "west")
    with pytest.raises(errors.QuorumMissed, match=rf"after 1\.5 s waiting: .*{told}"):
        town.run(quorum=2, **{f"{limit}_timeout_s": 1.5})
    assert "missing: none" not in town.notes()


def test_all_sites_dropped_are_waited_for(make: Callable[..., Town]) -> None:
    town = make("east")

    def drop() -> None:
        orders.drop(town.server, "east")
        town.when["note", "waiting"] = lambda: orders.readmit(town.server, "east")

    town.when["round-end", 1] = drop
    assert town.run() is not None
    assert town.cohorts() == [["east"]] * ROUNDS


def test_an_invite_that_expired_is_not_waited_for(make: Callable[..., Town], monkeypatch: pytest.MonkeyPatch) -> None:
    town = make("east")
    enrolment.invite(town.server, "west", days=1)
    later = signed_documents.now() + datetime.timedelta(days=2)
    monkeypatch.setattr(signed_documents, "now", lambda: later)
    assert town.run() is not None
    assert "goes on without: west (its invite expired)" in town.notes()


def test_a_site_that_refuses_at_once_does_not_end_the_run(make: Callable[..., Town]) -> None:
    """A full disk mends: it takes no part, is greeted after pauses that grow, and trains when there is room."""
    town = make()
    refused: list[float] = []

    def full(kind: str, number: int, reply: Any) -> Any:
        if kind == "train" and number == 2 and len(refused) < 6:
            refused.append(time.monotonic())
            raise errors.StorageError("no space")
        return reply

    town.members[1].change = full
    assert town.run() is not None
    assert town.cohorts() == [["east", "west"]] * ROUNDS
    assert town.trained("east") == [1, 2, 3, 4], "who answered is not asked twice"
    apart = [after - before for before, after in itertools.pairwise(refused)]
    assert len(apart) == 5
    assert min(apart[2:]) > 0.2 - 0.05, "the pauses grew from 0.05 s"
    assert "missing: west (storage)" in town.notes()


def test_a_site_that_refuses_for_ever_ends_the_run_in_time(make: Callable[..., Town]) -> None:
    town = make()

    def full(kind: str, number: int, reply: Any) -> Any:
        if kind == "train":
            raise errors.StorageError("no space")
        return reply

    town.members[1].change = full
    begins = time.monotonic()
    with pytest.raises(errors.QuorumMissed, match="west: site-storage"):
        town.run(join_timeout_s=1.5)
    assert time.monotonic() > begins + 1.5


def test_it_counts_on_where_it_ended_and_was_started_again(tmp_path: Path) -> None:
    """Else a run that ends every half hour would wait for ever; who was down for long begins to wait anew."""
    (tmp_path / "run").mkdir()
    server, wall = schema.ServerConfig(join_timeout_s=100.0, approval_timeout_s=500.0), [1000.0]

    def begin(now: float) -> tuple[patience.Patience, patience.Memory]:
        waits = patience.Patience(server, again=False, clock=lambda: wall[0] - now)
        memory = patience.Memory(tmp_path / "run", lambda: wall[0])
        memory.go_on(waits, "a" * 64, 0)
        return waits, memory

    for step in range(5):  # each is another process, whose own clock began elsewhere
        waits, memory = begin(10.0 * step)
        assert waits.given_up({"west": "asked"}) == {}
        memory.keep(waits, "a" * 64, 0)
        wall[0] += 24.0
    waits, memory = begin(0.0)
    assert waits.given_up({"west": "asked"}) == {"west": 100.0}
    assert begin(0.0)[0].given_up({"west": "asked"}) == {"west": 100.0}
    memory.go_on(other := patience.Patience(server, again=True, clock=lambda: wall[0]), "b" * 64, 0)
    assert other.given_up({"west": "asked"}) == {}, "of another recipe"
    wall[0] += patience.STALE_S
    assert begin(0.0)[0].given_up({"west": "asked"}) == {}
    memory.forget()
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "run" / patience.FILE).write_text("{")
    assert begin(0.0)[0].given_up({"west": "asked"}) == {}


# -- orders ------------------------------------------------------------------------------------------------------------


def test_pause_and_resume(make: Callable[..., Town], monkeypatch: pytest.MonkeyPatch) -> None:
    town = make()
    seen: dict[str, Any] = {}
    sleep = coordinator.time.sleep

    def look(seconds: float) -> None:
        if town.stands().get("phase") == "paused":
            seen.update(town.stands(), rounds=len(town.journal()))
            orders.resume(town.server)
        sleep(seconds)

    town.when["round", 2] = lambda: orders.pause(town.server)
    monkeypatch.setattr(coordinator.time, "sleep", look)
    town.run()
    assert (seen["phase"], seen["rounds"]) == ("paused", 2), "the round in hand ends first"
    assert seen["reason"].startswith("paused by ")
    assert len(town.cohorts()) == ROUNDS


@pytest.mark.parametrize("number", [1, 3])
def test_finish_ends_after_the_round_in_hand(make: Callable[..., Town], number: int) -> None:
    town = make()
    town.when["round", number] = lambda: orders.finish(town.server)
    found = town.run()
    assert found is not None
    assert (found["round"], len(town.cohorts())) == (number, number)
    assert set(found["last"]["sites"]) == {"east", "west"}
    assert (town.server.run_path(town.server.about.recipe) / "adapter.safetensors").exists()
    with pytest.raises(errors.ConfigError, match="is finished already"):
        orders.finish(town.server)


def test_a_finish_ordered_before_the_first_round(make: Callable[..., Town]) -> None:
    town = make()
    orders.pause(town.server)
    orders.finish(town.server)
    found = town.run()
    assert found is not None
    assert (found["round"], len(town.cohorts())) == (1, 1)


@pytest.mark.parametrize("number", [1, 2])
def test_a_finish_is_taken_back_in_the_round_it_was_ordered(make: Callable[..., Town], number: int) -> None:
    town = make()
    if number == 1:
        orders.finish(town.server)
        town.when["round", 1] = lambda: orders.unfinish(town.server)
    else:
        town.when["round", 2] = lambda: orders.finish(town.server)
        town.when["reply", 2] = lambda: orders.unfinish(town.server)
    found = town.run()
    assert found is not None
    assert (found["round"], len(town.cohorts())) == (ROUNDS, ROUNDS)
    kinds = [entry["kind"] for entry in town.server.audit.entries if entry["event"] == "steered"]
    assert kinds == ["finish", "finish-undone"]


def test_a_finish_is_not_taken_back_once_the_final_test_began(make: Callable[..., Town]) -> None:
    town = make()
    refused = []

    def undo() -> None:
        with pytest.raises(errors.ConfigError, match=r"is at its final test\. For more rounds: fedvfm server extend"):
            orders.unfinish(town.server)
        refused.append(True)

    town.when["round", 2] = lambda: orders.finish(town.server)
    town.when["test", 2] = undo
    found = town.run()
    assert found is not None
    assert (found["round"], refused) == (2, [True])
    with pytest.raises(errors.ConfigError, match="is finished already"):
        orders.unfinish(town.server)


def test_a_finish_can_be_taken_back_after_its_final_test_failed(make: Callable[..., Town]) -> None:
    town = make()

    def close() -> None:
        town.refuses["west"] = "policy-closed"
        town.when["note", "waiting"] = lambda: (orders.unfinish(town.server), town.refuses.clear())

    town.when["round", 2] = lambda: orders.finish(town.server)
    town.when["test", 2] = close
    found = town.run()
    assert found is not None
    assert (found["round"], len(town.cohorts())) == (ROUNDS, ROUNDS)


def test_extended_from_the_final_adapter_under_another_hash(make: Callable[..., Town]) -> None:
    town = make()
    town.when["round", 2] = lambda: orders.extend(town.server, 2)
    first = town.run()
    assert first is not None
    before = town.server.about.recipe
    after = orders.settle(town.server)
    recipe = after.locked().recipe
    assert after.about.recipe != before
    assert (recipe.rounds, recipe.start) == (2, first["fingerprint"])
    assert after.locked().adapter.fingerprint == first["fingerprint"]
    more = town.run()
    assert more is not None
    assert more["fingerprint"] != first["fingerprint"]
    assert [line["round"] for line in town.journal(after.about.recipe)] == [1, 2]
    assert orders.settle(town.server).about.recipe == after.about.recipe
    assert town.trained("east") == [1, 2, 3, 4, 1, 2]


def test_another_recipe_at_once_and_back(make: Callable[..., Town]) -> None:
    town = make()
    other = town.lock(seed=7)
    town.when["round", 2] = lambda: orders.add_recipe(town.server, other, at_once=True)
    assert town.run() is None
    assert "is put aside for another one" in town.notes()
    first = town.server.about.recipe
    assert len(town.cohorts()) == 2
    assert town.run() is not None
    assert len(town.cohorts(other.hash)) == ROUNDS
    assert orders.add_recipe(town.server, town.lock()) is True
    assert town.run() is not None
    assert town.trained("east") == [1, 2, 1, 2, 3, 4, 3, 4]
    assert town.cohorts(first) == [["east", "west"]] * ROUNDS


@pytest.mark.parametrize("word", ["policy-closed", "approval-pending"])
def test_a_site_that_closes_before_the_final_test_is_waited_for(make: Callable[..., Town], word: str) -> None:
    """It is not asked again and again until the run gives up: it tests when it is open again."""
    town = make()

    def close() -> None:
        town.refuses["west"] = word
        town.when["note", "waiting"] = lambda: town.refuses.clear()

    town.when["test", ROUNDS] = close
    found = town.run()
    assert found is not None
    assert set(found["last"]["sites"]) == {"east", "west"}
    assert f"missing: west ({word})" in town.notes()
    assert town.notes().count("It is asked for again when who refused takes part again") == 1
    assert len(town.cohorts()) == ROUNDS


def test_what_sites_say_of_the_final_adapter_is_kept(make: Callable[..., Town]) -> None:
    town = make("east", "north", "west")
    words = {"east": "accepted", "north": "declined", "west": ""}
    for member in town.members:

        def say(kind: str, number: int, reply: Any, word: str = words[member.name]) -> Any:
            if kind != "evaluate test":
                return reply
            return protocol.Evaluation(reply.site, number, reply.num_examples, reply.metrics, acceptance=word)

        member.change = say
    found = town.run()
    assert found is not None
    assert found["acceptance"] == {"east": "accepted", "north": "declined"}
    rows = [row for row in town.server.audit.entries if row.get("kind") == "final-adapter"]
    assert {row["peer"]: row["verdict"] for row in rows} == found["acceptance"]
    assert {row["fingerprint"] for row in rows} == {found["fingerprint"]}


def test_a_site_that_only_tests_is_asked_for_scores_and_never_to_train(make: Callable[..., Town]) -> None:
    town = make("east", "north", "west")
    town.members[1].examples = 0
    found = town.run()
    assert found is not None
    assert set(found["last"]["sites"]) == {"east", "north", "west"}
    assert town.cohorts() == [["east", "west"]] * ROUNDS
    assert town.trained("north") == []


def test_a_site_that_only_tests_fills_no_quorum() -> None:
    def members(**train: int) -> dict[str, Any]:
        return {name: SimpleNamespace(examples={"train": count}) for name, count in train.items()}

    assert coordinator.training(members(east=5, north=0, west=7), 0) == ("east", "west")
    assert coordinator.training(members(east=5, north=0, west=7), 2) == ("east", "west")
    assert coordinator.training(members(east=5, north=0), 2) == ("east", "north")
    assert coordinator.training(members(east=0, north=0), 0) == ("east", "north")
    assert coordinator.training({"east": SimpleNamespace(examples={})}, 0) == ("east",), "it does not say"


# -- unlike label sets -------------------------------------------------------------------------------------------------


def labelling(make: Callable[..., Town], **names: tuple[str, ...]) -> Town:
    """A town whose recipe takes partial labels, and whose sites name these classes."""
    town = make(*names)
    data = {"class_names": ["rest", "cell", "vessel"]}
    orders.add_recipe(town.server, town.lock(task={"partial_labels": True}, data=data), at_once=True)
    town.server = enrolment.open_state(town.server.folder)
    for member in town.members:
        member.change = lambda kind, number, said, own=names[member.name]: (
            dataclasses.replace(said, labelled=own) if kind == "hello" else said
        )
    return town


def test_a_federation_does_not_begin_with_a_class_that_nobody_labels(make: Callable[..., Town]) -> None:
    town = labelling(make, east=("cell",), west=("cell",))
    with pytest.raises(errors.ClassUnlabelled, match="no site labels vessel"):
        town.run()
    assert town.trained("east") == []


def test_who_labels_what_is_in_the_journal(make: Callable[..., Town]) -> None:
    town = labelling(make, east=("cell",), west=())
    assert town.run() is not None
    assert [line["labelled"] for line in town.journal()] == [{"east": ["cell"]}] * ROUNDS


def test_a_site_that_names_other_classes_takes_no_part(make: Callable[..., Town]) -> None:
    town = labelling(make, east=(), west=("liver",))
    town.run(quorum=1, join_timeout_s=0.3)
    assert town.cohorts() == [["east"]] * ROUNDS
    assert "site 'west' names 1 classes that it labels, 1 of them not the recipe's" in town.notes()


def test_a_site_cannot_fill_the_journal_with_the_names_of_classes(make: Callable[..., Town]) -> None:
    town = labelling(make, east=(), west=("cell",) * 4)
    town.run(quorum=1, join_timeout_s=0.3)
    assert town.cohorts() == [["east"]] * ROUNDS
    assert "site 'west' names 4 classes that it labels" in town.notes()


def test_a_class_that_only_a_site_without_training_images_labels_is_labelled_nowhere(make: Callable[..., Town]) -> None:
    town = labelling(make, east=("cell",), west=("vessel",))
    town.members[1].examples = 0
    with pytest.raises(errors.ClassUnlabelled, match=r"no site labels vessel \(east: cell\)"):
        town.run(quorum=1)


@pytest.mark.parametrize("secure", [False, True])
def test_keys_that_do_nothing_under_secure_aggregation_are_told(
    make: Callable[..., Town], tmp_path: Path, secure: bool
) -> None:
    town = make("east")
    locked: Any = town.lock(min_sites=3, **({"secure_aggregation": {}} if secure else {}))
    where: Any = SimpleNamespace(folder=tmp_path, locked=lambda: locked, roster_document=lambda: "it")
    with town._listening():
        coordinator.Coordinator(where, schema.ServerConfig(grace_s=60.0), town._observe)
    assert ("server.grace_s = 60: under secure aggregation" in town.notes()) == secure
