"""Kinds ``ditto`` and ``dual``: what a site trains beside the shared adapter, and that nothing of it leaves."""

from __future__ import annotations

import dataclasses
import logging
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from fedvfm import errors
from fedvfm.client import app as client_app
from fedvfm.client import recipe_review
from fedvfm.client.adoption import adoption, decisions
from fedvfm.client.batch import jobs
from fedvfm.client.gate import enforcement, gate, steps
from fedvfm.client.personal import choice, personalisation
from fedvfm.client.training import beside, trainer
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.model import adapted_model
from fedvfm.protocol import protocol
from fedvfm.simulation import personal, run_folder
from fedvfm.state import checkpoint, groups, state
from tests.client import test_terms, test_verdicts, two_numbers
from tests.privacy import test_private_training as drawn

CONTEXT = internals.context(1, 7, {})
OPTIONS = {"ditto": {}, "dual": {"options": {"personal": 3}}}


@pytest.fixture(autouse=True)
def _be_server() -> None:
    internals.be_server_task(1)


def recipe(folder: Path, kind: str, mechanism: str = "none", **more: Any) -> schema.Recipe:
    privacy = {"mechanism": "none"} if mechanism == "none" else {**drawn.PRIVACY, "mechanism": mechanism}
    own = {"personal": {"kind": kind}, "evaluation": {"surface": False}, "adapter": OPTIONS.get(kind, {}), **more}
    return adapted_model.AdaptedModel(drawn.recipe(folder, privacy=privacy, **own)).recipe


class Node:
    """A virtual hospital: its noise is drawn from the recipe's seed, so that two of them can be compared."""

    def __init__(self, asked: schema.Recipe) -> None:
        self.asked, self.model = asked, adapted_model.AdaptedModel(asked)
        self.site = sites.Site("north", drawn.Drawn(val=drawn.Drawn().train), simulated=True)
        self.app = client_app.make_client_app(lambda context: self.site)

    def ask(self, what: str, number: int, start: state.AdapterState, split: str = "train") -> Message:
        message = Message(protocol.encode_task(protocol.Task(self.asked, number, start, split)), 7, what, ttl=600.0)
        internals.set_message_id(message, "m1")
        reply = self.app(message, CONTEXT)
        assert not reply.has_error(), reply.error
        return reply

    def rounds(self) -> tuple[list[bytes], list[dict[str, Any]]]:
        """Two rounds from what the site itself sent: the bytes of its updates, and its scores."""
        adapter, sent, scores = self.model.initial(), [], []
        for number in (1, 2):
            reply = self.ask(protocol.TRAIN, number, adapter)
            update = protocol.decode_update(reply.content, adapter)
            sent.append(b"".join(update.state[name].tobytes() for name in sorted(update.state)))
            own = self.site.personal.before(self.asked.hash, "north", number + 1)
            for array in own.values():
                assert array.tobytes() not in internals.body(reply.content)
            adapter = state.AdapterState({**adapter, **update.state})
            answer = protocol.decode_evaluation(
                self.ask(protocol.EVALUATE, number, adapter, "val").content, inside=True
            )
            scores.append(dict(answer.metrics))
        return sent, scores


@pytest.mark.parametrize("mechanism", ["none", "record-level"])
def test_what_leaves_is_to_the_bit_what_leaves_without_it(tiny_dino: Path, mechanism: str) -> None:
    """So it has the guarantee that it has without it, whatever is trained beside it; and scores are of it alone."""
    plain = Node(recipe(tiny_dino, "none", mechanism)).rounds()
    for kind in groups.BESIDE:
        node = Node(recipe(tiny_dino, kind, mechanism))
        assert node.rounds() == plain
        first, second = (node.site.personal.before(node.asked.hash, "north", number) for number in (2, 3))
        assert set(first) == set(second) == groups.kept(node.model.manifest, kind)
        assert any((first[name] != second[name]).any() for name in first), "it goes on from what it had"


