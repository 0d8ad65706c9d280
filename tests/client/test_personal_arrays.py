"""Arrays that stay at a site: what leaves, what is kept for the next round, and what SIGKILL leaves of it."""

from __future__ import annotations

import dataclasses
import os
import signal
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from fedvfm import errors
from fedvfm.client import app as client_app
from fedvfm.client.gate import enforcement, gate, held_adapters, reply_cache, steps
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.model import adapted_model
from fedvfm.protocol import protocol
from fedvfm.state import state
from tests.client import private_site, test_terms, two_numbers
from tests.privacy import test_private_training as drawn

CONTEXT = internals.context(1, 7, {})
POINTS = ("personal-proposed", "trained", "update-on-disk", "update-charged", "residual-settled")
ROUNDS = 5
SHARED, OWN = "block.w", "head.w"


@pytest.fixture(autouse=True)
def _be_server() -> None:
    internals.be_server_task(1)


def recipe() -> schema.Recipe:
    values = {"backbone": {"name": "none"}, "data": {"class_names": ["a", "b"]}, "personal": {"kind": "head-local"}}
    return schema.parse(schema.Recipe, values, "recipe")


def adapter(shared: float) -> state.AdapterState:
    return state.AdapterState({SHARED: np.full(2, shared, np.float32), OWN: np.zeros(3, np.float32)})


class Training:
    """Adds the round's number to what it keeps, and sends the sum as what is shared."""

    def __init__(self, kept: reply_cache.Sent) -> None:
        self.kept, self.rounds = kept, list[int]()

    def __call__(self, message: Message, context: Context) -> Message:
        task = protocol.decode_task(message.content, self.kept.adapters.find)
        assert task.state is not None
        self.rounds.append(task.round)
        own = self.kept.personal.before(task.recipe.hash, "north", task.round)
        trained = {OWN: own.get(OWN, np.zeros(3, np.float32)) + np.float32(task.round)}
        base = task.state.fingerprint
        self.kept.personal.propose(task.recipe.hash, "north", task.round, base, trained)
        shared = state.AdapterState({SHARED: task.state[SHARED] + trained[OWN][:2]})
        update = state.SiteUpdate("north", shared, 5, task.round - 1, base, metrics={"loss": 0.5})
        return Message(protocol.encode_update(update), reply_to=message)


class Site:
    """The gate of a site, as a restart finds it."""

    def __init__(self, folder: Path) -> None:
        self.kept = reply_cache.Sent(folder / "sent")
        self.app, self.faults = Training(self.kept), list[Exception]()
        self.door = gate.Gate(self.app, self.kept, gate.NoTerms(), lambda where, error: self.faults.append(error))

    def ask(self, number: int, start: state.AdapterState) -> Message:
        message = Message(protocol.encode_task(protocol.Task(recipe(), number, start)), 7, protocol.TRAIN, ttl=60.0)
        internals.set_message_id(message, "m1")
        return internals.copy(self.door(internals.copy(message), CONTEXT))

    def update(self, number: int, start: state.AdapterState) -> float:
        reply = self.ask(number, start)
        assert not reply.has_error(), self.faults
        return float(protocol.decode_update(reply.content, start).state[SHARED][0])

    def own(self, number: int) -> float:
        """What it keeps before a round."""
        kept = self.kept.personal.before(recipe().hash, "north", number)
        return float(kept[OWN][0]) if kept else 0.0


