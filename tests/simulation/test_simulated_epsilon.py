"""A private simulation: its epsilon is called simulated wherever it stands, and runs without losses have reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.privacy import accountant, base, statements
from fedvfm.server.rounds import admission
from fedvfm.simulation import baselines, experiment, plan, run
from fedvfm.simulation.engines import live
from fedvfm.simulation.results import simulated_epsilon
from fedvfm.state import state
from fedvfm.storage import hash_chain

DELTA = 1e-3
SAMPLED = {"clip": 1.0, "noise_multiplier": 0.8, "delta": DELTA}
PATIENTS = {"mechanism": "patient-level", **SAMPLED}
SITE_LEVEL = {"mechanism": "site-level", "clip": 0.2, "epsilon": 50.0, "delta": DELTA, "adaptive_quantile": 0.5}


def values(tiny: Any, private: dict[str, Any], **more: Any) -> dict[str, Any]:
    recipe = {**tiny.values["recipe"], "privacy": private, "aggregation": {"weighting": "uniform"}}
    return {**tiny.values, "recipe": recipe, "baselines": ["local-only", "pooled"], **more}


@pytest.fixture(scope="module")
def patients(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run at patient level: two patients with two images each train at a site."""
    return run.simulate(values(tiny, PATIENTS), output=tmp_path_factory.mktemp("private") / "patients").path


