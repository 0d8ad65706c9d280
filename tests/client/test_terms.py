"""A hospital's terms around real messages: refused before anything is computed, recorded before anything leaves."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.client import state_folder
from fedvfm.client.gate import enforcement, exchange, gate, policy, reply_cache, steps
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.state import state
from fedvfm.storage import hash_chain
from tests.client import two_numbers
from tests.client.two_numbers import ROWS, SHA, adapter, build, make_recipe

CONTEXT = internals.context(1, 5, {})


def report(at: str, error: Exception) -> None:
    """Nobody looks at it."""


def nobody(message: Message, context: Any) -> Message:
    raise AssertionError("nothing may be computed")


def asked(kind: str, task: protocol.Task, mark: hash_chain.Mark | None = None) -> Message:
    """A coordinator's message, with the mark of its log where it has one."""
    message = Message(content=protocol.encode_task(task), dst_node_id=5, message_type=kind)
    if mark is not None:
        protocol.put_mark(message, mark)
    return message


class Hospital:
    """A joined site, and a coordinator's messages to it."""

    def __init__(self, folder: Path) -> None:
        joined = two_numbers.join(folder)
        self.where, self.rules = joined.site, joined.rules
        self.terms = enforcement.HospitalTerms(self.where, lambda: self.rules, build)
        self.kept = reply_cache.Sent(self.where.sent)
        internals.be_server_task(1)

    def entries(self) -> list[dict[str, Any]]:
        return self.where.audit.entries

    def ask(self, kind: str, task: protocol.Task, content: RecordDict) -> Message:
        """What the gate does: judge, answer with ``content``, release, record; no update is kept."""
        order = gate.Order(gate.HOSPITAL.judge, (steps.compute, steps.release), gate.HOSPITAL.leave)
        door = gate.Gate(lambda message, _: Message(content, reply_to=message), self.kept, self.terms, report, order)
        passing = door.open(asked(kind, task), CONTEXT)
        door.judge(passing)
        door.answer(passing)
        door.leave(passing)
        return passing.answer

    def judge(
        self, kind: str, task: protocol.Task, mark: hash_chain.Mark | None = None, terms: gate.Terms | None = None
    ) -> exchange.Exchange:
        """A message that was judged, perhaps by terms that were just opened."""
        door = gate.Gate(nobody, reply_cache.Sent(self.where.sent), terms or self.terms, report)
        passing = door.open(asked(kind, task, mark), CONTEXT)
        door.judge(passing)
        return passing

    def refused(self, kind: str, task: protocol.Task) -> str:
        """The word that a message is refused with; nothing about it was trained, and it is in the log."""
        with pytest.raises(errors.PolicyRefused) as caught:
            self.judge(kind, task)
        last = self.entries()[-1]
        assert (last["event"], last["verdict"], last["reason"]) == ("decided", "refused", caught.value.reason)
        return caught.value.reason


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital(tmp_path)


def update(number: int = 1, start: float = 0.0, examples: int = 20, **metrics: float) -> RecordDict:
    values = {"loss": 0.5, "seconds": 1.0, "steps": 3.0, **metrics}
    after = adapter(start + 1.0)
    return protocol.encode_update(
        state.SiteUpdate("north", after, examples, number - 1, adapter(start).fingerprint, metrics=values)
    )


def train_task(number: int = 1, start: float = 0.0, **values: Any) -> protocol.Task:
    return protocol.Task(make_recipe(**values), number, adapter(start))


def test_a_round_leaves_its_trace(hospital: Hospital) -> None:
    before = len(hospital.entries())
    reply = hospital.ask(protocol.TRAIN, train_task(), update())
    made = hospital.entries()[before:]
    assert [row["event"] for row in made] == ["received", "decided", "trained", "sent"]
    assert made[0]["fingerprint"] == made[2]["base"] == adapter(0.0).fingerprint
    assert made[3]["fingerprint"] == made[2]["fingerprint"] == adapter(1.0).fingerprint
    assert made[3]["bytes"] == internals.size(reply)
    assert made[3]["metrics"] == ["loss", "seconds", "steps"]
    assert made[2]["examples"] == 20
    assert {row["recipe"] for row in made} == {make_recipe().hash}
    assert audit.verify(hospital.where.folder / "audit.jsonl")["length"] == before + 4


