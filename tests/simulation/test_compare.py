"""Finished runs side by side: groups over seeds, paired differences, clear errors."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedvfm import errors
from fedvfm.client.personal import statement
from fedvfm.data import sample as samples
from fedvfm.report import bootstrap
from fedvfm.simulation import experiment, run_folder
from fedvfm.simulation.results import benefit, compare, examination, report, statistics


@pytest.fixture(autouse=True)
def few_units_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny sites have two test patients."""
    monkeypatch.setattr(bootstrap, "LEAST_UNITS", 1)


def summary(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return found


def shown(found: dict[str, Any], width: int = 200) -> str:
    out = io.StringIO()
    compare.show(found, Console(file=out, width=width))
    return out.getvalue()


def changed(run: Path, to: Path, *, seed: int | None = None, shift: float = 0.0, **settings: Any) -> Path:
    """A copy of a run with other values in it, as another experiment would have left it."""
    shutil.copytree(run, to)
    values, made = json.loads((to / "experiment.json").read_text()), summary(to)
    values["recipe"] |= settings
    if seed is not None:
        values["recipe"]["seed"] = made["seed"] = seed
    evaluation = json.loads((to / "evaluation.json").read_text())
    for rows in evaluation["last"]["samples"].values():
        rows["dice"] = [value + shift for value in rows["dice"]]
    made["arms"]["federated"]["macro"] += shift
    for name, content in (("experiment", values), ("summary", made), ("evaluation", evaluation)):
        (to / f"{name}.json").write_text(json.dumps(content))
    return to


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_parent_of_seeds_is_one_group(tiny_seeds: Path) -> None:
    (group,) = compare.load([tiny_seeds])
    assert group.label == "tiny"
    assert [run.seed for run in group.runs] == [0, 1]
    (same,) = compare.load([tiny_seeds / "seed-1", tiny_seeds / "seed-0", tiny_seeds])
    assert [run.seed for run in same.runs] == [0, 1]


def test_runs_with_other_baselines_join_and_an_arm_says_how_many_seeds_it_has(tiny_run: Path, tiny_seeds: Path) -> None:
    (group,) = compare.load([tiny_run, tiny_seeds / "seed-1"])
    assert [run.seed for run in group.runs] == [0, 1]
    found = compare.table([group])
    assert list(found["runs"][0]["arms"]["pooled"]["by_seed"]) == ["0"]
    assert "1 of 2 seeds" in shown(found)


def test_seeds_that_were_run_together_stay_together(tiny_run: Path, tiny_seeds: Path) -> None:
    first, second = compare.load([tiny_run, tiny_seeds])
    assert [run.seed for run in first.runs] == [0]
    assert [run.seed for run in second.runs] == [0, 1]
    assert {first.label, second.label} == {"tiny (tiny)", f"tiny ({tiny_seeds.name})"}


def test_many_seeds_are_in_the_order_of_their_numbers(tiny_run: Path, tmp_path: Path) -> None:
    for seed in (10, 9, 2):
        changed(tiny_run, tmp_path / f"seed-{seed}", seed=seed)
    (group,) = compare.load([tmp_path])
    assert [run.seed for run in group.runs] == [2, 9, 10]


def test_other_settings_are_another_group_and_named(tiny_run: Path, tmp_path: Path) -> None:
    other = changed(tiny_run, tmp_path / "other", rounds=7)
    found = compare.compare([tiny_run, other])
    assert [row["label"] for row in found["runs"]] == ["tiny (tiny)", "tiny (other)"]
    assert found["runs"][1]["settings"] == {"recipe.rounds": [2, 7]}
    assert "tiny (other): recipe.rounds: 2 -> 7" in shown(found)


def test_an_option_that_did_not_exist_yet_is_its_default(tiny_run: Path, tmp_path: Path) -> None:
    """A run of an earlier release names fewer options; that is no difference, and one that is stays one."""
    earlier = changed(tiny_run, tmp_path / "earlier")
    values = json.loads((earlier / "experiment.json").read_text())
    for table, options in (
        (values["recipe"]["adapter"], ("factors", "parts")),
        (values["recipe"]["data"], ("channels", "window", "plane", "stack")),
        (values["recipe"], ("privacy", "start", "admission")),
        (values["partition"], ("options",)),
        (values, ("site_ranks", "server")),
    ):
        for option in options:
            del table[option]
    values["recipe"]["task"]["retired"] = 3
    (earlier / "experiment.json").write_text(json.dumps(values))
    later = changed(tiny_run, tmp_path / "later", seed=7)
    other = changed(tiny_run, tmp_path / "other", adapter={**values["recipe"]["adapter"], "factors": "freeze-A"})
    first, second, third = compare.compare([earlier, later, other])["runs"]
    assert first["settings"] == {}
    assert second["settings"] == {"recipe.task.retired": [3, None]}, "what no release knows any more is told"
    assert third["settings"] == {"recipe.adapter.factors": ["both", "freeze-A"], "recipe.task.retired": [3, None]}
    del values["recipe"]["task"]["retired"]
    (earlier / "experiment.json").write_text(json.dumps(values))
    (group,) = compare.load([earlier, later])
    assert [run.seed for run in group.runs] == [0, 7], "runs of two releases are one group where they differ in seed"


@pytest.mark.parametrize("missing", ["summary.json", "experiment.json"])
def test_a_run_that_is_not_finished_says_how_to_finish_it(tiny_run: Path, tmp_path: Path, missing: str) -> None:
    run = changed(tiny_run, tmp_path / "run")
    (run / missing).unlink()
    with pytest.raises(errors.CheckpointError, match="--resume" if missing == "summary.json" else "no run folder"):
        compare.load([run])


def test_paths_that_are_no_runs(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointError, match="no such folder"):
        compare.load([tmp_path / "nowhere"])
    with pytest.raises(errors.CheckpointError, match="no run folder"):
        compare.load([tmp_path])
    with pytest.raises(errors.CheckpointError, match="at least one"):
        compare.load([])
    run = changed(tiny_run, tmp_path / "run")
    (run / "summary.json").write_text('{"experiment": "tiny"}')
    with pytest.raises(errors.CheckpointError, match="not finished"):
        compare.load([run])


# --- values -----------------------------------------------------------------------------------------------------------


def test_every_arm_has_its_macro_and_interval(tiny_run: Path) -> None:
    found, made = compare.compare([tiny_run]), summary(tiny_run)
    (row,) = found["runs"]
    assert list(row["arms"]) == ["federated", "local-only", "local-only abroad", "pooled", "classical", "personal"]
    for arm in ("federated", "local-only", "pooled", "classical"):
        values = row["arms"][arm]
        assert values["macro"] == made["arms"][arm]["macro"]
        if values["low"] is None:
            assert values["no_interval"] == "no spread among the test samples"
        else:
            assert values["low"] <= values["macro"] <= values["high"]
    assert row["arms"]["federated"]["low"] is not None
    assert row["arms"]["local-only abroad"]["macro"] == made["arms"]["local-only"]["abroad"]
    assert row["bytes"] == {"up": made["bytes"]["up"], "down": made["bytes"]["down"]}
    assert row["difference"] is None
    json.dumps(found, allow_nan=False)


def test_seeds_are_averaged_and_both_kept(tiny_seeds: Path) -> None:
    (row,) = compare.compare([tiny_seeds])["runs"]
    own = [summary(tiny_seeds / f"seed-{seed}")["arms"]["federated"]["macro"] for seed in (0, 1)]
    assert row["arms"]["federated"]["by_seed"] == {"0": own[0], "1": own[1]}
    assert row["arms"]["federated"]["macro"] == pytest.approx(np.mean(own), abs=1e-12)
    assert row["seeds"] == [0, 1]
    assert own[0] != own[1]


def test_classification_is_compared_by_balanced_accuracy(tiny_classes: Path) -> None:
    (row,) = compare.compare([tiny_classes])["runs"]
    made = summary(tiny_classes)
    assert row["primary"] == "balanced_accuracy"
    scores = compare.scores(run_folder.RunFolder(tiny_classes), made)
    interval = compare.interval([scores["federated"]])
    assert interval is not None
    assert interval.mean == pytest.approx(made["arms"]["federated"]["macro"], abs=1e-12)
    # Its one round of training leaves it with one answer for all, of which no draw gives another value.
    assert row["arms"]["federated"]["no_interval"] == interval.reason == "no spread among the test samples"
    assert row["arms"]["federated"]["low"] is None


def test_sites_with_few_patients_have_no_interval(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "LEAST_UNITS", 10)
    (row,) = compare.compare([tiny_run])["runs"]
    assert row["arms"]["federated"]["low"] is None
    assert "east (2), north (2), west (2)" in row["arms"]["federated"]["no_interval"]
    text = shown(compare.compare([tiny_run]))
    assert "(no interval)" in text
    assert text.count("No interval: under 10 independent test units at east (2)") == 1
    changes = compare.by_site(*([_arm(tiny_run, name)] for name in ("federated", "local-only")))
    assert {change.word for change in changes.values()} == {bootstrap.UNKNOWN}


def _arm(run: Path, name: str) -> statistics.Scores:
    return compare.scores(run_folder.RunFolder(run), summary(run))[name]


def test_ten_sites_of_few_patients_are_drawn_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "LEAST_UNITS", 10)
    values = {f"site-{k}": {"a": 0.1 * k, "b": 0.1 * k} for k in range(10)}
    found = compare.interval([statistics.Scores("arm", 0, values)])
    assert found is not None
    assert found.over_sites
    assert found.low is not None
    assert found.low < 0.35 < 0.55 < (found.high or 0)
    fewer = compare.interval([statistics.Scores("arm", 0, dict(list(values.items())[:9]))])
    assert fewer is not None
    assert fewer.low is None