@pytest.fixture(scope="module")
def site_level(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run at site level."""
    return run.simulate(values(tiny, SITE_LEVEL), output=tmp_path_factory.mktemp("private") / "sites").path


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_each_site_s_epsilon_is_the_accountant_s(patients: Path) -> None:
    found = summary(patients)["privacy"]
    rate, steps = base.sample_rate(2, 4), base.steps(2, 4) * 2
    expected = accountant.epsilon(accountant.steps(rate, 0.8, steps), DELTA).value
    row = {"units": 2, "sample_rate": rate, "noise_multiplier": 0.8, "steps": steps, "epsilon": expected}
    assert found["sites"] == dict.fromkeys(("east", "north", "west"), row)
    assert {key: found[key] for key in found if key != "sites"} == {
        "simulated": True,
        "mechanism": "patient-level",
        "unit": "patient",
        "delta": DELTA,
        "accountant": "rdp",
        "clip": 1.0,
        "noise_multiplier": 0.8,
        "steps": steps,
        "epsilon": expected,
    }


def test_baselines_say_their_own_epsilon(patients: Path, site_level: Path) -> None:
    arms = summary(patients)["arms"]
    pooled = accountant.epsilon(accountant.steps(base.sample_rate(6, 4), 0.8, base.steps(6, 4) * 2), DELTA).value
    assert arms["pooled"]["simulated_epsilon"] == pooled
    assert arms["local-only"]["simulated_epsilon"] == arms["federated"]["simulated_epsilon"]
    arms = summary(site_level)["arms"]
    assert "simulated_epsilon" in arms["federated"]
    assert "simulated_epsilon" not in {**arms["pooled"], **arms["local-only"]}, "one site has no site level"


def test_site_level_says_what_the_server_s_journal_says(site_level: Path) -> None:
    found, line = summary(site_level)["privacy"], hash_chain.read(site_level / "journal.jsonl")[-1]["privacy"]
    assert line["simulated"] is True
    assert line["steps"] == 2
    assert all(found[key] == line[key] for key in ("epsilon", "noise_multiplier", "steps", "unit", "delta"))
    assert found["epsilon"] <= 50.0
    assert (found["unit"], found["last_clip"], found["sites"]) == ("site", line["clip"], {})


@pytest.mark.parametrize("which", ["patients", "site_level"])
def test_nothing_that_people_read_calls_it_anything_but_simulated(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    found = summary(folder)["privacy"]
    sentence = statements.bound(found)
    assert sentence.startswith(f"simulated epsilon {found['epsilon']:.3g} ({found['unit']} level, delta 0.001, ")
    report, card = (folder / "report.html").read_text(), (folder / "adapter" / "README.md").read_text()
    for text in (report, card):
        assert sentence in text
        assert "nothing was charged to a ledger" in text
    assert "differential privacy: none" not in card
    assert 'id="privacy"' in report
    assert not list(folder.rglob("ledger*")), "nothing is charged"


@pytest.mark.parametrize("which", ["patients", "site_level"])
def test_a_run_without_losses_has_journal_tables_and_report(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    for line in hash_chain.read(folder / "journal.jsonl"):
        assert line["train"] == {"east": {}, "north": {}, "west": {}}
        assert line["examples"] == {"east": 1, "north": 1, "west": 1}
        assert "loss" not in live._scores(line)
    assert "best" not in json.loads((folder / "evaluation.json").read_text()), "no round is chosen by its scores"
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert not any(row.startswith("federated,") and ",train," in row for row in rows)
    report = (folder / "report.html").read_text()
    assert "Validation Dice" in report
    assert "Training loss per site" not in report


def test_sites_themselves_send_nothing_but_the_adapter(
    tiny: Any, site_level: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server drops under site level does not even leave."""
    sent: list[state.SiteUpdate] = []
    admit = admission.admit

    def noted(update: state.SiteUpdate, terms: admission.Terms) -> state.SiteUpdate:
        sent.append(update)
        return admit(update, terms)

    monkeypatch.setattr(admission, "admit", noted)
    again = run.simulate(values(tiny, SITE_LEVEL, baselines=[]), output=tmp_path / "run").path
    assert summary(again)["fingerprint"] == summary(site_level)["fingerprint"], "a seeded run is the same twice"
    assert len(sent) == 6
    assert {(one.num_examples, len(one.metrics), len(one.extra)) for one in sent} == {(1, 0, 0)}


def test_progress_says_unit_and_delta(site_level: Path) -> None:
    line = hash_chain.read(site_level / "journal.jsonl")[-1]
    assert f"simulated epsilon {line['privacy']['epsilon']:.3g} (site level, delta 0.001)" in live._scores(line)


def test_the_plan_says_it_before_anything_runs(tiny: Any, patients: Path, site_level: Path) -> None:
    for private, folder in ((PATIENTS, patients), (SITE_LEVEL, site_level)):
        what = run.prepare(values(tiny, private))[0]
        made = plan.plan(what, experiment.hospitals(what))
        finished = summary(folder)["privacy"]
        for key in ("epsilon", "noise_multiplier", "steps", "sites"):
            assert made["privacy"][key] == finished[key]
        assert any("simulated epsilon" in note for note in made["notes"])
    assert any("site-level privacy with 3 sites" in note for note in made["notes"])
    plain = run.prepare({**tiny.values, "baselines": []})[0]
    assert plan.plan(plain, experiment.hospitals(plain))["privacy"] is None


def test_an_arm_at_one_site_has_no_site_level(tiny: Any) -> None:
    what = run.prepare(values(tiny, SITE_LEVEL))[0]
    found = {arm.name: arm for arm in run.arms(what, ("east", "north", "west"))}
    assert {name for name, arm in found.items() if arm.recipe and simulated_epsilon.is_private(arm.recipe)} == {
        "federated"
    }
    sampled = run.prepare(values(tiny, {"mechanism": "record-level", **SAMPLED}))[0]
    assert all(
        simulated_epsilon.is_private(baselines.alone(arm.recipe)) for arm in run.arms(sampled, ("a", "b")) if arm.recipe
    )


def test_faults_of_the_mechanism_are_the_experiment_s(tiny: Any) -> None:
    wrong = values(tiny, SITE_LEVEL)
    wrong["recipe"] = {**wrong["recipe"], "aggregation": {"rule": "svd", "weighting": "examples"}}
    with pytest.raises(errors.ConfigError) as caught:
        run.prepare(wrong)
    assert "rule 'svd' needs more than a sum" in str(caught.value)
    assert "no site may weigh more than its clip" in str(caught.value)
