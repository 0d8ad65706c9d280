"""What a hospital does at its own end, with the real commands, gate, terms and ClientApp on real files."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Message

import fedvfm
from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.client import app as client_app
from fedvfm.client import purge, site_file
from fedvfm.client import state_folder as joining
from fedvfm.client.adoption import adoption, decisions
from fedvfm.client.gate import enforcement, gate, lineage, policy, reply_cache
from fedvfm.client.process import supervisor
from fedvfm.flower import internals
from fedvfm.model import locking
from fedvfm.protocol import protocol
from fedvfm.runtime import processes
from fedvfm.server import state_folder as enrolment
from fedvfm.state import factors, state
from fedvfm.trust import locked_recipe, recipes

CONFIG, IN_USE, TRUST, POLICY = 2, 6, 12, 13
RULES = 'accept = "ask"                   # a person looks at the score and decides'


@pytest.fixture(scope="module")
def locked(tiny: Any) -> locked_recipe.LockedRecipe:
    return locking.make(recipes.written(tiny.experiment))


@dataclass
class Hospital:
    """A site that joined, its own file, and messages as a coordinator sends them."""

    folder: Path
    tiny: Any
    lock: locked_recipe.LockedRecipe
    where: joining.State
    door: gate.Gate | None = None

    @property
    def initial(self) -> state.AdapterState:
        return self.lock.adapter

    @property
    def settings(self) -> Path:
        return self.folder / "site.toml"

    @property
    def state(self) -> Path:
        return self.where.folder

    def write(self, final_rules: str = RULES, min_units: int = 1, **changes: str) -> None:
        """The site's file; ``changes`` replace whole lines of the policy by their key, or add them."""
        text = policy.accepting(policy.Facts.of(self.lock))
        text = text.replace("min_train_units = 10", "min_train_units = 1")
        text = text.replace("min_units = 10", f"min_units = {min_units}").replace(RULES, final_rules)
        for key, value in changes.items():
            lines = [line for line in text.splitlines() if not line.startswith(f"{key} =")]
            lines.insert(lines.index("[policy]") + 1, f"{key} = {value}")
            text = "\n".join(lines) + "\n"
        self.settings.write_text(self.tiny.site("east") + text)

    def open(self) -> None:
        """What the executor sets up."""
        mine = enforcement.SiteTerms(self.where, self.settings, "cpu")
        app = client_app.make_client_app(
            mine.site,
            client_app.Models(),
            lambda at, error: None,
            adoption.Finals(self.where, lambda: mine.config.policy),
        )
        self.door = gate.Gate(app, reply_cache.Sent(self.where.sent), mine, lambda at, error: None)

    def ask(self, kind: str, task: protocol.Task, ttl: float = 600.0) -> Message:
        if self.door is None:
            self.open()
        assert self.door is not None
        internals.be_server_task(1)
        message = Message(protocol.encode_task(task), 1, kind, ttl=ttl)
        internals.set_message_id(message, "m1")
        return internals.copy(self.door(internals.copy(message), internals.context(1, 1, {})))

    def train(self, number: int = 1) -> Message:
        return self.ask(protocol.TRAIN, protocol.Task(self.lock.recipe, number, self.initial))

    def finish(self, adapter: state.AdapterState) -> str:
        """What the site says of a final adapter."""
        reply = self.answer(adapter)
        assert not reply.has_error(), reply.error
        return protocol.decode_evaluation(reply.content).acceptance

    def answer(self, adapter: state.AdapterState) -> Message:
        """The reply to a final adapter."""
        task = protocol.Task(self.lock.recipe, self.lock.recipe.rounds, adapter, "test", final=True)
        return self.ask(protocol.EVALUATE, task)

    def decided(self) -> list[dict[str, Any]]:
        return [row for row in self.where.audit.entries if row.get("kind") == "final"]


@pytest.fixture
def hospital(tiny: Any, locked: locked_recipe.LockedRecipe, tmp_path: Path) -> Hospital:
    return joined(tiny, locked, tmp_path)