@pytest.mark.parametrize("few", [False, True])
def test_it_is_said_where_sites_are_drawn_too(few: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites of two test samples: enough by themselves, or so few that the three sites are drawn."""
    monkeypatch.setattr(bootstrap, "LEAST_UNITS", 3 if few else 2)
    values = {f"site-{k}": {"a": 0.1 * k, "b": 0.1 * k + 0.05} for k in range(3)}
    monkeypatch.setattr(compare, "scores", lambda *_: {"federated": statistics.Scores("federated", 0, values)})
    arms = {"federated": {"macro": 0.125}}
    made = {"experiment": "e", "seed": 0, "arms": arms, "bytes": {"up": 0, "down": 0}, "primary": "dice", "rounds": 1}
    run = compare.Run(run_folder.RunFolder(tmp_path), {**made, "wall_s": 1.0, "peak_mib": 1.0}, {})
    found = compare.table([compare.Group("e", (run,))])
    arm = found["runs"][0]["arms"]["federated"]
    assert arm["low"] is not None
    assert arm["over_sites"] is few
    assert ("the sites are drawn too" in shown(found)) is few


def test_a_value_outside_its_interval_is_said_to_be() -> None:
    assert compare.Stated(0.3, 0.4, 0.5).between() == "0.400 to 0.500, the value itself outside"
    assert compare.Stated(0.45, 0.4, 0.5).between("+") == "+0.400 to +0.500"


def test_a_constant_shift_is_a_paired_difference_without_spread(tiny_run: Path, tmp_path: Path) -> None:
    other = changed(tiny_run, tmp_path / "other", shift=0.125, rounds=7)
    difference = compare.compare([tiny_run, other])["runs"][1]["difference"]
    assert difference["paired"]
    assert difference["seeds"] == [0]
    assert difference["mean"] == pytest.approx(0.125, abs=1e-9)
    assert (difference["low"], difference["no_interval"]) == (None, "no spread among the test samples")


def test_pairs_are_taken_on_common_seeds(tiny_seeds: Path, tmp_path: Path) -> None:
    other = changed(tiny_seeds / "seed-1", tmp_path / "other", shift=0.25, rounds=7)
    found = compare.compare([tiny_seeds, other])
    difference = found["runs"][1]["difference"]
    assert difference["paired"]
    assert difference["seeds"] == [1]
    assert difference["mean"] == pytest.approx(0.25, abs=1e-9)
    assert "unpaired" not in shown(found)


def test_other_samples_are_compared_unpaired_and_it_says_so(tiny_run: Path, tmp_path: Path) -> None:
    other = changed(tiny_run, tmp_path / "other", shift=0.2, rounds=7)
    evaluation = json.loads((other / "evaluation.json").read_text())
    for rows in evaluation["last"]["samples"].values():
        rows["id"] = [f"other-{name}" for name in rows["id"]]
    (other / "evaluation.json").write_text(json.dumps(evaluation))
    (other / "groups.json").unlink()  # it names the samples of before
    found = compare.compare([tiny_run, other])
    difference = found["runs"][1]["difference"]
    assert not difference["paired"]
    assert difference["mean"] == pytest.approx(0.2, abs=1e-9)
    assert difference["low"] < 0.2 < difference["high"]
    assert "unpaired: other samples" in shown(found)


def test_a_difference_is_of_the_hospitals_that_both_runs_tested(tiny_run: Path, tmp_path: Path) -> None:
    """One run without its easiest hospital looked worse by what that hospital has."""
    other = changed(tiny_run, tmp_path / "other", shift=0.2, rounds=7)
    evaluation = json.loads((other / "evaluation.json").read_text())
    tested = evaluation["last"]["samples"]
    tested["west"]["dice"] = [value + 9 for value in tested["west"]["dice"]]
    tested["south"] = tested.pop("west")
    groups = json.loads((other / "groups.json").read_text())
    groups["south"] = groups["west"]
    (other / "groups.json").write_text(json.dumps(groups))
    (other / "evaluation.json").write_text(json.dumps(evaluation))
    found = compare.compare([tiny_run, other])
    difference = found["runs"][1]["difference"]
    assert (difference["paired"], difference["sites_left_out"]) == (True, ["south", "west"])
    assert difference["mean"] == pytest.approx(0.2, abs=1e-9)
    assert "the difference is without south, west, which not every run tested" in shown(found)
    for site in ("east", "north"):
        tested[f"{site}-2"], groups[f"{site}-2"] = tested.pop(site), groups[site]
    (other / "groups.json").write_text(json.dumps(groups))
    (other / "evaluation.json").write_text(json.dumps(evaluation))
    assert compare.compare([tiny_run, other])["runs"][1]["difference"] is None


def test_other_metrics_are_not_subtracted(tiny_run: Path, tiny_classes: Path) -> None:
    found = compare.compare([tiny_run, tiny_classes])
    assert found["runs"][1]["difference"] is None
    assert "balanced_accuracy" in json.dumps(found)


def _scores(values: np.ndarray, seed: int, prefix: str) -> statistics.Scores:
    return statistics.Scores("arm", seed, {"a": {f"{prefix}{at}": float(value) for at, value in enumerate(values)}})


def test_the_unpaired_interval_is_that_of_independent_means() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(0.8, 0.1, 200), rng.normal(0.7, 0.05, 300)
    result = compare.difference([_scores(one, 0, "x")], [_scores(other, 0, "y")])
    assert result is not None
    value, paired = result
    error = 1.96 * np.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other))
    assert not paired
    assert value.mean == pytest.approx(one.mean() - other.mean(), abs=1e-12)
    assert value.high - value.mean == pytest.approx(error, rel=0.15)
    assert value.mean - value.low == pytest.approx(error, rel=0.15)


def test_sites_of_one_arm_alone_are_in_no_difference() -> None:
    """A hospital without labels is tested with the federated adapter, and has no model of its own."""
    rng = np.random.default_rng(0)

    def arm(name: str, means: dict[str, float]) -> statistics.Scores:
        return statistics.Scores(
            name,
            0,
            {site: {f"{site}-{at}": float(rng.normal(mean, 0.02)) for at in range(20)} for site, mean in means.items()},
        )

    federated, local = arm("federated", {"east": 0.9, "north": 0.5, "west": 0.5}), arm("local-only", {"east": 0.8})
    home = examination.home({"federated": federated, "local-only": local})
    assert home["east"].word == "gains"
    assert home["east"].mean == pytest.approx(0.1, abs=0.03)
    macro = benefit._macro(federated, local)
    assert macro is not None
    assert macro["mean"] == pytest.approx(home["east"].mean)
    assert (macro["low"], macro["high"]) == pytest.approx((0.1, 0.1), abs=0.03)
    found = report.Found(None, {"arms": {}}, {"federated": federated, "local-only": local}, [])  # type: ignore[arg-type]
    said = report._against_federated(found, "local-only")
    assert said is not None
    assert said.startswith(f"{-home['east'].mean:+.3f}")
    assert said.endswith(", at 1 of 3 sites)")
    assert "unpaired" not in said


def test_what_the_counts_of_the_benefit_take_together_is_said() -> None:
    rng = np.random.default_rng(0)
    gap = bootstrap.difference(
        *([bootstrap.SiteScores({str(at): float(value) for at, value in enumerate(rng.random(20))})] for _ in range(2)),
        rng=rng,
    )
    row = {
        "difference": benefit._plain(gap),
        "word": statement.word("personal", gap),
        "units": 20,
        "validation_units": 5,
    }
    assert row["word"] == statement.NO_DIFFERENCE
    assert benefit._counts({"a": row}, "difference")["cannot tell"] == 1
    assert "take no difference for cannot tell" in benefit._guard({"sites": {"a": row}, "private": False})


# --- patients ---------------------------------------------------------------------------------------------------------


def test_patients_are_kept_without_their_names_and_drawn_whole(tiny_run: Path, tmp_path: Path) -> None:
    run = run_folder.RunFolder(changed(tiny_run, tmp_path / "run"))
    (run.path / compare.GROUPS).unlink(missing_ok=True)
    assert compare.scores(run, summary(run.path))["pooled"].patients is None
    hospitals = experiment.hospitals(experiment.parse(run.read_experiment(), "test"))
    compare.write_groups(run, hospitals)
    text = (run.path / compare.GROUPS).read_text()
    assert "patient" not in text
    groups = json.loads(text)
    assert groups.keys() == {"east", "north", "west"}
    assert all(sorted(Counter(rows.values()).values()) == [2, 2] for rows in groups.values())
    assert compare.scores(run, summary(run.path))["pooled"].patients == groups


def test_without_patients_there_is_nothing_to_keep(tiny_classes: Path, tmp_path: Path) -> None:
    hospitals = experiment.hospitals(experiment.parse(run_folder.RunFolder(tiny_classes).read_experiment(), "test"))
    run = run_folder.RunFolder(tmp_path)
    compare.write_groups(run, hospitals)
    assert not (tmp_path / compare.GROUPS).exists()
    assert compare.patients_of(hospitals) is None


def test_a_sample_without_a_patient_stands_for_itself(tiny_run: Path) -> None:
    (first, *_) = experiment.hospitals(experiment.parse(run_folder.RunFolder(tiny_run).read_experiment(), "test"))
    mixed = (samples.Sample("1", patient="p"), samples.Sample("p"), samples.Sample("2", patient="p"))
    found = compare.patients_of([dataclasses.replace(first, test=mixed)])
    assert found is not None
    assert found["east"]["1"] == found["east"]["2"] != found["east"]["p"]
    # Another seed may test other patients: each is the same one there, and not whoever came at its place.
    later = compare.patients_of([dataclasses.replace(first, test=(samples.Sample("9", patient="a"), *mixed[:1]))])
    assert later is not None
    assert later["east"]["1"] == found["east"]["1"] != later["east"]["9"]


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_the_table_names_arms_seeds_and_costs(tiny_run: Path, tiny_seeds: Path) -> None:
    found = compare.compare([tiny_run, tiny_seeds])
    text = shown(found)
    for word in (
        "macro dice, 95 % interval",
        "federated",
        "local-only abroad",
        "classical",
        "seeds",
        "MB up, down",
        "peak MiB",
    ):
        assert word in text
    assert f"{summary(tiny_run)['arms']['pooled']['macro']:.3f}" in text
    assert "same settings as the first" in text


def test_labels_are_no_markup(tiny_run: Path, tmp_path: Path) -> None:
    other = changed(tiny_run, tmp_path / "[bold]x", rounds=7)
    assert "[bold]x" in shown(compare.compare([tiny_run, other]))
