"""What a run does to its caller and to the disk, and what it takes from the environment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedvfm import errors
from fedvfm.client import app as client_app
from fedvfm.config import schema
from fedvfm.simulation import experiment, run, run_folder, seeds
from fedvfm.simulation.results import compare
from fedvfm.storage import hash_chain


def small(tiny: Any, **more: Any) -> dict[str, Any]:
    return {**tiny.values, "baselines": [], "recipe": {**tiny.values["recipe"], "rounds": 1}, **more}


def test_the_callers_threads_and_random_numbers_are_as_before(tiny: Any, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    recipe = {**tiny.values["recipe"], "rounds": 1, "threads": before + 1}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run.simulate(small(tiny, recipe=recipe), output=tmp_path / "run")
    assert torch.get_num_threads() == before
    assert torch.equal(torch.rand(3), expected)
    run.resume(tmp_path / "run")
    assert torch.get_num_threads() == before
    with pytest.raises(errors.DataError):
        run.simulate(small(tiny, data={"source": "folder", "path": str(tmp_path)}), output=tmp_path / "other")
    assert torch.get_num_threads() == before


def test_everything_a_run_leaves_is_private(tiny: Any, tmp_path: Path) -> None:
    made = run.simulate(small(tiny), output=tmp_path / "deep" / "run").path
    files = [path for path in made.rglob("*") if path.is_file()]
    assert {"samples.csv", "adapter_config.json", "report.html", "experiment.json"} <= {path.name for path in files}
    assert {str(path): path.stat().st_mode & 0o777 for path in files} == {str(path): 0o600 for path in files}
    assert made.stat().st_mode & 0o777 == 0o700


def test_a_data_set_found_by_its_name_is_written_down_as_a_path(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets" / "nuclei").mkdir(parents=True)
    (tmp_path / "sets" / "nuclei" / "index.csv").write_text("id,site\n")
    monkeypatch.setenv("FEDVFM_DATA", str(tmp_path / "sets"))
    prepared = run.prepare(small(tiny, data={"source": "nuclei"}))[0]
    assert prepared.data.path == str(tmp_path / "sets" / "nuclei")
    monkeypatch.setenv("FEDVFM_DATA", str(tmp_path / "other"))
    assert run.prepare(prepared)[0].data.path == str(tmp_path / "sets" / "nuclei")


def test_where_a_named_set_lies_does_not_tell_runs_apart() -> None:
    def settings(**data: Any) -> dict[str, Any]:
        return compare.Run(run_folder.RunFolder(Path()), {}, {"data": data, "name": "x"}).settings

    assert settings(source="nuclei", path=None) == settings(source="nuclei", path="/one/nuclei")
    assert settings(source="folder", path="/one") != settings(source="folder", path="/two")


def test_peak_memory_is_that_of_all_processes_that_took_part(tiny_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    path = copy / "arms" / "pooled" / "evaluation.json"
    found = json.loads(path.read_text())
    assert found["peak_mib"] > 10
    path.write_text(hash_chain.canonical({**found, "peak_mib": 123456.5}))
    assert run.resume(copy).summary["peak_mib"] == 123456.5


def test_the_cache_changes_no_bit_and_leaves_nothing(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory, in files, or too small for all: one adapter, and the journal says what was computed how often."""
    data = {**tiny.values["recipe"]["data"], "views": 2, "augment": ["noise"]}
    recipe = {**tiny.values["recipe"], "data": data, "optimiser": {"learning_rate": 1e-2, "local_epochs": 2}}
    places = {"files": (64, 64), "memory": (64, 0), "files-alone": (0, 64), "small": (8, 0)}
    made, again = {}, {}
    told = dict.fromkeys(places, "")
    for name, (memory, disk) in places.items():

        def hear(event: str, /, *, said: str = name, **fields: Any) -> None:
            if event == "note" and "too small" in fields["text"]:
                told[said] += fields["text"]

        monkeypatch.setattr(run, "MIB", 1 << 14 if name == "small" else 1 << 20)
        # One worker: each has its own memory, and which one a site comes to hangs on the machine's load.
        values = {**tiny.values, "baselines": [], "recipe": recipe, "workers": 1}
        values |= {"cache_mib": memory, "cache_disk_mib": disk}
        found = run.simulate(values, output=tmp_path / name, observer=hear)
        assert not (found.path / "features").exists()
        rows = hash_chain.read(found.path / "journal.jsonl")
        made[name], again[name] = found.summary["fingerprint"], [row["train"]["east"] for row in rows]
    assert len(set(made.values())) == 1
    assert "features of the frozen blocks" in told["small"]
    assert "raise cache_mib or cache_disk_mib" in told["small"]
    assert not any(told[name] for name in told if name != "small")
    small = again.pop("small")
    assert 0 < small[1]["features_again"] == small[1]["features_computed"] < 8
    for name, (first, second) in again.items():
        assert first["features_computed"] == 8, name
        assert second["features_computed"] == second["features_again"] == 0, name
        assert second["features_files" if "files" in name else "features_memory"] == 8, name