@pytest.fixture
def alternating(tiny: Any, tmp_path: Path) -> Hospital:
    """A hospital of a federation that trains one factor at a time."""
    chosen = recipes.written(tiny.experiment)
    adapter = chosen.adapter.model_copy(update={"factors": "alternate"})
    return joined(tiny, locking.make(chosen.model_copy(update={"adapter": adapter})), tmp_path)


@pytest.fixture
def freezing(tiny: Any, tmp_path: Path) -> Hospital:
    """A hospital of a federation whose first block is frozen; its own file leaves the cache no memory."""
    chosen = recipes.written(tiny.experiment)
    changed = {
        "adapter": chosen.adapter.model_copy(update={"layers": (1,)}),
        "data": chosen.data.model_copy(update={"views": 1}),
    }
    made = joined(tiny, locking.make(chosen.model_copy(update=changed)), tmp_path)
    made.settings.write_text("cache_mib = 0\n" + made.settings.read_text())
    return made


def joined(tiny: Any, locked: locked_recipe.LockedRecipe, tmp_path: Path) -> Hospital:
    plan = enrolment.Plan("trial", "127.0.0.1:9", (), ("east",))
    server = enrolment.init(tmp_path / "server", plan, locked)
    invite = joining.read_invite(server.invite_path("east"), server.fingerprint())
    made = Hospital(tmp_path, tiny, locked, joining.join(tmp_path / "east", invite, locked.hash))
    made.write()
    return made


