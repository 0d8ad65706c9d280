"""A hospital's whole gate under secure aggregation: approvals, masks, one opening; beside a privacy mechanism too."""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from fedvfm.client import purge, rekeying, site_file
from fedvfm.client import state_folder as joining
from fedvfm.client.gate import gate, masking, reply_cache, secure_answers
from fedvfm.ledger import ledger
from fedvfm.protocol import protocol, secure_messages
from fedvfm.secure_aggregation import consistency, fixed_point, masks, opening, participant, round_keys
from fedvfm.secure_aggregation import session as sessions
from fedvfm.server import state_folder as enrolment
from fedvfm.state import state
from fedvfm.trust import keys, roster_document
from tests.client import private_site

PEERS = ("south", "west")
NONE = {"mechanism": "none", "clip": None, "noise_multiplier": None, "delta": None}
SHARED = {"mechanism": "record-level-shared"}
ONE_STEP = {"name": "sgd", "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "batch_size": 5}


class Study:
    """The hospital "north" with its real gate; two peers that play their parts; a coordinator by hand."""

    def __init__(
        self, folder: Path, *, private: bool, shared: bool = False, peers: tuple[str, ...] = PEERS, **recipe: Any
    ) -> None:
        given = {"min_sites": 3, "secure_aggregation": {}, **({"optimiser": ONE_STEP} if shared else {}), **recipe}
        self.recipe = private_site.make_recipe(SHARED if shared else None if private else NONE, **given)
        self.north = private_site.Site(folder, self.recipe, private_site.BUDGET if private else "")
        self.north.door = gate.Gate(self._app, reply_cache.Sent(self.north.where.sent), self.north.terms, self._report)
        self.server = enrolment.open_state(folder / "server")
        self.faults: list[Exception] = []
        self.peers = {name: keys.make() for name in peers}
        self.own = {
            name: masking.Sessions(folder / name, name, lambda key=key: key) for name, key in self.peers.items()
        }
        self.document = self.made({"north": self.north.where.public_key.read_text().strip()})

    def reopened(self) -> Study:
        """The same hospital as a restart finds it."""
        again = copy.copy(self)
        budget = private_site.BUDGET if self.recipe.privacy.mechanism != "none" else ""
        again.north = private_site.Site(self.north.folder, self.recipe, budget)
        again.north.door = gate.Gate(
            again._app, reply_cache.Sent(again.north.where.sent), again.north.terms, self._report
        )
        return again

    def made(self, north: dict[str, str], authority: keys.Private | None = None) -> roster_document.RosterDocument:
        public = {name: keys.public_text(key) for name, key in self.peers.items()}
        key = authority or keys.read_private(self.server.authority_key)
        return roster_document.make(key, self.server.about.federation, {**public, **north})

    def _report(self, where: str, error: Exception) -> None:
        self.faults.append(error)

    def _app(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type != protocol.HANDSHAKE:
            return self.north.app(message, context)
        counts = {"train": 1, "val": 4, "test": 4}
        hello = protocol.Hello("north", private_site.SHA, private_site.ROWS.fingerprint, 8, counts)
        return Message(protocol.encode_hello(hello), reply_to=message)

    def ask(self, kind: str, number: int = 1, **words: Any) -> Message:
        return self.north.ask(protocol.Task(self.recipe, number, **words), kind)

    def greet(self, document: roster_document.RosterDocument | None) -> Message:
        text = "" if document is None else document.model_dump_json()
        return self.ask(protocol.HANDSHAKE, 0, roster=text)

    def refused(self, message: Message) -> str:
        return protocol.error_word(message) if message.has_error() else ""

    def approve(self) -> None:
        self.greet(self.document)
        joining.approve(self.north.where, private_site.build(self.recipe), roster=self.document.hash)

    def session(self, number: int = 1, start: state.AdapterState = private_site.START) -> sessions.Session:
        """A session with the keys that all of them advertise now."""
        known = [own.advertised(self.recipe.hash) for own in self.own.values()]
        north = protocol.decode_hello(self.greet(self.document).content).keys
        assert north is not None
        members = tuple(sorted([*known, north], key=lambda row: row.site))
        return sessions.Session(self.recipe.hash, number, start.fingerprint, self.document.hash, 3, members)

    def share(self, session: sessions.Session) -> Message:
        return self.ask(protocol.SHARE, session.round, secure=secure_messages.session_text(session))

    def dealt(self, session: sessions.Session) -> dict[str, secure_messages.Dealing]:
        found = {"north": protocol.decode_dealing(self.share(session).content)}
        return found | {name: own.deal(session) for name, own in self.own.items()}

    def train(self, session: sessions.Session, dealt: dict[str, secure_messages.Dealing]) -> Message:
        inbox = {name: dealing.outbox["north"] for name, dealing in dealt.items() if name != "north"}
        text = secure_messages.inbox_text(session.id, inbox)
        return self.ask(protocol.TRAIN, session.round, state=private_site.START, secure=text)

    def agree(self, session: sessions.Session, survivors: list[str]) -> Message:
        asked = consistency.of(session.id, ["north", *self.own], survivors)
        return self.ask(protocol.AGREE, session.round, secure=secure_messages.sum_text(asked))

    def unmask(
        self, session: sessions.Session, survivors: list[str], signatures: dict[str, str] | None = None
    ) -> Message:
        asked = consistency.of(session.id, ["north", *self.own], survivors)
        text = secure_messages.sum_text(asked, signatures)
        return self.ask(protocol.UNMASK, session.round, secure=text)

    def units(self) -> int:
        """Images that can be drawn."""
        return len(site_file.hospital(site_file.read_site(self.north.settings), self.recipe).train)

    def events(self) -> list[str]:
        return [entry["event"] for entry in self.north.where.audit.entries]


@pytest.fixture(params=[False, True], ids=["no mechanism", "record-level"])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> Study:
    return Study(tmp_path, private=request.param)


def peer_numbers(study: Study, name: str, session: sessions.Session, dealt: Any) -> tuple[masks.Numbers, masks.Numbers]:
    """What a peer sends, and what is under its masks."""
    after = private_site.adapter(1.0 + len(name), -0.5)
    update = state.SiteUpdate(name, after, 5, 0, private_site.START.fingerprint, metrics={"loss": 0.25})
    inbox = {peer: dealing.outbox[name] for peer, dealing in dealt.items() if peer != name}
    text = secure_messages.inbox_text(session.id, inbox)
    task = protocol.Task(study.recipe, 1, private_site.START, secure=text)
    content = secure_answers.mask(study.own[name], name, task, update)
    plain = fixed_point.of(study.recipe).encode(after, private_site.START, ("head.bias",), 1, 0.25)
    return protocol.decode_masked(content).numbers, plain


def test_a_whole_round_opens_to_the_sum_and_nothing_plain_leaves(study: Study) -> None:
    study.approve()
    session = study.session()
    dealt = study.dealt(session)
    reply = study.train(session, dealt)
    assert not reply.has_error(), study.faults
    kept = reply_cache.Sent(study.north.where.sent).last(study.recipe.hash)
    assert kept is not None
    update = protocol.decode_update(kept)
    sent = protocol.decode_masked(reply.content)
    for form in ("<f4", "<f8"):
        assert update.state["head.bias"].astype(form).tobytes() not in sent.numbers.tobytes()
    total, plain = sent.numbers.copy(), np.zeros(len(sent.numbers), np.uint64)
    for name in PEERS:
        masked, own = peer_numbers(study, name, session, dealt)
        total += masked
        plain += own
    survivors = ["north", *PEERS]
    asked = consistency.of(session.id, survivors, survivors)
    answers = {
        name: own.open(study.recipe.hash, 1, asked, {}, 3, lambda _: study.document.verified).revealed
        for name, own in study.own.items()
    }
    opened = study.unmask(session, survivors)
    answers["north"] = protocol.decode_opening(opened.content).revealed
    seals = {name: dealing.commitment for name, dealing in dealt.items()}
    sum_ = opening.opened(session, survivors, survivors, total, answers, seals)
    told = update.metrics.get("loss")
    mine = fixed_point.of(study.recipe).encode(update.state, private_site.START, ("head.bias",), 1, told)
    assert np.array_equal(sum_, plain + mine)
    events = study.events()
    assert events.index("unmasked") < len(events) - 1 - events[::-1].index("sent")
    assert events.count("unmasked") == 1


def test_what_was_sent_is_charged_once_and_sent_again_as_it_was(tmp_path: Path) -> None:
    study = Study(tmp_path, private=True)
    study.approve()
    session = study.session()
    dealt = study.dealt(session)
    first, second = study.train(session, dealt), study.train(session, dealt)
    assert protocol.digest(first.content) == protocol.digest(second.content)
    assert protocol.find_ledger(first) is not None
    other = study.session()  # the round is asked for anew, in another session
    third = study.train(other, study.dealt(other))
    assert protocol.digest(third.content) != protocol.digest(first.content)
    assert study.north.app.asked.count(protocol.TRAIN) == 1, "nobody trains twice"
    assert _charges(study) == 1


def test_shared_noise_is_charged_with_the_honest_sites_it_counts_on_and_sent_again_as_it_was(tmp_path: Path) -> None:
    study = Study(tmp_path, private=True, shared=True)
    study.approve()
    session = study.session()
    dealt = study.dealt(session)
    first, second = study.train(session, dealt), study.train(session, dealt)
    assert not first.has_error(), study.faults
    assert protocol.digest(first.content) == protocol.digest(second.content)
    (line,) = study.north.charged()
    assert (line["mechanism"], line["honest"], line["steps"]) == ("record-level-shared", 2, 1)
    assert line["sample_rate"] == pytest.approx(5 / study.units())
    assert study.train(study.session(), dealt).has_error(), "these shares are of another session"
    total = np.zeros(5, np.uint64) + protocol.decode_masked(first.content).numbers
    for name in PEERS:
        total += peer_numbers(study, name, session, dealt)[0]
    survivors = ["north", *PEERS]
    asked = consistency.of(session.id, survivors, survivors)
    answers = {
        name: own.open(study.recipe.hash, 1, asked, {}, 3, lambda _: study.document.verified).revealed
        for name, own in study.own.items()
    }
    answers["north"] = protocol.decode_opening(study.unmask(session, survivors).content).revealed
    seals = {name: dealing.commitment for name, dealing in dealt.items()}
    opened = opening.opened(session, survivors, survivors, total, answers, seals)
    assert opened[-3:].tolist() == [3, 0, 0], "three sites, and no loss"
    (seed,) = study.north.where.secure.glob("*.noise")
    assert '"seed":""' in seed.read_text(), "it went with the opening"


def test_a_purge_forgets_the_seed_of_a_noise_though_not_that_there_was_one(tmp_path: Path) -> None:
    study = Study(tmp_path, private=True, shared=True)
    study.approve()
    session = study.session()
    dealt = study.dealt(session)
    assert not study.train(session, dealt).has_error(), study.faults
    (path,) = study.north.where.secure.glob("*.noise")
    assert '"seed":""' not in path.read_text()
    gone = purge.run(study.north.where)
    assert purge.SEEDS in {row.kind for row in gone}
    assert '"seed":""' in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert purge.SEEDS not in {row.kind for row in purge.found(study.north.where)}


def test_a_policy_that_does_not_name_the_shared_mechanism_refuses_it(tmp_path: Path) -> None:
    study = Study(tmp_path, private=True, shared=True)
    study.approve()
    settings = study.north.settings
    settings.write_text(settings.read_text().replace('["record-level-shared"]', '["record-level"]'))
    assert study.refused(study.greet(study.document)) == "policy-privacy"


def test_a_roster_document_waits_for_a_person_and_another_one_too(study: Study) -> None:
    assert study.refused(study.greet(None)) == "roster-pending"
    assert study.refused(study.greet(study.document)) == "roster-pending"
    joining.approve(study.north.where, private_site.build(study.recipe), roster=study.document.hash)
    assert not study.greet(study.document).has_error(), study.faults
    study.peers["late"] = keys.make()
    later = study.made({"north": study.north.where.public_key.read_text().strip()})
    assert study.refused(study.greet(later)) == "roster-pending"


def test_a_document_that_is_none_for_this_site_is_not_even_kept(study: Study) -> None:
    own = study.north.where.public_key.read_text().strip()
    forged = study.made({"north": own}, keys.make())
    without = study.made({"nobody": keys.public_text(keys.make())})
    another_key = study.made({"north": keys.public_text(keys.make())})
    changed = study.document.model_copy(update={"created": "2020-01-01T00:00:00Z"})
    for document in (forged, without, another_key, changed):
        assert study.refused(study.greet(document)) == "secure-session"
        assert not study.north.where.roster_path(document.hash).exists()


def test_without_an_approved_document_nothing_is_dealt_or_trained(study: Study) -> None:
    study.greet(study.document)
    for kind in (protocol.SHARE, protocol.AGREE, protocol.UNMASK):
        assert study.refused(study.ask(kind, 1, secure="{}")) == "roster-pending"
    assert study.refused(study.ask(protocol.TRAIN, 1, state=private_site.START)) == "roster-pending"
    assert protocol.TRAIN not in study.north.app.asked


def test_an_update_without_a_session_stays_here(study: Study) -> None:
    study.approve()
    session = study.session()
    for text in ("", "{}", secure_messages.inbox_text(session.id, {})):
        reply = study.ask(protocol.TRAIN, 1, state=private_site.START, secure=text)
        assert study.refused(reply) in ("refused", "secure-session"), "a word leaves, and no number"
    assert study.events()[-1] == "sent"
    assert study.north.where.audit.entries[-1]["kind"] == "refusal"


@pytest.mark.parametrize("wrong", ["few", "threshold", "roster", "forged", "round"])
def test_a_session_that_breaks_a_promise_gets_no_shares(study: Study, wrong: str) -> None:
    study.approve()
    session = study.session()
    stranger = round_keys.advertise(
        round_keys.fresh(), "south", study.recipe.hash, lambda text: keys.sign(keys.make(), text)
    )
    members = {
        "few": tuple(row for row in session.members if row.site != "west"),
        "forged": tuple(stranger if row.site == "south" else row for row in session.members),
    }.get(wrong, session.members)
    bad = dataclasses.replace(
        session,
        members=members,
        threshold=2 if wrong in ("threshold", "few") else 3,
        roster="f" * 64 if wrong == "roster" else session.roster,
        round=2 if wrong == "round" else 1,
    )
    reply = study.ask(protocol.SHARE, 1, secure=secure_messages.session_text(bad))
    assert study.refused(reply) == "secure-session"
    assert not list((study.north.where.secure).glob("*.session"))


def test_a_session_with_spent_keys_is_answered_with_the_next_ones(study: Study) -> None:
    study.approve()
    session = study.session()
    first = protocol.decode_dealing(study.share(session).content)
    again = protocol.decode_dealing(study.share(session).content)
    assert (first.outbox, first.commitment) == (again.outbox, again.commitment)
    later = dataclasses.replace(session, threshold=3, round=1, base="d" * 64)
    apart = protocol.decode_dealing(study.share(later).content)
    assert (apart.session, apart.outbox) == ("", {})
    assert apart.keys.channel != session.of("north").channel


def test_after_a_rekeying_the_next_keys_are_signed_with_the_new_key(study: Study) -> None:
    study.approve()
    before = study.session().of("north")
    rekeying.begin(study.north.where)
    assert rekeying.finish(study.north.where, lambda key: True)
    study.document = study.made({"north": study.north.where.public_key.read_text().strip()})
    study.approve()
    session = study.session()
    after = session.of("north")
    assert study.document.verified("north", after.signature, round_keys.signed_bytes(after, study.recipe.hash))
    assert after.channel != before.channel
    assert not study.share(session).has_error(), study.faults
    assert study.session().of("north") != after, "spent now"


def test_a_site_with_a_new_key_signs_and_opens_for_the_session_it_masked_in_under_the_old_one(tmp_path: Path) -> None:
    """Its peers hold the signature against the document of the session, and no other sum of the round is opened."""
    study = Study(tmp_path, private=False, peers=(*PEERS, "zone"))
    study.approve()
    session, survivors = study.session(), ["north", *PEERS]
    dealt, document = study.dealt(session), study.document
    study.train(session, dealt)
    rekeying.begin(study.north.where)
    assert rekeying.finish(study.north.where, lambda key: True)
    study.document = study.made({"north": study.north.where.public_key.read_text().strip()})
    study.approve()
    asked = consistency.of(session.id, dealt, survivors)
    own = protocol.decode_agreement(study.agree(session, survivors).content)
    assert document.verified("north", own.signature, asked.signed_bytes())
    signatures = {name: keys.sign(study.peers[name], asked.signed_bytes()) for name in PEERS}
    opened = study.unmask(session, survivors, {**signatures, "north": own.signature})
    assert not opened.has_error(), study.faults
    assert set(protocol.decode_opening(opened.content).revealed.masks) == {"zone"}
    (path,) = study.north.where.secure.glob("*.session")
    assert not masking._Kept.model_validate_json(path.read_bytes()).signing, "the old key went with the other secrets"


def test_a_second_opening_is_refused_and_the_first_is_repeated(study: Study) -> None:
    study.approve()
    session = study.session()
    study.train(session, study.dealt(session))
    survivors = ["north", *PEERS]
    first, second = study.unmask(session, survivors), study.unmask(session, survivors)
    assert protocol.digest(first.content) == protocol.digest(second.content)
    assert not study.share(session).has_error(), "the same session"
    assert study.refused(study.share(study.session())) == "secure-opened"


def test_keys_of_a_site_that_is_gone_leave_for_a_sum_that_survivors_signed(tmp_path: Path) -> None:
    study = Study(tmp_path, private=False, peers=(*PEERS, "zone"))
    study.approve()
    session, survivors = study.session(), ["north", *PEERS]
    dealt = study.dealt(session)
    study.train(session, dealt)
    asked = consistency.of(session.id, dealt, survivors)
    own = protocol.decode_agreement(study.agree(session, survivors).content)
    assert own == protocol.decode_agreement(study.agree(session, survivors).content)
    assert study.document.verified("north", own.signature, asked.signed_bytes())
    signatures = {name: keys.sign(study.peers[name], asked.signed_bytes()) for name in PEERS}
    assert study.refused(study.unmask(session, survivors)) == "secure-agreement"
    assert study.refused(study.unmask(session, survivors, signatures)) == "secure-agreement", "one is missing"
    assert study.refused(study.unmask(session, sorted(dealt), signatures)) == "secure-opened"
    assert study.refused(study.agree(session, ["north", "west", "zone"])) == "secure-opened"
    assert "unmasked" not in study.events()
    opened = study.reopened().unmask(session, survivors, {**signatures, "north": own.signature})
    assert set(protocol.decode_opening(opened.content).revealed.masks) == {"zone"}


def test_the_secrets_of_a_session_go_with_its_opening_and_its_files_with_the_recipe(tmp_path: Path) -> None:
    study = Study(tmp_path, private=False)
    study.approve()
    session = study.session()
    dealt = study.dealt(session)
    study.train(session, dealt)
    (path,) = study.north.where.secure.glob("*.session")
    kept = masking._read(path, masking._Kept)
    assert kept is not None
    secrets = (kept.channel, kept.mask, kept.seed, kept.own_seed, kept.own_mask)
    opened = study.unmask(session, ["north", *PEERS])
    files = [file.read_text() for file in study.north.where.secure.rglob("*") if file.is_file() and file != path]
    texts = {path.name: path.read_text(), **{str(number): text for number, text in enumerate(files)}}
    shares = protocol.decode_opening(opened.content).revealed  # its own share of its own seed left, with the others
    left = {base64.b64encode(data).decode() for part in (shares.seeds, shares.masks) for data in part.values()}
    for secret in set(secrets) - left:
        assert secret
        assert not any(secret in text for text in texts.values())
    assert study.refused(study.train(session, dealt)) == "secure-opened"
    assert _digest(study.unmask(session, ["north", *PEERS])) == _digest(opened)
    final = study.ask(protocol.EVALUATE, 1, state=private_site.START, split="test", final=True)
    assert not final.has_error(), study.faults
    assert {file.suffix for file in study.north.where.secure.iterdir()} == {".agreed", ".opened", ".lock"}


def test_the_audit_log_remembers_the_one_sum_where_files_of_sessions_were_put_back(tmp_path: Path) -> None:
    study = Study(tmp_path, private=False, peers=(*PEERS, "zone"))
    study.approve()
    session = study.session()
    study.train(session, study.dealt(session))
    before = {path: path.read_bytes() for path in study.north.where.secure.iterdir()}
    assert not study.agree(session, ["north", *PEERS]).has_error()
    assert study.events().count("agreed") == 1
    for path in study.north.where.secure.glob("*.agreed"):
        path.unlink()
    for path, data in before.items():
        path.write_bytes(data)
    again = study.reopened()
    other, whole = ["north", "west", "zone"], ["north", *study.own]
    assert again.refused(again.agree(session, other)) == again.refused(again.unmask(session, whole)) == "secure-opened"
    assert not again.agree(session, ["north", *PEERS]).has_error()
    assert again.events().count("agreed") == 1


def test_a_recipe_without_secure_aggregation_knows_no_such_message(tmp_path: Path) -> None:
    study = Study(tmp_path, private=False, min_sites=1, secure_aggregation=None)
    for kind in (protocol.SHARE, protocol.AGREE, protocol.UNMASK):
        assert study.refused(study.ask(kind, 1, secure="{}")) == "secure-session"


def test_both_shares_of_a_peer_are_in_no_answer(study: Study) -> None:
    study.approve()
    session = study.session()
    study.train(session, study.dealt(session))
    revealed = protocol.decode_opening(study.unmask(session, ["north", *PEERS]).content).revealed
    assert isinstance(revealed, participant.Revealed)
    assert not set(revealed.seeds) & set(revealed.masks)
    assert (set(revealed.seeds), set(revealed.masks)) == ({"north", *PEERS}, set())


POINTS = (
    "secure-session-on-disk",
    "trained",
    "update-on-disk",
    "update-charged",
    "residual-settled",
    "secure-masked-on-disk",
    "secure-agreement-on-disk",
    "secure-opening-on-disk",
    "secure-opening-noted",
)


SHARED_POINTS = ("update-charged", "secure-noise-on-disk", "secure-masked-on-disk", "secure-opening-on-disk")


@pytest.mark.parametrize(
    ("point", "shared"), [*((point, False) for point in POINTS), *((point, True) for point in SHARED_POINTS)]
)
def test_a_site_that_is_killed_anywhere_answers_as_if_it_had_not_been(tmp_path: Path, point: str, shared: bool) -> None:
    """A real process of the site dies by SIGKILL; what is asked again afterwards is answered, and charged, once."""
    study = Study(tmp_path, private=True, shared=shared)
    study.approve()
    session, survivors = study.session(), ["north", *PEERS]
    assert _killed(lambda: _round(study, session, survivors), point), "the point lies in a round"
    again = study.reopened()
    first, second = _round(again, session, survivors), _round(again, session, survivors)
    assert [_digest(first[place]) for place in (0, -2, -1)] == [_digest(reply) for reply in second]
    assert _charges(again) == 1
    assert again.north.app.asked.count(protocol.TRAIN) <= 1, "at most what the killed process had not kept"


def _round(study: Study, session: sessions.Session, survivors: list[str]) -> list[Message]:
    share = study.share(session)
    dealt = {"north": protocol.decode_dealing(share.content)}
    dealt |= {name: own.deal(session) for name, own in study.own.items()}
    # Nobody asks for an update whose sum was opened, and its secrets are gone.
    kept = [] if list(study.north.where.secure.glob("*.opened")) else [study.train(session, dealt)]
    return [share, *kept, study.agree(session, survivors), study.unmask(session, survivors)]


def _digest(reply: Message) -> str:
    return protocol.digest(reply.content)


def _killed(work: Callable[[], object], point: str) -> bool:
    """Whether a process that does this work dies at a fault point."""
    child = os.fork()
    if child == 0:
        os.environ["FEDVFM_FAULT_POINT"] = point
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def _charges(study: Study) -> int:
    (folder,) = (path.parent for path in study.north.folder.rglob("ledger.jsonl"))
    return [entry["event"] for entry in ledger.Ledger(folder, "north", "record").entries].count("charged")