def test_a_resumed_run_computes_no_feature_again(tiny: Any, tmp_path: Path) -> None:
    recipe = {**tiny.values["recipe"], "data": {**tiny.values["recipe"]["data"], "views": 1}}

    def stop(event: str, /, **fields: Any) -> None:
        if event == "round-end" and fields["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.simulate({**tiny.values, "baselines": [], "recipe": recipe}, output=tmp_path / "run", observer=stop)
    assert list((tmp_path / "run" / "features").glob("*.features"))
    run.resume(tmp_path / "run")
    rows = [row["train"]["east"] for row in hash_chain.read(tmp_path / "run" / "journal.jsonl")]
    assert [row["features_computed"] for row in rows] == [4, 0]
    assert rows[1]["features_files"] == 4
    assert not (tmp_path / "run" / "features").exists()


def test_a_run_that_trained_nothing_frees_its_folder(tiny: Any, tmp_path: Path) -> None:
    """Stopped or broken before a round is finished: the same output works at once. What is not a run's stays."""

    def stop(event: str, /, **fields: Any) -> None:
        if event == "reply":
            if (empty / "experiment.json").exists():
                (empty / "notes.txt").write_text("the user's")
            raise KeyboardInterrupt

    new, empty = tmp_path / "deep" / "new", tmp_path / "mine"
    empty.mkdir()
    broken = {**tiny.values["recipe"], "backbone": {"name": str(tmp_path / "no-weights")}}
    for output in (new, empty):
        with pytest.raises(errors.FedvfmError):
            run.simulate(small(tiny, recipe=broken), output=output)
        for codec in ("fp32", "int8"):
            coded = small(tiny, recipe={**small(tiny)["recipe"], "codec": codec})
            with pytest.raises(KeyboardInterrupt):
                run.simulate(coded, output=output, observer=stop)
            (output / "notes.txt").unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            run.simulate(small(tiny), output=output, observer=stop)
    assert not new.exists()
    assert [path.name for path in empty.iterdir()] == ["notes.txt"]
    (empty / "notes.txt").unlink()
    (tmp_path / "parent").mkdir()
    with pytest.raises(KeyboardInterrupt):
        seeds.simulate(small(tiny), [1, 2], output=tmp_path / "parent", observer=stop)
    assert not list((tmp_path / "parent").iterdir())
    assert run.simulate(small(tiny), output=empty).summary["rounds"] == 1


def test_a_folder_that_another_run_holds_is_left_alone(tiny: Any, tmp_path: Path) -> None:
    with run_folder.Lock(tmp_path), pytest.raises(errors.OutputInUse):
        run.simulate(small(tiny), output=tmp_path)
    (tmp_path / "experiment.json").write_text("another's")
    with pytest.raises(errors.OutputInUse):
        run.simulate(small(tiny), output=tmp_path)
    assert (tmp_path / "experiment.json").read_text() == "another's"


def test_one_model_a_rank_on_one_backbone(tiny: Any) -> None:
    """Sites of different ranks are asked in turn: no model is built twice, and the frozen weights are there once."""
    recipe = experiment.parse(tiny.values, "x").recipe
    low = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"rank": 1, "alpha": 2.0})})
    kept = client_app.Models()
    two, one = kept.get(recipe, "cpu"), kept.get(low, "cpu")
    assert two is not one
    assert kept.get(recipe, "cpu") is two
    assert kept.get(low, "cpu") is one
    shared = {p.data_ptr() for p in two.backbone.parameters()} & {p.data_ptr() for p in one.backbone.parameters()}
    own = {p.data_ptr() for p in one.parameters() if p.requires_grad}
    assert len(shared) >= len(list(one.backbone.parameters())) - len(own)
    other = kept.get(recipe.model_copy(update={"seed": 5}), "cpu")
    assert kept.get(recipe, "cpu") is not two, "models of another recipe are let go"
    assert other.recipe.seed == 5
    few = client_app.Models(limit=1)
    assert few.get(recipe, "cpu") is few.get(recipe, "cpu")
    first = few.get(recipe, "cpu")
    few.get(low, "cpu")
    assert few.get(recipe, "cpu") is not first