def test_what_the_policy_does_not_name_stays(hospital: Hospital) -> None:
    reply = hospital.ask(protocol.TRAIN, train_task(), update(secret=7.0))
    assert set(protocol.decode_update(reply.content).metrics) == {"loss", "seconds", "steps"}
    assert protocol.decode_update(reply.content).state == adapter(1.0), "the adapter itself is not touched"
    few = hospital.ask(protocol.TRAIN, train_task(2, 5.0), update(2, 5.0, examples=9))
    assert protocol.decode_update(few.content).metrics == {}
    assert protocol.decode_update(few.content).num_examples == 9


def test_values_of_single_samples_never_leave(hospital: Hospital) -> None:
    hospital.ask(protocol.TRAIN, train_task(), update())
    task = protocol.Task(make_recipe(), 1, adapter(0.5), split="val")
    values = {"dice": 0.5, "smith": 1.0}
    answer = protocol.Evaluation("north", 1, 12, values, {"dice": [0.5] * 12}, ("smith",) * 12)
    found = protocol.decode_evaluation(
        hospital.ask(protocol.EVALUATE, task, protocol.encode_evaluation(answer)).content
    )
    assert (dict(found.metrics), dict(found.samples), found.ids) == ({"dice": 0.5}, {}, ())
    assert hospital.entries()[-1]["metrics"] == ["dice"]
    assert b"smith" not in (hospital.where.folder / "audit.jsonl").read_bytes()


def test_a_withdrawn_approval_counts_at_once(hospital: Hospital) -> None:
    hospital.ask(protocol.TRAIN, train_task(), update())
    state_folder.withdraw(hospital.where, make_recipe().hash)
    assert hospital.refused(protocol.TRAIN, train_task(2)) == "approval-pending"


def test_a_changed_recipe_waits_for_a_person_and_can_be_read(hospital: Hospital) -> None:
    task = train_task(optimiser={"learning_rate": 0.5})
    assert hospital.refused(protocol.HANDSHAKE, protocol.Task(task.recipe)) == "approval-pending"
    seen = hospital.where.find(task.recipe.hash)
    assert seen.recipe == task.recipe
    assert seen.manifest.fingerprint == ROWS.fingerprint, "as this site builds it, not as the coordinator says"
    state_folder.approve(hospital.where, seen)
    hospital.judge(protocol.HANDSHAKE, protocol.Task(task.recipe))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"rounds": 4}, "policy-rounds"),
        ({"backbone": {"name": "other", "sha256": SHA}}, "policy-backbone"),
        ({"backbone": {"name": "some/backbone"}}, "policy-backbone"),
        ({"backbone": {"name": "some/backbone", "sha256": "cd" * 32}}, "policy-backbone"),
        ({"adapter": {"kind": "full"}}, "policy-adapter"),
        ({"task": {"kind": "classification"}}, "policy-task"),
        ({"evaluation": {"surface": True}}, "policy-metrics"),
    ],
)
def test_recipes_that_the_policy_refuses(hospital: Hospital, values: dict[str, Any], word: str) -> None:
    assert hospital.refused(protocol.TRAIN, train_task(**values)) == word


def test_the_site_counts_its_own_parameters(hospital: Hospital) -> None:
    """The coordinator's manifest is never asked: the model as built here is over the policy's bound."""
    hospital.rules = hospital.rules.model_copy(update={"max_trainable_parameters": 1})
    assert hospital.refused(protocol.TRAIN, train_task()) == "policy-parameters"


