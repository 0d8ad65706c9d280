"""Marks of both ends' logs with every message, through the real grid, gate and terms; without processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from flwr.app import Context, Error, Message

from fedvfm import errors
from fedvfm.audit import audit, cross_check
from fedvfm.client import rekeying
from fedvfm.client import state_folder as client_folder
from fedvfm.client.gate import enforcement, gate, reply_cache
from fedvfm.flower import internals
from fedvfm.protocol import codecs, protocol
from fedvfm.server import state_folder
from fedvfm.server.grid import roster
from fedvfm.state import state
from fedvfm.storage import hash_chain
from fedvfm.trust import keys
from tests.client import two_numbers
from tests.client.two_numbers import ROWS, SHA, adapter, build, make_recipe

CONTEXT = internals.context(1, 7, {})


def app(message: Message, context: Context) -> Message:
    """A site's ClientApp in arithmetic."""
    task = protocol.decode_task(message.content)
    if task.state is None:
        content = protocol.encode_hello(protocol.Hello("north", SHA, ROWS.fingerprint, 3, {"train": 20}))
    elif message.metadata.message_type == protocol.TRAIN:
        after = task.state + adapter(1.0)
        metrics = {"loss": 0.5, "seconds": 1.0, "steps": 3.0}
        update = state.SiteUpdate("north", after, 20, task.round - 1, task.state.fingerprint, metrics=metrics)
        content = protocol.encode_update(update)
    else:
        content = protocol.encode_evaluation(protocol.Evaluation("north", task.round, 20, {"dice": 0.5}))
    return Message(content, reply_to=message)


class Wire:
    """A Grid of one node: what is pushed is answered by the site's gate, as it arrives after a transport."""

    def __init__(self, door: Callable[[Message, Context], Message], public_key: bytes) -> None:
        self.door, self.public_key = door, public_key
        self.replies: dict[str, Message] = {}
        self.pushed: list[Message] = []
        self.tamper: Callable[[Message], None] = lambda reply: None
        self.lose = 0

    def get_nodes(self) -> list[Any]:
        class Info:
            node_id, status, last_activated_at = 7, "online", "2020-01-01T00:00:00+00:00"
            public_key = self.public_key

        return [Info()]

    def push_messages(self, messages: list[Message]) -> list[str]:
        ids = []
        for message in messages:
            internals.set_message_id(message, f"i{len(self.pushed)}")
            self.pushed.append(message)
            reply = internals.copy(self.door(internals.copy(message), CONTEXT))
            self.tamper(reply)
            if self.lose:
                self.lose -= 1
                reply = Message(Error(3, "gone"), reply_to=message)
            self.replies[message.metadata.message_id] = reply
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, ids: list[str]) -> list[Message]:
        return [self.replies.pop(one) for one in ids if one in self.replies]


