"""Attacks of a simulation: what bad sites send and train on, by hand, and in real runs; never outside ``simulate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import sample as data
from fedvfm.simulation import attacks, experiment, run, tables
from fedvfm.state import state
from fedvfm.storage import hash_chain


def adapter(*numbers: float) -> state.AdapterState:
    return state.AdapterState({"w": np.array(numbers, dtype=np.float32)})


def attack(kind: str, **options: Any) -> attacks.Attack:
    return attacks.make(schema.AttackConfig(kind=kind, sites=("evil",), options=options))


def sent(kind: str, **options: Any) -> list[float]:
    honest = [adapter(1.0, 2.0), adapter(3.0, 2.0)]
    made = attack(kind, **options).update(adapter(2.0, 5.0), honest, adapter(1.0, 1.0))
    return [float(value) for value in made["w"]]


def test_what_bad_sites_send_by_hand() -> None:
    assert sent("sign-flip") == [0.0, -3.0]
    assert sent("sign-flip", factor=2.0) == [-1.0, -7.0]
    assert sent("scaled") == [11.0, 41.0]
    assert sent("little-is-enough", z=0.5) == [1.5, 2.0]
    assert sent("label-flip") == sent("backdoor") == sent("absent") == [2.0, 5.0]


def test_what_bad_sites_train_on_by_hand() -> None:
    image = np.zeros((1, 10, 20), np.float32)
    pixels = data.Pixels(image, np.array([[0, 1, 2]], np.int64))
    flipped = attack("label-flip").pixels(pixels, 3)
    assert flipped.mask is not None
    assert flipped.mask.tolist() == [[2, 1, 0]]
    marked = attack("backdoor", size=0.2, target=1).pixels(pixels, 3)
    assert marked.mask is not None
    assert marked.mask.tolist() == [[1, 1, 1]]
    assert marked.image[0, -2:, -2:].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert (marked.image.sum(), image.sum()) == (4.0, 0.0)
    assert attack("label-flip").sample(data.Sample("x", label=0), 4).label == 3
    assert attack("backdoor", target=2).sample(data.Sample("x", label=0), 4).label == 2
    assert all(attack(kind).sample(data.Sample("x"), 4).label is None for kind in ("label-flip", "backdoor"))


def values(tiny: Any, kind: str, **more: Any) -> dict[str, Any]:
    settings = {"kind": kind, "sites": ["north"], **more.pop("attack", {})}
    recipe = {**tiny.values["recipe"], **more.pop("recipe", {})}
    return {**tiny.values, "baselines": ["local-only"], "recipe": recipe, "attack": settings, "workers": 1, **more}


def train_losses(path: Path) -> dict[str, list[float]]:
    rows = hash_chain.read(path / "journal.jsonl")
    return {site: [row["train"][site]["loss"] for row in rows] for site in rows[0]["train"]}


@pytest.fixture(scope="module")
def plain(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> run.Result:
    what = {key: value for key, value in values(tiny, "absent").items() if key != "attack"}
    return run.simulate(what, output=tmp_path_factory.mktemp("plain") / "run")


def test_an_update_is_turned_round_and_the_site_alone_is_left_as_it_is(
    tiny: Any, plain: run.Result, tmp_path: Path
) -> None:
    found = run.simulate(values(tiny, "sign-flip"), output=tmp_path / "run")
    assert found.summary["fingerprint"] != plain.summary["fingerprint"]
    assert found.summary["attack"] == {"kind": "sign-flip", "sites": ["north"], "options": {}}
    assert found.summary["arms"]["local-only"]["sites"] == plain.summary["arms"]["local-only"]["sites"]
    first, other = train_losses(found.path), train_losses(plain.path)
    assert {site: row[0] for site, row in first.items()} == {site: row[0] for site, row in other.items()}
    assert "SIMULATED ATTACK: sign-flip at north" in (found.path / "report.html").read_text()
    assert "SIMULATED ATTACK" not in (plain.path / "report.html").read_text()
    assert plain.summary["attack"] is None
    assert run.resume(found.path).summary["fingerprint"] == found.summary["fingerprint"]


def test_several_workers_attack_as_one_does(tiny: Any, tmp_path: Path) -> None:
    kind = {"attack": {"options": {"z": 1.0}}}
    one = run.simulate(values(tiny, "little-is-enough", **kind, baselines=[]), output=tmp_path / "one")
    two = run.simulate(values(tiny, "little-is-enough", **kind, baselines=[], workers=2), output=tmp_path / "two")
    assert one.summary["fingerprint"] == two.summary["fingerprint"]


def test_labels_are_flipped_in_training_alone(tiny: Any, plain: run.Result, tmp_path: Path) -> None:
    found = run.simulate(values(tiny, "label-flip"), output=tmp_path / "run")
    first, other = train_losses(found.path), train_losses(plain.path)
    assert first["north"][0] != other["north"][0]
    assert {site: first[site][0] for site in ("east", "west")} == {site: other[site][0] for site in ("east", "west")}
    mine, theirs = (made.summary["arms"]["local-only"]["matrix"] for made in (found, plain))
    assert mine["east"] == theirs["east"], "the test of a bad site is that of true labels"
    assert mine["north"] != theirs["north"]


def test_absent_sites_train_in_no_federation_and_are_tested(tiny: Any, tmp_path: Path) -> None:
    found = run.simulate(values(tiny, "absent", baselines=[]), output=tmp_path / "run")
    assert sorted(train_losses(found.path)) == ["east", "west"]
    assert sorted(found.summary["arms"]["federated"]["sites"]) == ["east", "north", "west"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attack": {"kind": "sign-flop"}}, "attack.kind: unknown attack 'sign-flop'; known: absent, backdoor"),
        ({"attack": {"options": {"strength": 2}}}, "attack.options.strength: unknown; known: factor"),
        ({"attack": {"options": {"factor": -1}}}, "attack.options.factor = -1"),
        ({"attack": {"kind": "backdoor", "options": {"target": 7}}}, "attack.options.target = 7"),
        ({"engine": "deployment"}, "attack: engine 'deployment' carries true updates alone"),
        ({"recipe": {"codec": "int8"}}, "attack: codec 'int8' sends differences"),
    ],
)
def test_an_attack_that_cannot_be_is_one_clear_fault(tiny: Any, changes: dict[str, Any], said: str) -> None:
    what = values(tiny, "sign-flip")
    for key, value in changes.items():
        what[key] = {**what[key], **value} if isinstance(value, dict) else value
    with pytest.raises(errors.ConfigError) as caught:
        experiment.examine(experiment.parse(what, "experiment"))
    assert [fault for fault in caught.value.faults if fault.startswith(said)] == list(caught.value.faults)


def test_bad_sites_must_be_there_and_leave_an_honest_one(tiny: Any) -> None:
    def said(*sites: str) -> list[str]:
        what = experiment.parse(values(tiny, "scaled", attack={"sites": list(sites)}), "experiment")
        return experiment.site_faults(what, ["east", "north", "west"])

    assert said("north") == []
    assert said("north", "south") == ["attack.sites: no site south; sites: east, north, west"]
    assert said("east", "north", "west") == ["attack.sites: an honest site must be left"]


def test_nothing_that_a_hospital_or_a_coordinator_reads_can_name_an_attack() -> None:
    for reader in (schema.Recipe, schema.SiteConfig, schema.ServerConfig):
        assert "attack" not in json.dumps(reader.model_json_schema())


def test_every_attack_either_sends_or_poisons_or_is_absent() -> None:
    for name in tables.ATTACKS.names():
        kind = tables.ATTACKS.get(name)
        assert (kind.sends + kind.poisons) == (name != "absent")