def test_rounds_are_used_up_whatever_the_run(hospital: Hospital) -> None:
    """Who starts over, or sends other adapters for the same round, gets no more than the policy's rounds."""
    for start in (0.0, 5.0, 10.0):
        number = 1 if start == 0.0 else 2
        hospital.ask(protocol.TRAIN, train_task(number, start), update(number, start))
    again = enforcement.HospitalTerms(state_folder.open_state(hospital.where.folder), lambda: hospital.rules, build)
    task = train_task(2, 10.0)
    hospital.judge(protocol.TRAIN, task, terms=again)  # killed before it was kept, it is trained anew
    hospital.terms = again
    assert hospital.refused(protocol.TRAIN, train_task(2, 5.0)) == "policy-rounds"
    early = Message(update(2, 5.0), reply_to=asked(protocol.TRAIN, task))
    reply_cache.Sent(hospital.where.sent).keep(train_task(2, 5.0), early)
    hospital.judge(protocol.TRAIN, train_task(2, 5.0))
    assert hospital.refused(protocol.TRAIN, train_task(2, 15.0)) == "policy-rounds"
    assert hospital.refused(protocol.TRAIN, train_task(3, 0.0)) == "policy-rounds"


def test_messages_beyond_the_recipe(hospital: Hospital) -> None:
    for task in (
        protocol.Task(make_recipe(), 1, adapter(0.0), split="val", per_sample=True),
        protocol.Task(make_recipe(), 1, adapter(0.0), split="val", surface=True),
        protocol.Task(make_recipe(), -1, adapter(0.0), split="val"),
        protocol.Task(make_recipe(), 1, adapter(0.0), split="train"),
    ):
        assert hospital.refused(protocol.EVALUATE, task) == "policy-message"


def test_an_extension_begins_with_the_adapter_that_its_recipe_names(hospital: Hospital) -> None:
    """Its people approved to go on from that one: another in its place is refused, and nothing is trained."""
    task = protocol.Task(make_recipe(start=adapter(7.0).fingerprint), 1, adapter(7.0))
    hospital.where.remember(build(task.recipe))
    state_folder.approve(hospital.where, hospital.where.find(task.recipe.hash))
    other = protocol.Task(task.recipe, 1, adapter(8.0))
    assert hospital.refused(protocol.TRAIN, other) == "policy-base"
    hospital.ask(protocol.TRAIN, task, update(1, 7.0))
    second = protocol.Task(task.recipe, 2, adapter(8.0))
    hospital.judge(protocol.TRAIN, second)
    cut = protocol.Task(task.recipe, 1, state.AdapterState({"head.bias": np.full(1, 8.0, np.float32)}))
    assert hospital.refused(protocol.TRAIN, cut) == "policy-base", "this site has no rank of its own"


# -- a coordinator that asks for scores --------------------------------------------------------------------------------


def scores(number: int, value: float = 0.5123, **values: Any) -> RecordDict:
    return protocol.encode_evaluation(protocol.Evaluation("north", number, 20, {"dice": value}, **values))


def score_task(number: int, start: float, split: str = "val", **values: Any) -> protocol.Task:
    return protocol.Task(make_recipe(), number, adapter(start), split, **values)


def test_nobody_s_own_adapters_are_scored(hospital: Hospital) -> None:
    """An asker that makes adapters and reads patients off their scores gets nothing; each refusal is in the log."""
    assert hospital.refused(protocol.EVALUATE, score_task(1, 0.1)) == "policy-base", "nothing was trained here"
    hospital.ask(protocol.TRAIN, train_task(), update())
    hospital.ask(protocol.EVALUATE, score_task(1, 0.5), scores(1))
    for number in range(300):
        task = score_task(1 + number % 3, 1000.0 + number, "val" if number % 2 else "test")
        assert hospital.refused(protocol.EVALUATE, task) in ("policy-base", "policy-evaluations")
    assert hospital.refused(protocol.EVALUATE, score_task(1, 0.6)) == "policy-evaluations"
    assert len([row for row in hospital.entries() if row["event"] == "evaluated"]) == 1