class Trial:
    """A coordinator and a hospital, joined and approved."""

    def __init__(self, folder: Path, said: Callable[[], list[str]]) -> None:
        internals.be_server_task(1)
        self.said = said
        self.joined = two_numbers.join(folder)
        self.server, self.site = self.joined.server, self.joined.site
        state_folder.approve(self.server, self.site.request)
        self.reports: list[Exception] = []
        self.door = self._open()
        self.wire = Wire(self.door, self.public_key())
        self.grid = self.start_again()

    def public_key(self) -> bytes:
        """The site's, as a node shows it."""
        key = keys.read_private(self.site.key).public_key()
        return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def _open(self) -> gate.Gate:
        own = enforcement.HospitalTerms(self.site, lambda: self.joined.rules, build)
        return gate.Gate(app, reply_cache.Sent(self.site.sent), own, lambda where, error: self.reports.append(error))

    def restart_site(self) -> None:
        """The site's process, as after a restart."""
        self.site = client_folder.open_state(self.site.folder)
        self.wire.door = self.door = self._open()

    def start_again(self, recipe_hash: str = "") -> roster.RosterGrid:
        """The coordinator's process, as after a restart."""
        grid = roster.RosterGrid(
            self.wire,  # type: ignore[arg-type]
            self.server.sites,
            lambda: None,
            self.server.audit,
            recipe_hash or make_recipe().hash,
        )
        assert grid.present() == {"north": 7}
        return grid

    def ask(self, kind: str, task: protocol.Task, ttl: float = 60.0) -> Message:
        message = Message(protocol.encode_task(task), 7, kind, ttl=ttl, group_id=str(task.round))
        (one,) = self.grid.push_messages([message])
        for _ in range(5):
            for reply in self.grid.pull_messages([one]):
                return reply
        raise AssertionError("no reply")

    def logs(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return self.server.audit.entries, self.site.audit.entries

    def compare(self) -> list[cross_check.Comparison]:
        server, site = self.logs()
        here, there = self.server.audit_path, self.site.folder / "audit.jsonl"
        return [cross_check.log(there, server, "server"), cross_check.log(here, site, "site")]


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> Trial:
    from fedvfm.server.grid import retrying

    monkeypatch.setattr(retrying, "LOOK_S", 0.0)
    return Trial(tmp_path, said)


def train(number: int = 1, start: float = 0.0, **values: Any) -> protocol.Task:
    return protocol.Task(make_recipe(**values), number, adapter(start))


def test_a_run_binds_both_logs(trial: Trial) -> None:
    trial.ask(protocol.HANDSHAKE, protocol.Task(make_recipe()))
    for number in (1, 2):
        reply = trial.ask(protocol.TRAIN, train(number, number - 1.0))
        assert protocol.decode_update(reply.content).state == adapter(float(number))
    trial.ask(protocol.EVALUATE, protocol.Task(make_recipe(), 2, adapter(2.0), split="test"))
    refused = trial.ask(protocol.TRAIN, train(rounds=4))
    assert protocol.error_word(refused) == "policy-rounds"
    server, site = trial.logs()
    came, went = ([one for one in log if one["event"] == "received" and "peer" in one] for log in (server, site))
    assert [one["kind"] for one in came] == ["handshake", "train", "train", "evaluate", "refusal"]
    assert [one["kind"] for one in went] == ["handshake", "train", "train", "evaluate", "train"]
    assert all("peer_head" in one and "peer_length" in one for one in came + went)
    # A mark covers the line of the message it came with: what was received is what the other says it sent.
    for one, log in [(one, site) for one in came] + [(one, server) for one in went]:
        line = log[one["peer_length"] - 1]
        assert (line["event"], line["hash"], line.get("digest")) == ("sent", one["peer_head"], one.get("digest"))
        assert line["bytes"] > 0
    assert came[1]["fingerprint"] == adapter(1.0).fingerprint == site[came[1]["peer_length"] - 1]["fingerprint"]
    assert came[4]["reason"] == "policy-rounds"
    assert [one["round"] for one in came] == [0, 1, 2, 2, 1]
    found = trial.compare()
    assert [(len(one.notes), one.agreed) for one in found] == [(5, 5 + 9), (5, 5 + 9)]
    assert cross_check.peers(server, "server")["north"]["marked"] == 5


def test_a_lost_reply_is_sent_again_with_the_same_records_and_a_later_mark(trial: Trial) -> None:
    seen: list[Message] = []
    trial.wire.tamper = seen.append
    trial.wire.lose = 1
    reply = trial.ask(protocol.TRAIN, train())
    assert protocol.digest(reply.content) == protocol.digest(seen[0].content)
    before, after = (protocol.find_mark(one) for one in seen)
    assert before is not None
    assert after is not None
    assert after.length == before.length + 3, "received, decided, sent"
    server, site = trial.logs()
    assert [one["event"] for one in site].count("trained") == 1
    assert [one["event"] for one in server if one.get("round") == 1] == ["sent", "sent", "received"]
    assert [protocol.find_mark(one) for one in trial.wire.pushed] == [
        hash_chain.Mark(number, one["hash"]) for number, one in enumerate(server, start=1) if one["event"] == "sent"
    ]
    _, totals = audit.departures(site)
    assert (totals["updates"], totals["repeated"]) == (1, 1)
    trial.compare()


def test_what_is_no_message_is_noted_and_refused(trial: Trial) -> None:
    """A coordinator's message that cannot be read leaves its trace too."""
    for kind, change in (("query.other", {}), (protocol.TRAIN, {"protocol": 9}), (protocol.TRAIN, {"extra": "x"})):
        content = protocol.encode_task(train())
        header = content.config_records["fedvfm"]
        header.update(change)
        message = Message(content, 7, kind, ttl=60.0, group_id="1")
        protocol.put_mark(message, hash_chain.Mark(9, SHA))
        before = len(trial.site.audit.entries)
        reply = trial.door(internals.copy(message), CONTEXT)
        assert protocol.error_word(reply) == "refused"
        made = trial.site.audit.entries[before:]
        assert [(one["event"], one["kind"]) for one in made] == [
            ("received", "unknown"), ("decided", "unknown"), ("sent", "refusal")
        ]  # fmt: skip
        assert (made[0]["peer_length"], made[0]["peer_head"]) == (9, SHA)
        assert protocol.find_mark(reply) == trial.site.audit.mark


def test_a_greeting_under_another_name_is_none_whatever_it_calls_itself(trial: Trial) -> None:
    """The type of a reply is the site's word: it may not lead past the check of who speaks."""

    def other(reply: Message) -> None:
        hello = protocol.decode_hello(reply.content)
        reply.content = protocol.encode_hello(
            protocol.Hello("south", hello.backbone_sha256, hello.manifest_fingerprint, hello.rank, hello.examples)
        )
        reply.metadata.message_type = "query.other"

    trial.wire.tamper = other
    reply = trial.ask(protocol.HANDSHAKE, protocol.Task(make_recipe()))
    assert protocol.decode_hello(reply.content).site == ""
    assert "calls itself by another name" in trial.said()[0]
    assert trial.logs()[0][-1]["kind"] == "handshake"
    with pytest.raises(errors.AuditError, match="received a message that north does not say it sent to trial"):
        trial.compare()


@pytest.mark.parametrize("mark", ["", "1:" + SHA, f"{0:019d}:{SHA}", f"{2**63:019d}:{SHA}", f"{3:019d}:{SHA} ", 7])
def test_a_mark_of_no_known_form_is_refused_and_noted_nowhere(trial: Trial, mark: Any) -> None:
    from flwr.app import ConfigRecord

    def forge(reply: Message) -> None:
        reply.content["audit"] = ConfigRecord({"mark": mark})

    trial.wire.tamper = forge
    reply = trial.ask(protocol.TRAIN, train())
    with pytest.raises(errors.ProtocolError, match="mark of the sender's audit log is not of the known form"):
        protocol.decode_update(reply.content)
    assert "peer_head" not in trial.logs()[0][-1]


def test_a_site_whose_ledger_went_back_trains_no_more_in_this_recipe(trial: Trial) -> None:
    """It charged its people's privacy for updates that were thrown away, round after round."""
    ledger = hash_chain.Mark(9, SHA)

    def carry(reply: Message) -> None:
        if not reply.has_error():
            protocol.put_mark(reply, trial.site.audit.mark, ledger)

    trial.wire.tamper = carry
    hello, word = protocol.Task(make_recipe()), protocol.LEDGER_WENT_BACK
    assert not trial.ask(protocol.TRAIN, train(1, 0.0)).has_error()
    ledger = hash_chain.Mark(12, SHA)
    assert not trial.ask(protocol.TRAIN, train(2, 1.0)).has_error()
    assert not trial.ask(protocol.HANDSHAKE, hello).has_error()
    ledger = hash_chain.Mark(11, SHA)
    assert protocol.error_word(trial.ask(protocol.TRAIN, train(3, 2.0))) == word
    assert "ledger has 11 entries and had 12: it was cut or put back" in trial.said()[-1]
    assert [(one["event"], one.get("ledger")) for one in trial.logs()[0][-2:]] == [
        ("received", str(ledger)), ("decided", None)
    ], "noted as it came"  # fmt: skip
    assert trial.logs()[0][-1]["reason"] == word
    (heard,) = audit.heard(trial.logs()[0])
    assert heard.ledger == str(hash_chain.Mark(12, SHA)), "a receipt names the longest"
    for grid in (trial.grid, trial.start_again()):
        trial.grid = grid
        for length in (11, 13):
            ledger = hash_chain.Mark(length, SHA)
            assert protocol.error_word(trial.ask(protocol.HANDSHAKE, hello)) == word, "so it is asked for no update"
            assert protocol.error_word(trial.ask(protocol.TRAIN, train(3, 2.0))) == word
        assert not trial.ask(protocol.EVALUATE, protocol.Task(make_recipe(), 2, adapter(2.0), split="test")).has_error()
    assert len(trial.said()) == 1
    trial.grid = trial.start_again("cd" * 32)
    assert not trial.ask(protocol.HANDSHAKE, hello).has_error(), "in another recipe it takes part"


@pytest.mark.parametrize("known", [False, True])
def test_a_greeting_shows_a_ledger_that_went_back_before_anything_is_charged(trial: Trial, known: bool) -> None:
    """The coordinator may have been started again since."""
    ledger: hash_chain.Mark | None = hash_chain.Mark(12, SHA)
    trial.wire.tamper = lambda reply: protocol.put_mark(reply, trial.site.audit.mark, ledger)
    assert not trial.ask(protocol.TRAIN, train(1, 0.0)).has_error()
    trial.grid = trial.grid if known else trial.start_again()
    hello = protocol.Task(make_recipe())
    for good in (None, hash_chain.Mark(12, SHA), hash_chain.Mark(40, SHA), hash_chain.Mark(12, SHA)):
        ledger = good
        assert not trial.ask(protocol.HANDSHAKE, hello).has_error(), "only an update is what was charged in this recipe"
    ledger = hash_chain.Mark(7, SHA)
    assert protocol.error_word(trial.ask(protocol.HANDSHAKE, hello)) == protocol.LEDGER_WENT_BACK
    assert "ledger has 7 entries and had 12" in trial.said()[-1]
    assert trial.logs()[0][-1]["kind"] == "ledger"


def coded(reply: Message, start: state.AdapterState) -> None:
    """The reply as a recipe with a codec has it: its update is a difference, which names no fingerprint by itself."""
    update = protocol.decode_update(reply.content)
    difference = codecs.encode("int8", update.state, start, {}).difference
    reply.content = protocol.encode_update(update, difference)


@pytest.mark.parametrize("ledger", [hash_chain.Mark(11, SHA), None])
def test_a_difference_is_no_way_round_it(trial: Trial, ledger: hash_chain.Mark | None) -> None:
    carried: hash_chain.Mark | None = hash_chain.Mark(12, SHA)

    def carry(reply: Message) -> None:
        coded(reply, adapter(0.0))
        protocol.put_mark(reply, trial.site.audit.mark, carried)

    trial.wire.tamper = carry
    assert not trial.ask(protocol.TRAIN, train(1, 0.0)).has_error()
    carried = ledger
    assert protocol.error_word(trial.ask(protocol.TRAIN, train(2, 0.0))) == protocol.LEDGER_WENT_BACK
    assert trial.logs()[0][-1]["reason"] == protocol.LEDGER_WENT_BACK


def test_no_mark_at_all_is_no_way_round_it(trial: Trial) -> None:
    trial.wire.tamper = lambda reply: protocol.put_mark(reply, trial.site.audit.mark, hash_chain.Mark(12, SHA))
    assert not trial.ask(protocol.TRAIN, train(1, 0.0)).has_error()
    trial.wire.tamper = lambda reply: None
    assert protocol.error_word(trial.ask(protocol.TRAIN, train(2, 1.0))) == protocol.LEDGER_WENT_BACK


def test_answers_that_overtake_each_other_show_no_ledger_that_went_back(trial: Trial) -> None:
    """An old answer says what the ledger was when the site was asked, and no more."""
    ledgers = iter([9, 10, 12])
    trial.wire.tamper = lambda reply: protocol.put_mark(
        reply, trial.site.audit.mark, hash_chain.Mark(next(ledgers), SHA)
    )
    ids = []
    for kind, task in ((protocol.HANDSHAKE, protocol.Task(make_recipe())), *[(protocol.TRAIN, train(1, 0.0))] * 2):
        message = Message(protocol.encode_task(task), 7, kind, ttl=60.0, group_id=str(task.round))
        ids += trial.grid.push_messages([message])
    for one in reversed(ids):
        (reply,) = trial.grid.pull_messages([one])
        assert not reply.has_error()
    assert trial.said() == []


def test_without_a_log_nothing_extra_travels(trial: Trial) -> None:
    """As in simulation: no mark on the way out, none on the way back."""
    plain = roster.RosterGrid(trial.wire, trial.server.sites, lambda: None)  # type: ignore[arg-type]
    trial.wire.door = gate.Gate(
        app, reply_cache.Sent(trial.site.folder / "other"), gate.NoTerms(), lambda where, error: None
    )
    plain.present()
    message = Message(protocol.encode_task(train()), 7, protocol.TRAIN, ttl=60.0, group_id="1")
    (one,) = plain.push_messages([message])
    (reply,) = plain.pull_messages([one])
    for found in (trial.wire.pushed[0], reply):
        assert protocol.find_mark(found) is None
        assert set(found.content) <= {"fedvfm", "metrics", "adapter"}


# -- a site that was put back ------------------------------------------------------------------------------------------


def test_a_site_whose_folder_was_put_back_answers_nothing_more_of_the_recipe(trial: Trial, tmp_path: Path) -> None:
    """It forgot what it sent; the coordinator's note of its log says so, and the next recipe is free of it."""
    trial.ask(protocol.HANDSHAKE, protocol.Task(make_recipe()))
    saved = shutil.copytree(trial.site.folder, tmp_path / "backup")
    first = trial.ask(protocol.TRAIN, train())
    assert not first.has_error()
    shutil.rmtree(trial.site.folder)
    shutil.copytree(saved, trial.site.folder)
    trial.restart_site()
    for kind, task in (
        (protocol.TRAIN, train()),
        (protocol.EVALUATE, protocol.Task(make_recipe(), 1, adapter(1.0), "val")),
        (protocol.TRAIN, train(2, 1.0)),
    ):
        assert protocol.error_word(trial.ask(kind, task)) == "went-back"
    assert "trained" not in [entry["event"] for entry in trial.site.audit.entries]
    trial.grid = trial.start_again()
    assert protocol.error_word(trial.ask(protocol.TRAIN, train())) == "went-back", "the coordinator's log remembers"
    trial.grid = trial.start_again(make_recipe(rounds=2).hash)
    assert protocol.error_word(trial.ask(protocol.HANDSHAKE, protocol.Task(make_recipe(rounds=2)))) != "went-back"


def test_a_site_that_was_not_put_back_goes_on(trial: Trial) -> None:
    """Replies that came twice, were lost, or were written about by another process are no going back."""
    trial.ask(protocol.HANDSHAKE, protocol.Task(make_recipe()))
    trial.wire.lose = 1
    assert not trial.ask(protocol.TRAIN, train()).has_error()
    trial.restart_site()
    assert not trial.ask(protocol.TRAIN, train(2, 1.0)).has_error()
    noted = [protocol.find_noted(message) for message in trial.wire.pushed]
    assert noted[0] is None, "of a recipe that begins nothing was noted"
    hashes = [entry["hash"] for entry in trial.site.audit.entries]
    assert all(mark is not None and hashes[mark.length - 1] == mark.head for mark in noted[1:])
    # A mark that names another line than one that was sent is looked up in the whole log.
    message = trial.wire.pushed[-1]
    protocol.put_mark(message, hash_chain.Mark(90, SHA), noted=hash_chain.Mark(1, hashes[0]))
    assert not trial.door(internals.copy(message), CONTEXT).has_error()
    protocol.put_mark(message, hash_chain.Mark(91, SHA), noted=hash_chain.Mark(1, SHA))
    assert protocol.error_word(trial.door(internals.copy(message), CONTEXT)) == "went-back"


def test_a_new_key_in_a_folder_that_was_put_back_is_no_way_round_it(trial: Trial, tmp_path: Path) -> None:
    trial.ask(protocol.HANDSHAKE, protocol.Task(make_recipe()))
    saved = shutil.copytree(trial.site.folder, tmp_path / "backup")
    assert not trial.ask(protocol.TRAIN, train()).has_error()
    shutil.rmtree(trial.site.folder)
    shutil.copytree(saved, trial.site.folder)
    rekeying.begin(trial.site)
    state_folder.rekey(trial.server, rekeying.NewKey(trial.site).document)
    assert rekeying.finish(trial.site, lambda key: True)
    trial.restart_site()
    trial.wire.public_key = trial.public_key()
    assert trial.grid.present() == {"north": 7}
    assert protocol.error_word(trial.ask(protocol.TRAIN, train())) == "went-back"
    trial.grid = trial.start_again()
    assert protocol.error_word(trial.ask(protocol.TRAIN, train())) == "went-back"


def test_a_site_that_joined_anew_after_its_key_was_lost_takes_part_again(trial: Trial, tmp_path: Path) -> None:
    """Its new folder begins a log of its own, so what was noted of the old one counts no more; a new key alone does."""
    trial.ask(protocol.HANDSHAKE, protocol.Task(make_recipe()))
    assert not trial.ask(protocol.TRAIN, train()).has_error()
    state_folder.revoke(trial.server, "north")
    path = state_folder.invite(trial.server, "north")
    invite = client_folder.read_invite(path, trial.server.fingerprint())
    trial.site = client_folder.join(tmp_path / "anew", invite, invite.lock.hash)
    state_folder.approve(trial.server, trial.site.request)
    trial.restart_site()
    trial.wire.public_key = trial.public_key()
    assert trial.grid.present() == {"north": 7}, "the coordinator runs on"
    for kind, task in ((protocol.HANDSHAKE, protocol.Task(make_recipe())), (protocol.TRAIN, train(2, 1.0))):
        reply = trial.ask(kind, task)
        assert not reply.has_error(), protocol.error_word(reply)
    trial.grid = trial.start_again()
    assert not trial.ask(protocol.TRAIN, train(2, 1.0)).has_error(), "and started again"
    mark = protocol.find_noted(trial.wire.pushed[-1])
    assert mark is not None
    assert mark.head in {entry["hash"] for entry in trial.site.audit.entries}, "the new log is noted as the old was"