def test_ditto_is_the_global_steps_with_a_pull_to_the_adapter_of_the_round(tiny_dino: Path) -> None:
    """Without a pull, and from the same adapter, it is the update itself; with a strong one it stays near."""
    site = sites.Site("north", drawn.Drawn())

    def trained(pull: float, own: float) -> tuple[state.AdapterState, state.AdapterState]:
        personal = {"kind": "ditto", "proximal": pull}
        model = adapted_model.AdaptedModel(recipe(tiny_dino, "none").model_copy(
            update={"personal": schema.RecipePersonal(**personal)}  # type: ignore[arg-type]
        ))  # fmt: skip
        shared = model.initial()
        start = state.AdapterState({name: array + np.float32(own) for name, array in shared.items()})
        return beside.train(model, site, shared, start, 1), shared

    plain = adapted_model.AdaptedModel(recipe(tiny_dino, "none"))
    assert trained(0.0, 0.0)[0] == trainer.train(plain, site, plain.initial(), 1).state
    (loose, shared), (near, _) = trained(0.0, 0.05), trained(30.0, 0.05)
    assert (near - shared).norm() < 0.9 * (loose - shared).norm()


def test_dual_trains_its_own_pairs_alone_on_the_sum_of_both(tiny_dino: Path) -> None:
    asked = recipe(tiny_dino, "dual")
    model, site = adapted_model.AdaptedModel(asked), sites.Site("north", drawn.Drawn())
    shared = model.initial()
    names = {spec.name for spec in model.manifest if spec.group == "own"}
    assert names == model.personal
    assert not names & set(model.trained(1))
    own = beside.train(model, site, shared, shared, 1)
    assert set(own) == names
    assert all((own[name] != shared[name]).any() for name in names)
    moved = state.AdapterState({**shared, **{name: array + np.float32(0.05) for name, array in shared.items()}})
    other = beside.train(model, site, moved, state.AdapterState({**moved, **own}), 2)
    alone = beside.train(model, site, shared, state.AdapterState({**shared, **own}), 2)
    assert other != alone, "its loss is of the sum with the global adapter"