def test_a_score_is_given_once_and_asked_again_with_the_same_numbers(hospital: Hospital) -> None:
    """On other data a second score would tell who came and who went."""
    hospital.ask(protocol.TRAIN, train_task(), update())
    task = score_task(1, 0.5)
    first = hospital.ask(protocol.EVALUATE, task, scores(1, classes={"cell": 20}))
    assert protocol.decode_evaluation(first.content).metrics == {"dice": 0.5}, "of 20 patients: in steps of 1 / 40"
    again = enforcement.HospitalTerms(hospital.where, lambda: hospital.rules, build)  # as after a restart
    passing = hospital.judge(protocol.EVALUATE, task, terms=again)
    assert steps.scores_given_before(again, passing)
    assert protocol.digest(passing.answer.content) == protocol.digest(first.content)
    passing = hospital.judge(protocol.EVALUATE, task, terms=again)
    hospital.rules = (rules := hospital.rules).model_copy(update={"metrics": ()})
    assert steps.scores_given_before(again, passing)
    assert protocol.decode_evaluation(passing.answer.content).metrics == {}
    hospital.rules = rules
    for path in hospital.where.sent.glob("*.val"):
        path.unlink()  # purged: the log says that it left
    assert hospital.refused(protocol.EVALUATE, task) == "policy-evaluations"


def test_the_final_adapter_is_judged_anew_and_its_numbers_stay(hospital: Hospital) -> None:
    hospital.ask(protocol.TRAIN, train_task(), update())
    task = score_task(3, 0.5, "test", final=True)
    for acceptance, value in (("pending", 0.5), ("accepted", 0.9)):
        reply = hospital.ask(protocol.EVALUATE, task, scores(3, value, acceptance=acceptance))
        answer = protocol.decode_evaluation(reply.content)
        assert (answer.metrics, answer.acceptance) == ({"dice": 0.5}, acceptance)
        assert not steps.scores_given_before(hospital.terms, hospital.judge(protocol.EVALUATE, task))
    assert hospital.refused(protocol.EVALUATE, score_task(2, 0.5, "test")) == "policy-evaluations"


def test_how_many_patients_have_a_class_stays_here(hospital: Hospital) -> None:
    hospital.ask(protocol.TRAIN, train_task(), update())
    reply = hospital.ask(protocol.EVALUATE, score_task(1, 0.5), scores(1, classes={"cell": 7}))
    assert "classes" not in reply.content
    with pytest.raises(errors.ProtocolError):
        protocol.decode_evaluation(scores(1, classes={"cell": 7}))


# -- a coordinator that went back --------------------------------------------------------------------------------------


@pytest.fixture
def guarded(hospital: Hospital) -> Callable[..., str]:
    """Sends a message of a recipe at site level with the length of the coordinator's log: "" or the refusal's word.

    ``run`` is the start of the coordinator that sends it. Every message is judged by terms that were just opened: what
    they know is what the audit log holds.
    """

    def send(kind: str, number: int, start: float, length: int, head: str = "", run: int = 1, **values: Any) -> str:
        noised = {"mechanism": "site-level", "clip": 1.0, "epsilon": 8.0, "delta": 1e-5}
        recipe = make_recipe(**{"privacy": noised, "aggregation": {"weighting": "uniform"}, **values})
        locked = build(recipe)
        hospital.rules = schema.parse(
            schema.PolicyConfig, tomllib.loads(policy.accepting(policy.Facts.of(locked)))["policy"], "policy"
        )
        if hospital.where.remember(locked):  # it trained in it, so that it scores what came of that
            about = {"fingerprint": SHA, "examples": 20, "seconds": 1.0, "norm": 1.0}
            hospital.where.audit.record("trained", recipe=recipe.hash, round=1, base=adapter(0.0).fingerprint, **about)
        state_folder.approve(hospital.where, locked)
        split = "val" if kind == protocol.EVALUATE else ""
        task = protocol.Task(recipe, number, None if kind == protocol.HANDSHAKE else adapter(start), split)
        internals.be_server_task(run)
        mark = hash_chain.Mark(length, head or f"{length:064x}") if length else None
        own = enforcement.HospitalTerms(hospital.where, lambda: hospital.rules, build)
        try:
            hospital.judge(kind, task, mark, own)
        except errors.LedgerError as refusal:
            return f"{hospital.entries()[-1]['reason']}: {refusal}"
        return ""

    return send


