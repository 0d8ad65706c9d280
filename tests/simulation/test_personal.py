"""Personal adapters of virtual hospitals: the same bits with any number of workers, after a stop, and what is said."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.client.personal import choice, statement, tuning
from fedvfm.config import privacy, schema
from fedvfm.report import bootstrap
from fedvfm.simulation import experiment, run, settings
from fedvfm.simulation import personal as arm
from fedvfm.simulation.engines import worker_schedule
from fedvfm.state import checkpoint
from fedvfm.storage import hash_chain

SITES = ("east", "north", "west")


def values(tiny: Any, **more: Any) -> dict[str, Any]:
    return {**tiny.values, "baselines": ["local-only"], "workers": 1, "personal": {"rounds": 2}, **more}


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with personal adapters, computed in this process."""
    return run.simulate(values(tiny), output=tmp_path_factory.mktemp("personal") / "run").path


def parts(path: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Site -> its adapter, and what was found that does not hang on time and memory."""
    changing = ("seconds", "ended", "peak_mib")
    rows = {}
    for site in SITES:
        folder = path / "arms" / "personal" / site
        kept = json.loads((folder / "evaluation.json").read_text())
        plain = {key: value for key, value in kept.items() if key not in changing}
        rows[site] = (checkpoint.read(folder / "adapter.safetensors")[0].fingerprint, plain)
    return rows


def summary(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return content


@pytest.mark.skipif(not worker_schedule.can_fork(), reason="workers cannot be forked safely here")
def test_two_workers_give_the_same_bits(tiny: Any, finished: Path, tmp_path: Path) -> None:
    again = run.simulate(values(tiny, workers=2), output=tmp_path / "run")
    assert parts(again.path) == parts(finished)
    assert again.summary["benefit"] == summary(finished)["benefit"]


def test_a_stopped_run_goes_on_with_the_sites_that_are_not_finished(tiny: Any, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    before = (path / "arms" / "personal" / "north" / "evaluation.json").read_bytes()
    (path / "arms" / "personal" / "east" / "evaluation.json").unlink()
    (path / "arms" / "personal" / "east" / "adapter.safetensors").write_bytes(b"half")
    shutil.rmtree(path / "arms" / "personal" / "west")
    run.resume(path)
    assert parts(path) == parts(finished)
    assert (path / "arms" / "personal" / "north" / "evaluation.json").read_bytes() == before, "not computed again"


def test_who_stops_it_before_the_first_site_resumes_it(tiny: Any, finished: Path, tmp_path: Path) -> None:
    def stop(event: str, /, **fields: Any) -> None:
        if "train on" in str(fields.get("text")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.simulate(values(tiny), output=tmp_path / "run", observer=stop)
    assert not (tmp_path / "run" / "arms" / "personal").exists()
    run.resume(tmp_path / "run")
    assert parts(tmp_path / "run") == parts(finished)


def test_other_settings_are_another_run(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "experiment.json"
    file.write_text(file.read_text().replace('"learning_rate": 0.5', '"learning_rate": 0.4'))
    with pytest.raises(errors.CheckpointError, match="was changed after arm 'personal/"):
        run.resume(tmp_path / "run")


def test_every_hospital_has_what_it_chose_and_its_word(finished: Path) -> None:
    found = summary(finished)
    assert set(found["arms"]) == {"federated", "local-only", "personal"}
    assert found["arms"]["personal"]["rounds"] == found["rounds"]
    for site, row in found["benefit"]["sites"].items():
        kept = json.loads((finished / "arms" / "personal" / site / "evaluation.json").read_text())
        adapter, _, _ = checkpoint.read(finished / "arms" / "personal" / site / "adapter.safetensors")
        assert adapter.fingerprint == kept["fingerprint"]
        assert (row["choice"], row["units"]) == (choice.PREFERENCE[0], 2), "one validation patient: the default"
        assert row["chosen"] == found["arms"]["personal"]["sites"][site]["dice"]
        assert row["personal"] == kept["personal"]["sites"][site]["dice"]
        assert row["global"] == found["arms"]["federated"]["sites"][site]["dice"]
        assert row["local_only"] == pytest.approx(found["arms"]["local-only"]["sites"][site]["dice"])
        assert row["difference"]["mean"] == pytest.approx(row["chosen"] - row["local_only"])
        assert row["difference"]["low"] is None, "two patients: no interval"
        assert row["word"] == statement.TOO_FEW
    assert found["benefit"]["counts"]["personal"] == {"gain": 0, "lose": 0, "own": 0, "cannot tell": 3}
    assert set(found["benefit"]["macro"]) == {"personal", "global"}


def test_it_stands_in_journal_tables_and_first_in_the_report(finished: Path) -> None:
    lines = hash_chain.read(finished / "arms" / "personal" / "east" / "journal.jsonl")
    assert [line["round"] for line in lines] == [3, 4], "after the federation's two"
    assert all(line["train"]["east"]["loss"] > 0 for line in lines)
    with (finished / "metrics.csv").open(newline="") as file:
        rows = {(row["arm"], row["split"], row["site"], row["metric"]) for row in csv.DictReader(file)}
    assert ("personal/east", "test", "east", "dice") in rows
    assert ("personal/east", "train", "east", "loss") in rows
    report = (finished / "report.html").read_text()
    assert report.index('<section id="benefit"') < report.index('<section id="arms"')
    assert "Hospitals that gain by joining" in report


def test_the_folder_of_the_adapter_holds_the_global_one(finished: Path) -> None:
    adapter, _, _ = checkpoint.read(finished / "adapter" / "fedvfm_adapter.safetensors")
    assert adapter.fingerprint == summary(finished)["fingerprint"]


def test_who_wants_none_has_none(tiny: Any) -> None:
    parsed = experiment.parse(values(tiny), "experiment")
    off = parsed.model_copy(update={"personal": schema.PersonalConfig(enabled=False)})
    alone = parsed.model_copy(update={"baselines": ("pooled",)})
    plain = parsed.model_copy(update={"personal": schema.PersonalConfig()})
    assert [bool(arm.arms(each, SITES)) for each in (parsed, plain, off, alone)] == [True, True, False, False]
    said = parsed.model_copy(update={"baselines": (), "personal": schema.PersonalConfig(enabled=True)})
    assert arm.arms(said, SITES)


def test_it_is_no_part_of_what_tells_runs_apart(finished: Path) -> None:
    keys = settings.of(json.loads((finished / "experiment.json").read_text()))
    assert not [key for key in keys if key.startswith("personal")]


def test_what_never_leaves_is_trained_without_noise_at_half_the_rate() -> None:
    recipe = experiment.load("nuclei-private").recipe
    own = tuning.recipe_of(recipe, schema.PersonalConfig())
    assert recipe.privacy.mechanism != privacy.NO_MECHANISM
    assert own.privacy.mechanism == privacy.NO_MECHANISM
    assert own.rounds == recipe.rounds
    assert own.optimiser.head_learning_rate == pytest.approx(0.5 * (recipe.optimiser.head_learning_rate or 0))


@pytest.mark.parametrize(
    ("chosen", "low", "high", "gains", "word"),
    [
        (choice.PERSONAL, 0.01, 0.2, bootstrap.GAINS, statement.JOINED),
        (choice.GLOBAL, -0.2, -0.01, bootstrap.LOSES, statement.WORSE),
        (choice.PERSONAL, -0.1, 0.2, bootstrap.UNKNOWN, statement.NO_DIFFERENCE),
        (choice.PERSONAL, None, None, bootstrap.UNKNOWN, statement.TOO_FEW),
        (choice.ALONE, None, None, bootstrap.UNKNOWN, statement.DECLINED),
    ],
)
def test_the_word_of_a_site(chosen: str, low: float | None, high: float | None, gains: str, word: str) -> None:
    assert statement.word(chosen, bootstrap.Difference(0.6, 0.5, 0.1, low, high, 12, gains)) == word