def killed(work: Any, point: str) -> bool:
    status = os.waitpid(private_site.child(work, FEDVFM_FAULT_POINT=point), 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_and_asked_again_a_site_goes_on_from_its_own(tmp_path: Path, point: str) -> None:
    for number in range(1, ROUNDS + 1):
        start = adapter(10.0 * number)
        assert killed(lambda number=number, start=start: Site(tmp_path).ask(number, start), point)
        site = Site(tmp_path)
        total = number * (number + 1) / 2
        assert site.update(number, start) == 10.0 * number + total
        assert site.app.rounds == ([] if point in POINTS[2:] else [number]), "what was kept is not trained again"
        assert Site(tmp_path).update(number, start) == 10.0 * number + total, "a third time, too"
        assert site.own(number + 1) == total
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert len([path for path in files if path.suffix == ".personal"]) == held_adapters.RESIDUALS_ON_DISK


@pytest.mark.parametrize("point", POINTS)
def test_an_update_that_never_left_moves_nothing(tmp_path: Path, point: str) -> None:
    """Killed in round 2 and not asked for it again: round 3 goes on from round 1, unless 2 was settled."""
    Site(tmp_path).update(1, adapter(0.0))
    assert killed(lambda: Site(tmp_path).ask(2, adapter(5.0)), point)
    assert Site(tmp_path).own(3) == (3.0 if point == "residual-settled" else 1.0)
    assert Site(tmp_path).update(3, adapter(0.0)) == (6.0 if point == "residual-settled" else 4.0)


def test_a_coordinator_that_went_back_finds_the_state_of_that_round(tmp_path: Path) -> None:
    site = Site(tmp_path)
    for number in range(1, 4):
        site.update(number, adapter(0.0))
    assert site.update(2, adapter(7.0)) == 7.0 + 1.0 + 2.0, "from another adapter, and from the site's own of round 1"
    assert site.own(4) == 3.0, "what round 3 trained is over"
    assert site.update(3, adapter(7.0)) == 7.0 + 6.0


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_was_let_go_is_said_and_not_begun_anew(tmp_path: Path, in_memory: bool) -> None:
    kept = held_adapters.PersonalArrays(None if in_memory else tmp_path, at_once=True)
    for number in range(3, 9):
        kept.propose("ab" * 32, "north", number, "cd" * 32, {OWN: np.full(3, number, np.float32)})
    assert float(kept.before("ab" * 32, "north", 9)[OWN][0]) == 8.0
    assert float(kept.before("ab" * 32, "north", 7)[OWN][0]) == 6.0
    with pytest.raises(errors.CheckpointError, match="were let go; the last 3 rounds are kept"):
        kept.before("ab" * 32, "north", 6)
    assert kept.before("ab" * 32, "south", 6) == {}


def test_before_its_first_round_a_site_has_first_values_whenever_that_is(tmp_path: Path) -> None:
    kept = held_adapters.PersonalArrays(tmp_path, at_once=True)
    kept.propose("ab" * 32, "north", 5, "cd" * 32, {OWN: np.ones(3, np.float32)})
    assert kept.before("ab" * 32, "north", 5) == {}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    kept = held_adapters.PersonalArrays(tmp_path, at_once=True)
    kept.propose("ab" * 32, "north", 1, "cd" * 32, {OWN: np.ones(3, np.float32)})
    next(tmp_path.glob("*.personal")).write_bytes(b"half")
    for number in (2, 1):  # also where what it says of rounds before it is all that is asked
        with pytest.raises(errors.CheckpointError, match="personal arrays are damaged"):
            kept.before("ab" * 32, "north", number)


# -- through the terms of a hospital -----------------------------------------------------------------------------------


def test_arrays_that_are_gone_stop_the_next_round(tmp_path: Path) -> None:
    hospital = test_terms.Hospital(tmp_path)
    asked = two_numbers.make_recipe(personal={"kind": "share-A"})
    terms = enforcement.HospitalTerms(hospital.where, lambda: hospital.rules, two_numbers.build)
    passing = gate.Gate(test_terms.nobody, hospital.kept, terms, test_terms.report).open(
        test_terms.asked(protocol.TRAIN, protocol.Task(asked, 2, two_numbers.adapter(1.0))), CONTEXT
    )
    passing.task = passing.envelope.task
    steps.personal_arrays(terms, passing)  # nothing was trained here
    about = {"base": two_numbers.adapter(0.0).fingerprint, "fingerprint": two_numbers.adapter(1.0).fingerprint}
    hospital.where.audit.record(
        "trained", recipe=asked.hash, round=1, numbers=2, examples=9, seconds=1.0, norm=1.0, **about
    )
    with pytest.raises(errors.CheckpointError, match="are gone, and this site trained in round 1"):
        steps.personal_arrays(terms, passing)
    hospital.kept.personal.propose(asked.hash, "north", 1, "cd" * 32, {OWN: np.ones(3, np.float32)})
    steps.personal_arrays(terms, passing)
    passing.task = dataclasses.replace(passing.task, round=3)
    steps.personal_arrays(terms, passing)  # round 2 went without this site
    (hospital.where.sent / f"{asked.hash}-000002-{'ef' * 16}.reply").touch()
    with pytest.raises(errors.CheckpointError, match="are gone, and this site trained in round 2"):
        steps.personal_arrays(terms, passing)
    hospital.kept.personal.propose(asked.hash, "north", 2, "cd" * 32, {OWN: np.ones(3, np.float32)})
    steps.personal_arrays(terms, passing)


def test_an_update_with_personal_arrays_does_not_pass_the_gate(tmp_path: Path) -> None:
    """Whatever app computes it."""
    hospital = test_terms.Hospital(tmp_path)
    rows = state.Manifest.of([*two_numbers.ROWS, state.ArraySpec("block.w", (2,), "full")])
    asked = two_numbers.make_recipe(personal={"kind": "head-local"})
    terms = enforcement.HospitalTerms(hospital.where, lambda: hospital.rules, two_numbers.build)
    terms._built[asked.hash] = two_numbers.build(asked).model_copy(update={"manifest": rows})
    task = protocol.Task(asked, 1, two_numbers.adapter(0.0))

    def careless(message: Message, context: Context) -> Message:
        return Message(test_terms.update(), reply_to=message)

    order = gate.Order((steps.read,), (steps.compute, steps.release), ())
    door = gate.Gate(careless, hospital.kept, terms, test_terms.report, order)
    passing = door.open(test_terms.asked(protocol.TRAIN, task), CONTEXT)
    door.judge(passing)
    with pytest.raises(errors.TrainingError, match="holds personal arrays, which never leave a site"):
        door.answer(passing)


# -- the real app ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["none", "record-level"])
@pytest.mark.parametrize("kind", ["head-local", "share-A"])
def test_nothing_personal_leaves_and_it_is_used_at_the_site(tiny_dino: Path, kind: str, mechanism: str) -> None:
    privacy = {"mechanism": "none"} if mechanism == "none" else drawn.PRIVACY
    asked = drawn.recipe(tiny_dino, privacy=privacy, personal={"kind": kind}, evaluation={"surface": False})
    hospital = drawn.Drawn(val=drawn.Drawn().train)
    site = sites.Site("north", hospital)
    app = client_app.make_client_app(lambda context: site)
    model = adapted_model.AdaptedModel(asked)
    asked, start = model.recipe, model.initial()

    def ask(what: str, number: int, split: str = "train") -> Message:
        message = Message(protocol.encode_task(protocol.Task(asked, number, start, split)), 7, what, ttl=600.0)
        internals.set_message_id(message, "m1")
        reply = app(message, CONTEXT)
        assert not reply.has_error(), reply.error
        return reply

    before = protocol.decode_evaluation(ask(protocol.EVALUATE, 0, "val").content, inside=True).metrics
    for number in (1, 2):
        reply = ask(protocol.TRAIN, number)
        update = protocol.decode_update(reply.content, start)
        assert set(update.state) == set(start) - model.personal
        assert update.base_fingerprint == start.fingerprint
        own = site.personal.before(asked.hash, "north", number + 1)
        assert set(own) == model.personal
        sent = internals.body(reply.content)
        for array in own.values():
            assert array.any()
            assert array.tobytes() not in sent
            assert array.tobytes()[:16] not in sent
    after = protocol.decode_evaluation(ask(protocol.EVALUATE, 2, "val").content, inside=True).metrics
    assert site.own(model, asked.hash, start, 3) != start
    # Few steps of B alone may change no pixel of a mask.
    assert kind == "share-A" or before != after, "the adapter that came is the same; what the site keeps is not"


def test_of_personal_arrays_too_one_image_moves_the_sum_by_at_most_the_clip(tiny_dino: Path) -> None:
    """Shared and personal are one vector to the mechanism: together they keep the clip, and so does what leaves."""
    import torch

    from fedvfm.privacy import dpsgd, events, randomness

    model = drawn.moved(drawn.recipe(tiny_dino, personal={"kind": "head-local"}))
    clip = model.recipe.privacy.clip
    assert clip is not None
    site = sites.Site("north", drawn.Drawn(loud={"000": 30.0}))
    units = [[sample] for sample in site.split("train")]
    what, event = drawn.work(model, site), events.event_of(model.recipe, len(units))
    assert event is not None
    with dpsgd.opened(what, model.recipe, event, randomness.System()) as opened:
        moved = opened.clipped(units, what.losses) - opened.clipped(units[1:], what.losses)
    own = torch.cat([
        torch.full((parameter.numel(),), name in model.personal)
        for group in model.trainable(1).values()
        for parameter in group
        for name in [next(key for key, value in model._parameters_by_name.items() if value is parameter)]
    ])  # fmt: skip
    assert own.numel() == moved.numel()
    assert 0 < int(own.sum()) < own.numel()
    assert float(torch.linalg.vector_norm(moved)) <= clip * (1 + 1e-4)
    assert float(torch.linalg.vector_norm(moved[~own])) < float(torch.linalg.vector_norm(moved))