def test_a_round_whose_result_came_is_not_trained_for_again(guarded: Callable[..., str]) -> None:
    """A coordinator that was put back would draw its noise twice; the log it has grown again does not hide it."""
    assert guarded(protocol.TRAIN, 1, 0.0, 10) == ""
    assert guarded(protocol.TRAIN, 1, 0.0, 12) == "", "nothing came of it yet: asked again as after a lost reply"
    assert guarded(protocol.EVALUATE, 1, 1.0, 14) == ""
    said = guarded(protocol.TRAIN, 1, 0.0, 13)
    assert said.startswith("privacy-ledger: round 1: the coordinator went back, or a later message overtook this one")
    assert "whose result was sent here before, up to round 1" in said
    assert guarded(protocol.TRAIN, 2, 1.0, 16) == "", "a repetition that came late proves nothing"
    for number, length in ((1, 50), (2, 52), (3, 54)):
        said = guarded(protocol.TRAIN, number, number - 1.0, length)
        assert "it asked for round 1 at entry 50 of its log, and had drawn it by 14" in said
        assert "This recipe is over here: ask its people for another recipe" in said
    assert guarded(protocol.TRAIN, 1, 0.0, 61, seed=4) == "", "another recipe is another draw"
    assert guarded(protocol.TRAIN, 1, 0.0, 62, privacy={}) == ""


def test_a_coordinator_s_log_that_is_shorter_than_it_was(guarded: Callable[..., str]) -> None:
    assert guarded(protocol.TRAIN, 1, 0.0, 10) == ""
    assert guarded(protocol.EVALUATE, 1, 1.0, 14) == ""
    assert guarded(protocol.TRAIN, 2, 1.0, 16) == ""
    assert guarded(protocol.TRAIN, 2, 1.0, 15) == "", "a repetition of one message may come late"
    assert "its audit log has 0 entries, and had 16" in guarded(protocol.TRAIN, 3, 2.0, 0)
    assert guarded(protocol.EVALUATE, 1, 1.0, 13) == "", "nothing is drawn of scores"
    assert guarded(protocol.TRAIN, 1, 0.0, 3, privacy={}) == ""
    assert guarded(protocol.TRAIN, 3, 2.0, 17) == ""


def test_messages_that_overtake_each_other_prove_nothing(guarded: Callable[..., str]) -> None:
    """What may be honest is refused once at most: only then may a person be told that the recipe is over."""
    assert guarded(protocol.HANDSHAKE, 0, 0.0, 5) == ""
    assert guarded(protocol.HANDSHAKE, 0, 0.0, 14, run=2) == "", "started again"
    assert "or a later message overtook this one: its audit log has 10 entries, and had 14" in guarded(
        protocol.TRAIN, 1, 0.0, 10
    ), "of the run before"
    for length in (18, 16, 16, 20):
        assert guarded(protocol.TRAIN, 1, 0.0, length, run=2) == "", "asked again, and again"
    assert guarded(protocol.HANDSHAKE, 0, 0.0, 30, run=3) == ""
    assert guarded(protocol.EVALUATE, 1, 1.0, 24, run=2) == ""
    assert guarded(protocol.TRAIN, 2, 1.0, 32, run=3) == ""
    assert guarded(protocol.TRAIN, 2, 1.0, 31, run=3) == ""
    assert guarded(protocol.TRAIN, 3, 2.0, 40, run=4) == ""


BEFORE: list[tuple[str, int, int, int]] = [
    (protocol.HANDSHAKE, 0, 5, 1), (protocol.TRAIN, 1, 16, 1), (protocol.HANDSHAKE, 0, 20, 1)
]  # fmt: skip
"""What a site noted, to which the result of round 1 was not sent: kind, round, length of the log, run."""