@pytest.fixture
def cli(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> Any:
    """The command line in this process, where the network is closed and nobody types anything unless told."""
    for key in ("HF_HUB_OFFLINE", "FEDVFM_CACHE", "COLUMNS"):
        monkeypatch.setenv(key, tiny.environment()[key])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing may be sent")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return cli


# -- rehearse ----------------------------------------------------------------------------------------------------------


def test_a_rehearsal_lists_every_byte_and_uses_nothing_up(hospital: Hospital, cli: Any, tmp_path: Path) -> None:
    hospital.write(metrics='["loss", "steps", "dice"]', min_units=2)
    refused = cli("client", "rehearse", hospital.settings, "--state", hospital.state)
    assert refused.code == POLICY
    assert "REFUSES  metrics" in refused.err

    hospital.write(min_units=2, hours="[]", time_zone='"UTC"')
    before = hospital.where.audit.entries
    answer = cli("client", "rehearse", hospital.settings, "--state", hospital.state, "--save", "out.json", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert stat.S_IMODE((tmp_path / "out.json").stat().st_mode) == 0o600
    handshake, update, validation, test = found["replies"]
    assert (handshake["numbers"]["metrics.train"], handshake["header"]["fedvfm.site"]) == (5, "east")
    assert {one["name"]: tuple(one["shape"]) for one in update["arrays"]} == {
        spec.name: spec.shape for spec in hospital.lock.manifest
    }
    assert sum(one["bytes"] for one in update["arrays"]) == hospital.lock.manifest.nbytes
    assert hospital.lock.manifest.nbytes < update["array_bytes"] < update["bytes"]
    assert set(update["numbers"]) == {"metrics.num_examples", "metrics.loss", "metrics.seconds", "metrics.steps"}
    assert validation["withheld"] == ["dice", "iou"], "from a single sample nothing leaves"
    assert set(validation["numbers"]) == {"metrics.num_examples"}
    assert test["withheld"] == []
    assert set(test["numbers"]) == {"metrics.num_examples", "metrics.dice", "metrics.iou"}
    assert test["header"]["fedvfm.acceptance"] == "pending"
    assert found["bytes"] == sum(reply["bytes"] for reply in found["replies"])
    assert (found["approved"], found["open_now"]) == (True, False)
    assert found["peak_mib"] > 100

    after = hospital.where.audit.entries[len(before) :]
    assert [row["event"] for row in after] == ["rehearsed"]
    assert after[0]["bytes"] == found["bytes"]
    assert audit.usage(hospital.where.audit.entries, hospital.lock.hash) == audit.Usage()
    assert not hospital.where.sent.exists()
    assert not (hospital.state / decisions.FOLDER).exists()
    assert not list(hospital.state.glob(f"{joining.REHEARSAL}*"))

    again = cli("client", "rehearse", hospital.settings, "--state", hospital.state, "--save", "out.json")
    assert again.code == IN_USE
    assert "exists and is left as it is" in again.err


def test_a_rehearsal_before_joining_in_words(hospital: Hospital, cli: Any, tiny: Any, tmp_path: Path) -> None:
    nowhere = ("--state", tmp_path / "nowhere")
    unnamed = cli("client", "rehearse", hospital.settings, *nowhere)
    assert unnamed.code == CONFIG
    assert "which recipe?" in unnamed.err
    answer = cli("client", "rehearse", hospital.settings, "--recipe", tiny.experiment, *nowhere)
    assert answer.code == 0, answer.err
    for words in (
        "nothing was sent",
        "update, every round:",
        "float32 2 x 32, 256 bytes",
        "metrics.num_examples",
        "acceptance",
        "total: ",
    ):
        assert words in answer.out, answer.out
    assert "approve" not in answer.out
    assert not (tmp_path / "nowhere").exists()


def test_a_rehearsal_shows_the_site_what_is_wrong_with_its_data(hospital: Hospital, cli: Any) -> None:
    text = hospital.settings.read_text()
    hospital.settings.write_text(text.replace(str(hospital.tiny.data), "/no/such/folder"))
    answer = cli("client", "rehearse", hospital.settings, "--state", hospital.state)
    assert answer.code != 0
    assert "/no/such/folder" in answer.err
    hospital.settings.write_text(text.replace('name = "east"', 'name = "west"'))
    other = cli("client", "rehearse", hospital.settings, "--state", hospital.state)
    assert other.code == CONFIG
    assert "this site joined as 'east'" in other.err


def test_a_rehearsal_of_one_factor_lists_that_one_and_tests_the_whole(alternating: Hospital, cli: Any) -> None:
    answer = cli("client", "rehearse", alternating.settings, "--state", alternating.state, "--json")
    assert answer.code == 0, answer.err
    _, update, _, test = json.loads(answer.out)["replies"]
    assert update["kind"] == "update, every odd round; even ones send A for B"
    rows = {spec.name: spec for spec in alternating.lock.manifest}
    names = [one["name"] for one in update["arrays"]]
    assert names == [name for name, spec in rows.items() if spec.role != "A"]
    assert sum(one["bytes"] for one in update["arrays"]) == sum(4 * rows[name].size for name in names)
    assert {"metrics.dice", "metrics.iou"} < set(test["numbers"])


# -- the final adapter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent_last", "known"), [(3, True), (2, False)])
def test_the_own_update_of_one_factor_is_scored_as_the_whole_it_was(
    alternating: Hospital, sent_last: int, known: bool
) -> None:
    """After round 2 the other factor moved too, so that nobody here knows the whole of what was sent then."""
    alternating.write('accept = "score"\nmax_drop = 1.0')
    update = protocol.decode_update(alternating.train(sent_last).content)
    assert len(update.state) < len(alternating.lock.manifest)
    final_one = factors.completed(update.state, alternating.initial)
    assert alternating.finish(final_one) == ("accepted" if known else "declined")
    (line,) = alternating.decided()
    assert line["fingerprint"] == final_one.fingerprint
    assert [found.own == found.score for found, _ in decisions.kept(alternating.where)] == [known]


def test_the_final_adapter_is_scored_kept_and_loadable(hospital: Hospital, cli: Any) -> None:
    hospital.write('accept = "score"\nmax_drop = 1.0\nmin_score = 0.0')
    update = protocol.decode_update(hospital.train().content)
    assert hospital.finish(update.state) == "accepted"
    ((found, folder),) = decisions.kept(hospital.where)
    assert (found.verdict, found.reason, found.metric, found.examples) == ("accepted", "max-drop", "dice", 2)
    assert found.score == found.own, "the final one is the site's own here"
    (line,) = hospital.decided()
    assert (line["verdict"], line["fingerprint"]) == ("accepted", update.state.fingerprint)
    assert line["score"] == pytest.approx(found.score, abs=1e-6)

    model = fedvfm.load_adapter(folder)
    assert model.read().fingerprint == update.state.fingerprint
    assert "accepted (max-drop): dice" in (folder / "README.md").read_text()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    shown = cli("client", "adapter", hospital.state)
    assert f"adapter {found.fingerprint[:12]}" in shown.out
    assert str(folder) in shown.out
    assert json.loads(cli("client", "status", "--state", hospital.state, "--json").out)["adapters"][0]["folder"] == str(
        folder
    )

    # The policy is tightened while the client runs: what was accepted goes.
    hospital.write('accept = "score"\nmin_score = 1.0')
    assert hospital.finish(update.state) == "declined"
    assert [path.name for path in folder.iterdir()] == [decisions.VERDICT]
    assert hospital.decided()[-1]["reason"] == "min-score"
    with pytest.raises(errors.CheckpointError):
        fedvfm.load_adapter(folder)


def test_a_person_decides(hospital: Hospital, cli: Any) -> None:
    assert hospital.finish(hospital.initial) == "pending"
    name = hospital.initial.fingerprint[:12]
    assert f"--accept {name}" in cli("client", "adapter", hospital.state).out
    short = cli("client", "adapter", hospital.state, "--accept", name[:5])
    assert short.code == TRUST
    assert f"waiting: {name}" in short.err
    assert cli("client", "adapter", hospital.state, "--accept", name, "--decline", name).code == CONFIG
    rows = json.loads(cli("client", "adapter", hospital.state, "--accept", name, "--json").out)["adapters"]
    assert (rows[0]["verdict"], rows[0]["reason"]) == ("accepted", "person")
    before = len(hospital.decided())
    assert hospital.finish(hospital.initial) == "accepted", "who decided once is not asked again"
    assert len(hospital.decided()) == before


def test_one_final_adapter_is_tested_and_no_other(hospital: Hospital) -> None:
    update = protocol.decode_update(hospital.train().content)
    assert hospital.finish(update.state) == "pending"
    scores = protocol.decode_evaluation(hospital.answer(update.state).content).metrics
    text = hospital.settings.read_text()
    hospital.settings.write_text(text + "[split]\ntest_share = 0.6\nval_share = 0.1\n")
    assert protocol.error_word(hospital.answer(update.state)) == "policy-split"
    hospital.settings.write_text(text)
    assert protocol.decode_evaluation(hospital.answer(update.state).content).metrics == scores
    for other in (hospital.initial, update.state * 1.001, update.state * 10.0):
        assert protocol.error_word(hospital.answer(other)) == "policy-evaluations"
    line = [row for row in hospital.where.audit.entries if row["event"] == "decided"][-1]
    assert (line["verdict"], line["reason"]) == ("refused", "policy-evaluations")


def test_final_adapters_without_end_fill_no_disk(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over many recipes: of one only one final adapter is taken."""
    monkeypatch.setattr(decisions, "MAX_KEPT", 1)
    monkeypatch.setattr(policy, "_require_unanswered", lambda *_: None)
    monkeypatch.setattr(lineage.Lineage, "require", lambda *_: None)
    hospital.write('accept = "always"')
    other = state.AdapterState({key: value + 1 for key, value in hospital.initial.items()})
    assert [hospital.finish(one) for one in (hospital.initial, other, hospital.initial)] == [
        "accepted",
        "declined",
        "accepted",
    ]
    assert hospital.decided()[1]["reason"] == "too-many"
    assert len(list((hospital.state / decisions.FOLDER).iterdir())) == 1


def test_notes_as_lines_of_json(hospital: Hospital, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(where: joining.State, settings: Path, **more: Any) -> None:
        supervisor.LOG.info(f"site {where.about.site}: waiting")
        supervisor.LOG.warning("two\nlines \x1b[2J")

    monkeypatch.setattr(supervisor, "start", start)
    plain = cli("client", "start", hospital.settings, "--state", hospital.state)
    assert (plain.out, plain.err) == ("", "site east: waiting\ntwo\nlines \\x1b[2J\n")
    found = cli("client", "start", hospital.settings, "--state", hospital.state, "--json")
    lines = [json.loads(line) for line in found.out.splitlines()]
    assert [line["text"] for line in lines] == ["site east: waiting", "two\nlines \x1b[2J"]
    assert [line["level"] for line in lines] == ["info", "warning"]
    assert {line["logger"] for line in lines} == {"fedvfm.client.process.supervisor"}
    assert all(line["time"].endswith("Z") for line in lines)
    assert found.err == ""


def test_a_damaged_verdict_is_shown(hospital: Hospital, cli: Any) -> None:
    folder = hospital.state / decisions.FOLDER / "x"
    folder.mkdir(parents=True)
    (folder / decisions.VERDICT).write_text("{")
    for words in (("adapter", hospital.state), ("status", "--state", hospital.state)):
        assert f"{folder / decisions.VERDICT}: is no strict JSON" in cli("client", *words).out
        assert len(json.loads(cli("client", *words, "--json").out)["damaged"]) == 1


@pytest.mark.parametrize(
    ("rules", "score", "own", "word", "reason"),
    [
        ({}, 0.9, None, "declined", "policy"),
        ({"accept": "always"}, None, None, "accepted", "policy"),
        ({"accept": "ask"}, 0.9, None, "pending", "policy"),
        ({"accept": "score", "min_score": 0.5}, 0.5, None, "accepted", "min-score"),
        ({"accept": "score", "min_score": 0.5}, 0.49, 0.1, "declined", "min-score"),
        ({"accept": "score", "min_score": 0.0}, None, 0.1, "declined", "no-test-samples"),
        ({"accept": "score", "max_drop": 0.1}, 0.5, None, "declined", "no-own-update"),
        ({"accept": "score", "max_drop": 0.125}, 0.5, 0.625, "accepted", "max-drop"),
        ({"accept": "score", "max_drop": 0.1}, 0.5, 0.625, "declined", "max-drop"),
        ({"accept": "score", "max_drop": 0.0}, 0.7, 0.6, "accepted", "max-drop"),
        ({"accept": "score", "max_drop": 0.5, "min_score": 0.6}, 0.5, 0.6, "declined", "min-score"),
    ],
)
def test_every_rule_for_the_final_adapter(
    rules: dict[str, Any], score: float | None, own: float | None, word: str, reason: str
) -> None:
    from fedvfm.config import policy as site_policy
    from fedvfm.config import schema

    made = schema.parse(site_policy.FinalPolicy, rules, "final")
    assert decisions.judge(made, score, lambda: own)[:2] == (word, reason)
    assert word in protocol.ACCEPTANCE


# -- hours -------------------------------------------------------------------------------------------------------------


def test_a_site_outside_its_hours_says_so_and_no_more(hospital: Hospital) -> None:
    hospital.write(hours="[]", time_zone='"Europe/Berlin"')
    hello = hospital.ask(protocol.HANDSHAKE, protocol.Task(hospital.lock.recipe))
    assert protocol.error_word(hello) == "policy-closed", "it is counted on when it opens"
    assert protocol.error_word(hospital.train()) == "policy-closed"
    decided = [row for row in hospital.where.audit.entries if row["event"] == "decided"][-1]
    assert (decided["verdict"], decided["reason"]) == ("refused", "policy-closed")
    hospital.write(hours='["daily 00:00-24:00"]', time_zone='"Europe/Berlin"')
    assert not hospital.train().has_error()
    hospital.write(hours="[]", time_zone='"Europe/Berlin"')
    assert not hospital.train().has_error(), "what was trained is sent again at any hour"


def test_used_up_hours_end_a_round_under_way_and_are_counted(hospital: Hospital) -> None:
    hospital.write(max_hours="0.000003")  # a hundredth of a second
    assert protocol.error_word(hospital.train()) == "policy-hours"
    trained = [row for row in hospital.where.audit.entries if row["event"] == "trained"]
    last = hospital.where.audit.entries[-1]
    assert (trained, last["event"], last["reason"]) == ([], "sent", "policy-hours")
    assert last["seconds"] > 0.01
    assert protocol.error_word(hospital.train()) == "policy-hours"
    decided = [row for row in hospital.where.audit.entries if row["event"] == "decided"][-1]
    assert decided["verdict"] == "refused", "before anything is computed"


def test_an_evaluation_ends_with_the_life_of_its_message_as_training_does(hospital: Hospital) -> None:
    recipe = hospital.lock.recipe
    test = protocol.Task(recipe, recipe.rounds, hospital.initial, "test", final=True)
    assert protocol.error_word(hospital.ask(protocol.TRAIN, protocol.Task(recipe, 1, hospital.initial), 1e-6)) == (
        "deadline"
    )
    assert protocol.error_word(hospital.ask(protocol.EVALUATE, test, 1e-6)) == "deadline"
    assert not [row for row in hospital.where.audit.entries if row["event"] in ("trained", "evaluated")]
    assert hospital.decided() == [], "nothing was scored"
    hospital.write(max_hours="0.000003")
    assert protocol.error_word(hospital.ask(protocol.EVALUATE, test)) == "policy-hours", "its own terms end it too"


def test_the_deadline_holds_for_scoring_the_own_update_too(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedvfm.client.training import evaluator

    seen: list[float] = []
    real = evaluator.evaluate

    def listening(*arguments: Any) -> protocol.Evaluation:
        seen.append(arguments[4])
        return real(*arguments)

    hospital.write('accept = "score"\nmax_drop = 1.0')
    update = protocol.decode_update(hospital.train().content)
    monkeypatch.setattr(evaluator, "evaluate", listening)
    assert hospital.finish(update.state) == "accepted"
    assert len(seen) == 2
    assert seen[0] == seen[1] < float("inf")


def test_an_adapter_of_another_shape_is_refused_by_its_own_word(hospital: Hospital) -> None:
    wrong = state.AdapterState({key: value[..., :1] for key, value in hospital.initial.items()})
    recipe = hospital.lock.recipe
    for kind, task in (
        (protocol.TRAIN, protocol.Task(recipe, 1, wrong)),
        (protocol.EVALUATE, protocol.Task(recipe, 1, wrong, "val")),
    ):
        assert protocol.error_word(hospital.ask(kind, task)) == "adapter"


def test_a_kept_update_leaves_on_the_terms_of_now(hospital: Hospital) -> None:
    first, same = hospital.train(), hospital.train()
    assert protocol.digest(first.content) == protocol.digest(same.content)
    assert "loss" in protocol.decode_update(first.content).metrics
    hospital.write(min_units=1000)
    update = protocol.decode_update(hospital.train().content)
    assert update.metrics == {}
    assert update.state.fingerprint == protocol.decode_update(first.content).state.fingerprint
    assert [row["event"] for row in hospital.where.audit.entries].count("trained") == 1


def test_a_site_that_demands_privacy_refuses_a_recipe_without(hospital: Hospital) -> None:
    text = hospital.settings.read_text()
    hospital.settings.write_text(text.replace('mechanisms = ["none"]', 'mechanisms = ["record-level"]'))
    assert protocol.error_word(hospital.train()) == "policy-privacy"


# -- purge -------------------------------------------------------------------------------------------------------------


def test_a_purge_removes_what_it_says_and_nothing_else(hospital: Hospital, cli: Any) -> None:
    hospital.train()
    hospital.finish(hospital.initial)
    (hospital.state / "run").mkdir()
    (hospital.state / "run" / "executor.log").write_text("words")
    (hospital.state / "notes-of-the-operator.txt").write_text("keep me")
    keep = {path.name for path in hospital.state.iterdir() if path.is_file()}
    assert cli("client", "purge", hospital.state, "--json").code == CONFIG
    unsure = cli("client", "purge", hospital.state, answer="n\n")
    assert unsure.code == CONFIG
    assert "not confirmed; nothing was removed" in unsure.err
    assert "nobody answered" in cli("client", "purge", hospital.state).err, "a script that pipes nothing in"
    assert hospital.where.sent.exists()
    answer = cli("client", "purge", hospital.state, answer="y\n")
    assert answer.code == 0, answer.err
    for words in ("removed adapters", "removed replies", "removed run-files", "kept: key"):
        assert words in answer.out
    left = {path.name for path in hospital.state.iterdir()}
    assert left == {*keep, "recipes", "splits"}
    assert audit.verify(hospital.state / purge.AUDIT)["unfinished"] == 0
    gone = [row["kind"] for row in hospital.where.audit.entries if row["event"] == "purged"]
    assert gone == ["adapters", "replies", "run-files"]
    assert audit.usage(hospital.where.audit.entries, hospital.lock.hash).trained, "rounds stay counted"
    assert json.loads(cli("client", "purge", hospital.state, "--yes", "--json").out)["removed"] == []


def test_features_of_patients_images_are_private_and_go(
    freezing: Hospital, cli: Any, said: Callable[[], list[str]]
) -> None:
    """They go with the final adapter and with a purge; another executor finds them; how often is not in a reply."""

    def kept() -> dict[Path, int]:
        return {path: path.stat().st_mode & 0o777 for path in freezing.where.features.rglob("*")}

    first = protocol.decode_update(freezing.train().content)
    assert not [name for name in first.metrics if "features" in name]
    features = {path: path.stat().st_mtime_ns for path in kept() if path.suffix == ".features"}
    (line,) = [text for text in said() if "features" in text]
    assert line.startswith(f"round 1: features of the frozen blocks: {len(features)} computed")
    assert len(features) == len(site_file.hospital(site_file.read_site(freezing.settings), freezing.lock.recipe).train)
    assert set(kept().values()) == {0o700, 0o600}
    freezing.open()
    assert protocol.decode_update(freezing.train(2).content).state.parameters
    assert {path: path.stat().st_mtime_ns for path in kept() if path.suffix == ".features"} == features
    freezing.finish(freezing.initial)
    assert not freezing.where.features.exists()
    freezing.open()
    freezing.train(3)
    assert kept()
    answer = cli("client", "purge", freezing.state, "--yes", "--json")
    assert "features" in [row["kind"] for row in json.loads(answer.out)["removed"]]
    assert not kept()
    freezing.settings.write_text(
        freezing.settings.read_text().replace("cache_mib = 0", "cache_mib = 0\ncache_disk_mib = 0")
    )
    freezing.open()
    assert not freezing.train(3).has_error()
    assert not kept()


def test_a_purge_of_the_audit_log_leaves_a_receipt_and_no_approval(hospital: Hospital, cli: Any) -> None:
    length = len(hospital.where.audit.entries)
    answer = cli("client", "purge", hospital.state, "--yes", "--audit", "--json")
    assert answer.code == 0, answer.err
    receipt = json.loads(answer.out)["receipt"]
    assert receipt["length"] == length
    assert [row["event"] for row in hospital.where.audit.entries] == ["opened", "purged"]
    assert hospital.where.approvals.stand() == [], "rounds and hours would be counted anew"
    (hospital.folder / "receipt.json").write_text(json.dumps(receipt))
    compared = cli("audit", "verify", hospital.state, "--against", hospital.folder / "receipt.json")
    assert compared.code == errors.AuditError.exit_code
    assert "truncated or rolled back" in compared.err


def test_no_purge_while_the_client_runs(hospital: Hospital, cli: Any) -> None:
    folder = hospital.state / supervisor.FOLDER
    folder.mkdir()
    processes.write_pid(processes.pid_path(folder, "executor"), os.getpid())
    answer = cli("client", "purge", hospital.state, "--yes")
    assert answer.code == IN_USE
    assert f"runs (executor, process {os.getpid()}). Stop it first" in answer.err


def test_where_nobody_can_answer_a_question_is_one_error(
    hospital: Hospital, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedvfm.cli import client as cli_client

    monkeypatch.setattr(sys, "stdin", None)  # as under a service, or with <&-
    assert cli_client._answer("? ") is None
    plan = enrolment.Plan("other", "127.0.0.1:9", (), ("east",))
    server = enrolment.init(hospital.folder / "other", plan, hospital.lock)
    invite = server.invite_path("east")
    for answer, words in (
        ("", f"nobody answered; without a terminal give --approve {hospital.lock.hash}"),
        ("n\n", "not approved"),
    ):
        found = cli("client", "join", invite, "--fingerprint", server.fingerprint(), "--state", "new", answer=answer)
        assert found.code == POLICY
        assert f"{words}; nothing was written and no key was made" in found.err
        assert not (hospital.folder / "new").exists()


# -- units -------------------------------------------------------------------------------------------------------------


def test_units_by_the_commands(hospital: Hospital, cli: Any) -> None:
    answer = cli("client", "unit", hospital.settings, "--state", hospital.state, "--user", "hospital", "--json")
    assert answer.code == 0, answer.err
    text = json.loads(answer.out)["unit"]
    assert f'client" "start" "{hospital.settings}" "--state" "{hospital.state}"' in text
    assert "User=hospital\n" in text
    server = cli("server", "unit", "--state", hospital.folder / "server", "--user", "hospital")
    assert server.code == 0, server.err
    assert f'"server" "start" "--state" "{hospital.folder / "server"}"' in server.out
    root = cli("client", "unit", hospital.settings, "--state", hospital.state, "--user", "root")
    assert root.code == CONFIG
    assert "is not root" in root.err


# -- all of it with real processes -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_a_federation_on_a_sites_own_terms(
    tiny: Any, locked: locked_recipe.LockedRecipe, tmp_path: Path, until: Any
) -> None:
    """Closed, waited for, opened; kept within limits; the final adapter scored and kept; purged after, not before."""
    plan = enrolment.Plan("trial", f"127.0.0.1:{processes.free_port()}", (), ("east",))
    server = enrolment.init(tmp_path / "server", plan, locked)
    invite = joining.read_invite(server.invite_path("east"), server.fingerprint())
    site = Hospital(tmp_path, tiny, locked, joining.join(tmp_path / "east", invite, locked.hash))
    enrolment.approve(server, site.where.request)
    site.write('accept = "score"\nmax_drop = 1.0', hours="[]", time_zone='"UTC"')
    text = site.settings.read_text()
    site.settings.write_text(text.replace("[data]", "[limits]\nthreads = 1\nnice = 11\n[data]"))

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        with (tmp_path / f"{arguments[0]}.txt").open("w") as words:
            return subprocess.Popen(
                tiny.command(*arguments), cwd=tmp_path, env=tiny.environment(), stdout=words, stderr=words, text=True
            )

    def said() -> str:
        path = server.folder / "run" / "coordinate.log"
        return path.read_text() if path.exists() else ""

    client = start("client", "start", site.settings, "--state", site.state)
    running = start("server", "start", "--state", server.folder)
    try:
        assert until(lambda: "policy-closed" in said(), 600), (tmp_path / "server.txt").read_text()
        assert not [row for row in site.where.audit.entries if row["event"] == "trained"]
        executor = processes.running(processes.pid_path(site.state / "run", "executor"))
        assert executor is not None
        assert psutil.Process(executor).nice() == 11
        assert "CUDA_VISIBLE_DEVICES" in psutil.Process(executor).environ()
        refused = tiny.run("client", "purge", site.state, "--yes")
        assert tiny.one_error(refused, IN_USE, "Stop it first")

        site.settings.write_text(text.replace("hours = []", 'hours = ["daily 00:00-24:00"]'))
        assert until(lambda: running.poll() is not None, 900), said()
        assert running.returncode == 0, (tmp_path / "server.txt").read_text()
        ((verdict, folder),) = decisions.kept(site.where)
        assert (verdict.verdict, verdict.round) == ("accepted", 3)
        evaluation = json.loads((server.folder / "runs" / locked.hash / "evaluation.json").read_text())
        assert evaluation["acceptance"] == {"east": "accepted"}
        assert evaluation["fingerprint"] == verdict.fingerprint == fedvfm.load_adapter(folder).read().fingerprint
    finally:
        for process in (running, client):
            process.terminate()
        codes = [process.wait(300) for process in (running, client)]
    assert codes == [0, 0], "systemd takes any other ending for a failure"
    assert tiny.run("client", "purge", site.state, "--yes").code == 0
    assert not folder.exists()