def test_a_cohort_in_a_real_run(tiny: Any, tmp_path: Path) -> None:
    """Steps per sample, counted in the journals: local-only and pooled train as often as the federation's samples."""
    recipe = {**tiny.values["recipe"], "rounds": 3, "optimiser": {"batch_size": 2, "learning_rate": 1e-2}}
    what = small(
        tiny, recipe=recipe, baselines=["local-only", "pooled"], server={"cohort": 2}, personal={"enabled": False}
    )
    notes: list[str] = []

    def watch(event: str, /, **fields: Any) -> None:
        notes.extend([fields["text"]] if event == "note" else [])

    made = run.simulate(what, output=tmp_path / "run", observer=watch)
    steps = {}
    for path in sorted(made.path.rglob("journal.jsonl")):
        rows = hash_chain.read(path)
        train = [row["train"][site]["steps"] for row in rows for site in row["train"]]
        steps[path.parent.name] = sum(train)
    assert steps.pop("run") == steps.pop("pooled") == sum(steps.values())
    assert {name: made.summary["arms"][name]["rounds"] for name in made.summary["arms"]} == {
        "federated": 3,
        "local-only": 2,
        "pooled": 2,
    }
    said = "a round asks 2 of 3 sites; arms whose sites are asked more often have fewer than 3 rounds"
    assert any(note.startswith(said) for note in notes)
    assert said in (made.path / "report.html").read_text()


def test_mixed_ranks_show_what_the_rule_lost(tiny: Any, tmp_path: Path) -> None:
    recipe = {**tiny.values["recipe"], "rounds": 1, "aggregation": {"rule": "svd"}}
    made = run.simulate(small(tiny, recipe=recipe, site_ranks={"north": 1}), output=tmp_path / "run")
    (row,) = hash_chain.read(made.path / "journal.jsonl")
    assert row["factor_error"] is None
    assert 0 <= row["aggregate_error"] < 1
    page = (made.path / "report.html").read_text()
    assert "Error of the aggregate under mixed ranks" in page
    assert "Factor-averaging error" not in page


# --- several seeds ----------------------------------------------------------------------------------------------------


def test_seeds_go_on_where_they_were(tiny: Any, tmp_path: Path) -> None:
    """One seed finished, one stopped, one not begun: all three are there after one resume of their parent."""
    parent = tmp_path / "runs"

    def stop(event: str, /, **fields: Any) -> None:
        if event == "round-end" and (parent / "seed-4").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seeds.simulate(small(tiny), [3, 4, 5], output=parent, observer=stop)
    assert sorted(path.name for path in parent.iterdir()) == ["seed-3", "seed-4", "seeds.json"]
    assert not (parent / "seed-4" / "summary.json").exists()
    report = (parent / "seed-3" / "report.html").stat().st_mtime_ns
    found = seeds.resume(parent)
    assert [one.summary["seed"] for one in found] == [3, 4, 5]
    assert (parent / "seed-3" / "report.html").stat().st_mtime_ns == report, "what is finished is left alone"
    whole = seeds.simulate(small(tiny), [3, 4, 5], output=tmp_path / "whole")
    assert [one.summary["fingerprint"] for one in found] == [one.summary["fingerprint"] for one in whole]
    assert compare.compare([parent])["runs"][0]["seeds"] == [3, 4, 5]


def test_faults_of_seeds_are_found_before_anything_is_written(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"server\.cohort = 9: 3 sites can train"):
        seeds.simulate(small(tiny, server={"cohort": 9}), [0, 1], output=tmp_path / "runs")
    for wrong in ([], [1, 1], [-1]):
        with pytest.raises(errors.ConfigError, match="at least one, each once, from 0"):
            seeds.simulate(small(tiny), wrong, output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 1, "seeds": ["0"], "experiment": {}}'])
def test_a_damaged_list_of_seeds(tmp_path: Path, text: str) -> None:
    (tmp_path / "seeds.json").write_text(text)
    with pytest.raises(errors.CheckpointError, match=r"seeds\.json is damaged"):
        seeds.resume(tmp_path)
    with pytest.raises(errors.CheckpointError, match=r"one run a seed.*simulate --resume"):
        run.resume(tmp_path)


def test_an_experiment_of_one_site_has_no_site_to_leave_out(tiny: Any) -> None:
    what = small(tiny, baselines=["leave-one-out"], partition={"include": ["north"]})
    with pytest.raises(errors.ConfigError, match="'leave-one-out' needs more sites than north"):
        experiment.hospitals(schema.parse(schema.Experiment, what, "x"))