@pytest.mark.parametrize(
    ("before", "back", "told"),
    [
        (BEFORE, (protocol.TRAIN, 1, 12, 2), "started anew with 12 entries in its audit log or less, and had 20"),
        (BEFORE[1:], (protocol.TRAIN, 1, 13, 2), "or a later message overtook this one"),
        (BEFORE[:2], (protocol.HANDSHAKE, 0, 13, 2), ""),
        (BEFORE[1:], (protocol.HANDSHAKE, 0, 13, 2), ""),
        (BEFORE[:1], (protocol.TRAIN, 1, 5, 2), "entry 5 of its audit log is another one than it was"),
        (BEFORE[1:2], (protocol.TRAIN, 2, 13, 2), "round 1 at entry 16 of its log, and had drawn it by 13"),
    ],
)
def test_a_coordinator_that_went_back_is_refused_for_good(
    guarded: Callable[..., str], before: list[Any], back: tuple[str, int, int, int], told: str
) -> None:
    """Its log grows with every try, over all that was noted of it; that was enough to be let in again."""
    for kind, number, length, run in before:
        assert guarded(kind, number, 0.0, length, run=run) == ""
    kind, number, length, run = back
    assert told in guarded(kind, number, 0.0, length, "cd" * 32, run)
    number = max(1, number)
    for run, length in ((2, 17), (2, 40), (3, 300)):
        said = guarded(protocol.TRAIN, number, 0.0, length, "ef" * 32, run)
        assert said.startswith(f"privacy-ledger: round {number}: the coordinator went back: "), length
        assert "This recipe is over here: ask its people for another recipe" in said
    assert guarded(protocol.EVALUATE, number, 1.0, 310, run=3) == "", "nothing is drawn of scores"
    assert guarded(protocol.TRAIN, 1, 0.0, 312, run=4, seed=4) == "", "another recipe begins after it"
    assert guarded(protocol.TRAIN, 2, 1.0, 320, run=4, seed=4) == ""


def test_a_refusal_that_leaves_is_recorded(hospital: Hospital) -> None:
    task = train_task(rounds=4)
    message = Message(content=protocol.encode_task(task), dst_node_id=5, message_type=protocol.TRAIN)
    gate.Gate(nobody, hospital.kept, hospital.terms, report)(message, CONTEXT)
    last = hospital.entries()[-1]
    assert (last["event"], last["kind"], last["reason"]) == ("sent", "refusal", "policy-rounds")


def test_recipes_without_end_fill_no_disk(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_folder, "MAX_SEEN", 3)
    words = [hospital.refused(protocol.HANDSHAKE, protocol.Task(make_recipe(seed=seed))) for seed in range(1, 5)]
    assert words == ["approval-pending", "approval-pending", "policy-message", "policy-message"]
    assert len(hospital.where.seen()) == 3