@pytest.mark.parametrize("mechanism", ["none", "record-level"])
def test_an_update_leaves_where_what_stays_failed(
    mechanism: str, tiny_dino: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise errors.TrainingError("the loss is nan")

    monkeypatch.setattr(beside.trainer, "train", fails)
    site = sites.Site("north", drawn.Drawn())
    model = adapted_model.AdaptedModel(recipe(tiny_dino, "ditto", mechanism))
    shared = model.initial()
    with caplog.at_level(logging.WARNING):
        assert beside.train(model, site, shared, shared, 1) == shared
    assert "round 1: what stays here is as it was: the loss is nan" in caplog.text


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_the_personal_adapter_in_place_of_the_update_does_not_pass_the_gate(tmp_path: Path, codec: str) -> None:
    """It has the same names, so it is known by its numbers; whatever app computes it, and however they are coded."""
    hospital = test_terms.Hospital(tmp_path)
    asked = two_numbers.make_recipe(personal={"kind": "ditto"}, codec=codec)
    terms = enforcement.HospitalTerms(hospital.where, lambda: hospital.rules, two_numbers.build)
    start, kept, name = two_numbers.adapter(0.0), hospital.kept.personal, hospital.where.about.site
    task, update = protocol.Task(asked, 2, start), protocol.decode_update(test_terms.update(2), start)
    before = {key: array + np.float32(0.013) for key, array in start.items()}
    order = gate.Order((steps.read,), (steps.compute, steps.release), ())
    app_s = sites.Site(name, drawn.Drawn(), residuals=hospital.kept.residuals)
    hospital.kept.residuals.propose(asked.hash, name, 1, "cd" * 32, before)
    hospital.kept.residuals.settle(asked.hash, 1, "cd" * 32)

    def careless(message: Message, context: Context) -> Message:
        return Message(client_app._encoded(app_s, task, start, update), reply_to=message)

    def answered() -> None:
        door = gate.Gate(careless, hospital.kept, terms, test_terms.report, order)
        passing = door.open(test_terms.asked(protocol.TRAIN, task), CONTEXT)
        door.judge(passing)
        door.answer(passing)

    kept.propose(asked.hash, name, 2, start.fingerprint, dict(update.state))
    answered()  # its first round: both begin as one adapter, and may be equal when trained
    kept.propose(asked.hash, name, 1, "cd" * 32, dict(start))
    kept.settle(asked.hash, 1, "cd" * 32)
    answered()  # so they do where no other site sent anything in the round before
    kept.propose(asked.hash, name, 1, "cd" * 32, before)
    kept.settle(asked.hash, 1, "cd" * 32)
    kept.propose(asked.hash, name, 2, start.fingerprint, {key: a + np.float32(1) for key, a in update.state.items()})
    answered()
    kept.propose(asked.hash, name, 2, start.fingerprint, dict(update.state))
    with pytest.raises(errors.TrainingError, match="is this site's personal adapter, which never leaves"):
        answered()


def test_a_review_says_how_long_it_takes_and_what_stays(tiny_dino: Path) -> None:
    locked = adapted_model.AdaptedModel(recipe(tiny_dino, "dual", "record-level"), with_weights=False).locked()
    words = dict(recipe_review.words(locked))
    assert any("and as long again for what stays here, " in value for value in words.values())
    assert "a second pair beside every pair stays at each site and never leaves it, trained without noise" in str(words)
    own = groups.personal_numbers(locked.manifest, locked.recipe)
    assert f"{own:,} more train and never leave this site" in words["leaves each round"]


@pytest.mark.parametrize(("kind", "bare"), [("head-local", False), ("ditto", True), ("dual", True)])
def test_a_statement_says_of_it_that_it_is_not_private(kind: str, bare: bool) -> None:
    """Steps of a site's mechanism train the arrays of ``head-local`` too; none trains what is beside."""
    asked = two_numbers.make_recipe(personal={"kind": kind}, privacy=drawn.PRIVACY)
    nobody: Any = None
    work = personalisation._Work(nobody, nobody, asked, nobody, nobody, 0.0, nobody)
    assert work._bare(choice.PARTIAL) == bare
    assert work._bare(choice.PERSONAL)
    assert not work._bare(choice.GLOBAL)


@pytest.mark.parametrize(
    ("kind", "mechanism", "bare"),
    [("ditto", "record-level", True), ("head-local", "record-level", False), ("head-local", "site-level", True)],
)
def test_no_card_of_what_stays_claims_a_guarantee_that_it_has_not(
    tiny_dino: Path, tmp_path: Path, kind: str, mechanism: str, bare: bool
) -> None:
    """Neither a simulation's ``sites/NAME`` nor a hospital's folder, where its arrays are in the adapter itself."""
    model = adapted_model.AdaptedModel(recipe(tiny_dino, kind, mechanism))
    first, site = model.initial(), sites.Site("north", drawn.Drawn())
    checkpoint.write(tmp_path / "adapter.safetensors", first, {})
    job: Any = types.SimpleNamespace(name="trial", locked=model.locked(), folder=tmp_path)
    built: Any = types.SimpleNamespace(get=lambda *_: model)
    personal.write_sites(run_folder.RunFolder(tmp_path), job, [site], built)
    folders = [tmp_path / "sites" / "north"]
    if kind not in groups.BESIDE:
        where = test_verdicts.where.__wrapped__(tmp_path)  # type: ignore[attr-defined]
        found = test_verdicts.verdict(model.recipe.hash, first.fingerprint)
        model.write(first)
        adoption.Finals(where, lambda: pytest.fail("not asked"))._keep(model, found, first, None)
        folders.append(decisions.place(where, found))
    for folder in folders:
        card = (folder / "README.md").read_text()
        assert (f"- differential privacy: {mechanism}, delta" in card) != bare
        assert ("- differential privacy: none" in card) == (groups.BARE in card) == bare
        assert ("these are first values" in card) == (kind != "ditto")
    assert model.recipe.privacy.mechanism == mechanism


def test_no_batch_job_trains_it(tiny_dino: Path) -> None:
    asked = recipe(tiny_dino, "ditto")
    site = sites.Site("north", drawn.Drawn())
    there = jobs.Jobs(lambda: pytest.fail("no job is made"))
    with pytest.raises(errors.JobError, match=r"'ditto': is not trained in batch jobs\. Take \[batch\] out"):
        there.hello(site, protocol.Task(asked))
    start = adapted_model.AdaptedModel(asked).initial()
    with pytest.raises(errors.JobError, match="is not trained in batch jobs"):
        there.beside(site, dataclasses.replace(protocol.Task(asked), state=start, round=1), start, 1.0)