def test_the_real_builder(hospital: Hospital, tiny_dino: Path) -> None:
    """On the meta device with a real backbone: shapes from its config.json, the hash from the recipe."""
    asked = make_recipe(
        backbone={"name": str(tiny_dino), "sha256": SHA}, data={"class_names": ["a", "b"], "input_size": [56, 56]}
    )
    found = enforcement.built_here(asked)
    assert found.backbone_sha256 == SHA
    assert found.manifest.parameters > 1000
    assert enforcement.built_here(found.recipe).hash == found.recipe.hash, "a locked recipe locks to itself"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"personal": {"kind": "head-local"}}, "noise is added to what leaves alone"),
        ({"codec": "int8"}, "such numbers have no sum"),
        ({"min_sites": 2}, "a sum must be of 3 sites or more"),
    ],
)
def test_a_site_itself_refuses_what_would_make_its_ledger_untrue(more: dict[str, Any], said: str) -> None:
    """A coordinator that looks away locks such a recipe: one unit would change more than the noise is made for."""
    step = {"name": "sgd", "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}
    covered = {
        "backbone": {"name": "unet"},
        "adapter": {"kind": "full"},
        "data": {"class_names": ["a", "b"], "input_size": [32, 32]},
        "min_sites": 3,
        "aggregation": {"weighting": "uniform"},
        "secure_aggregation": {},
        "privacy": {"mechanism": "record-level-shared", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5},
        "optimiser": step,
    }
    assert enforcement.built_here(schema.parse(schema.Recipe, covered, "recipe")).manifest.parameters
    with pytest.raises(errors.ConfigError, match=said):
        enforcement.built_here(schema.parse(schema.Recipe, covered | more, "recipe"))


def test_a_recipe_that_leaves_values_open_is_refused(hospital: Hospital) -> None:
    """It would come to the same as the approved one under another hash, and count its rounds afresh."""
    hospital.terms = enforcement.HospitalTerms(hospital.where, lambda: hospital.rules, lambda _: build(make_recipe()))
    assert hospital.refused(protocol.TRAIN, train_task(adapter={"alpha": 8.0})) == "policy-message"


def test_behind_the_gate_nothing_unrecorded_leaves(hospital: Hospital, tmp_path: Path) -> None:
    """The gate with these terms: trained once, sent twice with the same bytes; a refusal travels as a word alone."""
    asked: list[str] = []

    def app(message: Message, context: Any) -> Message:
        asked.append(message.metadata.message_type)
        return Message(update(secret=1.0), reply_to=message)

    door = gate.Gate(app, reply_cache.Sent(tmp_path / "sent"), hospital.terms, lambda where, error: None)

    def ask(task: protocol.Task) -> Message:
        return door(Message(content=protocol.encode_task(task), dst_node_id=5, message_type=protocol.TRAIN), Any)  # type: ignore[arg-type]

    first, second = ask(train_task()), ask(train_task())
    assert len(asked) == 1
    assert protocol.digest(first.content) == protocol.digest(second.content), "the same bytes, but for the mark"
    assert {name: first.content[name] for name in ("fedvfm", "metrics", "adapter")} == {
        name: second.content[name] for name in second.content if name != "audit"
    }
    refused = ask(train_task(rounds=4))
    assert refused.has_error()
    assert (refused.error.code, protocol.error_word(refused)) == (1028, "policy-rounds")
    marks = [protocol.find_mark(reply) for reply in (first, second, refused)]
    entries = hospital.entries()
    for mark in marks:  # each covers the line of its own reply, and the later ones go on from there
        assert mark is not None
        assert (entries[mark.length - 1]["event"], entries[mark.length - 1]["hash"]) == ("sent", mark.head)
    assert [mark.length for mark in marks if mark] == [len(entries) - 7, len(entries) - 4, len(entries)]
    assert len(asked) == 1, "nothing was computed for it"
    events = [row["event"] for row in hospital.entries()[-11:]]
    assert events == [
        "received", "decided", "trained", "sent",
        "received", "decided", "sent",
        "received", "received", "decided", "sent",
    ]  # fmt: skip


def test_time_that_is_noted_counts_once(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that could not be kept was computed once, and counted in its own line and in that of the refusal."""
    now = [100.0]
    monkeypatch.setattr(steps.time, "monotonic", lambda: now[0])
    task = train_task()

    def app(message: Message, context: Any) -> Message:
        now[0] += 40.0
        return Message(update(), reply_to=message)

    class Full(reply_cache.Sent):
        def keep(self, *_: Any) -> None:
            now[0] += 2.0
            raise errors.StorageError("full")

    door = gate.Gate(app, Full(hospital.where.sent), hospital.terms, report)
    assert protocol.error_word(door(asked(protocol.TRAIN, task), CONTEXT)) == "storage"
    assert [entry["seconds"] for entry in hospital.entries()[-2:]] == [40.0, 2.0]
    assert audit.usage(hospital.entries(), task.recipe.hash).seconds == 42.0
