"""A whole simulation in which hospitals have no labels: who trains when, what it weighs, what is compared and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.report import rounds
from fedvfm.simulation import experiment, run, run_folder
from fedvfm.simulation.results import compare
from fedvfm.storage import hash_chain
from fedvfm.tracking import values as tracked
from tests.simulation import drawn_cases

SPLITS = ("train",) * 4 + ("val",) + ("test",) * 2
SITES = ("east", "north", "west")


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three sites whose masks hold a bright box; one labels, the others do not. Half of the masks are there in vain."""
    folder = tmp_path_factory.mktemp("boxes")
    rng, drawn = np.random.default_rng(3), []
    for site in SITES:
        for at, split in enumerate(SPLITS):
            mask = np.zeros((16, 16), dtype=np.uint8)
            top, left = rng.integers(1, 7, 2)
            mask[top : top + 8, left : left + 8] = 1
            grey = (40 * rng.random(mask.shape) + 200 * mask).astype(np.uint8)
            drawn.append(({"id": f"{site}-{at}", "patient": f"{site} {at}", "site": site, "split": split}, grey, mask))
    drawn_cases.pairs(folder, drawn)
    return {
        "name": "unlabelled",
        "baselines": ["local-only", "pooled", "classical"],
        "workers": 1,
        "data": {"source": "folder", "path": str(folder)},
        "partition": {"unlabelled": ["north", "west"]},
        "recipe": {
            "rounds": 3,
            "threads": 1,
            "backbone": {"name": "unet", "options": {"channels": [4, 8]}},
            "adapter": {"kind": "full"},
            "optimiser": {"learning_rate": 0.01, "local_epochs": 4, "batch_size": 2},
            "data": {
                "class_names": ["background", "box"],
                "input_size": [16, 16],
                "augment": ["flip", "rot90", "intensity", "noise"],
            },
            "unlabelled": {"threshold": 0.6, "weight": 0.5, "warmup_rounds": 1},
        },
    }


@pytest.fixture(scope="module")
def made(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> run.Result:
    return run.simulate(values, output=tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.slow
def test_sites_without_labels_wait_and_then_count_less(made: run.Result) -> None:
    first, second, third = hash_chain.read(made.path / "journal.jsonl")
    assert first["cohort"] == ["east"]
    assert "without_labels" not in first
    for line in (second, third):
        assert line["cohort"] == list(SITES)
        assert line["without_labels"] == ["north", "west"]
        assert not line["refused"]
        assert 1 <= line["examples"]["north"] <= line["examples"]["east"] == 4
        counts = {site: max(1, round(line["examples"][site] * 0.5)) for site in ("north", "west")} | {"east": 4}
        assert line["weights"] == {site: count / sum(counts.values()) for site, count in sorted(counts.items())}
        assert list(line["validation"]) == ["east"], "no metrics of validation come from where nothing is labelled"
    assert any(line["norms"]["north"] > 0 for line in (second, third)), "it learns from what the adapter is sure of"


@pytest.mark.slow
def test_only_what_needs_no_label_is_compared_there(made: run.Result) -> None:
    arms = {path.name for path in (made.path / "arms" / "local-only").iterdir()}
    assert arms == {"east"}
    (line, *_) = hash_chain.read(made.path / "arms" / "pooled" / "journal.jsonl")
    assert line["examples"] == {"pooled": 4}
    assert set(made.summary["arms"]["federated"]["sites"]) == set(SITES), "virtual hospitals keep their test's labels"
    assert "site &#x27;north&#x27; has no labels to train or validate with" in (made.path / "report.html").read_text()


@pytest.mark.slow
def test_models_of_sites_with_labels_are_tested_by_class_at_those_without(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """The classes of its test are those of no model of its own."""
    folder, rows = tmp_path / "data", ["id,patient,site,split,label"]
    (folder / "images").mkdir(parents=True)
    for site in SITES[:2]:
        for at in range(12):
            stem, kind = f"{site}-{at}", ("ill", "well")[at % 2]
            Image.fromarray(np.full((16, 16), 60 + 120 * (at % 2) + at, dtype=np.uint8)).save(
                folder / "images" / f"{stem}.png"
            )
            rows.append(f"{stem},{site} {at},{site},{'train' if at < 6 else 'val' if at < 8 else 'test'},{kind}")
    (folder / "labels.csv").write_text("\n".join(rows))
    data = {**values["recipe"]["data"], "class_names": ["ill", "well"]}
    recipe = {**values["recipe"], "rounds": 2, "task": {"kind": "classification"}, "data": data}
    own = {"data": {"source": "folder", "path": str(folder)}, "partition": {"unlabelled": ["north"]}, "recipe": recipe}
    made = run.simulate({**values, **own, "baselines": ["local-only"]}, output=tmp_path / "run")
    scored = compare.scores(run_folder.RunFolder(made.path), made.summary)
    assert set(scored[compare.LOCAL].sites) == {"east"}
    assert set(scored[compare.ABROAD].sites) == {"north"}
    assert "their means are of fewer sites" in (made.path / "report.html").read_text()


@pytest.mark.slow
def test_several_processes_and_a_resumed_run_make_the_same_adapter(
    made: run.Result, values: dict[str, Any], tmp_path: Path
) -> None:
    again = run.simulate({**values, "baselines": [], "workers": 2}, output=tmp_path / "run")
    assert again.summary["fingerprint"] == made.summary["fingerprint"]
    shorter = {**values, "baselines": [], "recipe": {**values["recipe"], "codec": "int8"}}
    assert run.simulate(shorter, output=tmp_path / "coded").summary["fingerprint"] != made.summary["fingerprint"]


@pytest.mark.slow
def test_it_holds_under_a_mechanism_at_the_site(values: dict[str, Any], tmp_path: Path) -> None:
    own = {"mechanism": "record-level", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}
    recipe = {**values["recipe"], "rounds": 2, "privacy": own, "aggregation": {"weighting": "uniform"}}
    made = run.simulate({**values, "baselines": [], "recipe": recipe}, output=tmp_path / "run")
    line = hash_chain.read(made.path / "journal.jsonl")[-1]
    assert line["without_labels"] == ["north", "west"]
    assert line["weights"] == {"east": 0.5, "north": 0.25, "west": 0.25}


@pytest.mark.slow
def test_under_masks_they_weigh_the_same(values: dict[str, Any], tmp_path: Path) -> None:
    partition = {"kind": "iid", "sites": 4, "unlabelled": ["hospital-4"]}
    plain = {**values["recipe"], "rounds": 2}
    hidden = {**plain, "min_sites": 3, "secure_aggregation": {"clip_norm": 100.0}}
    lines = []
    for name, recipe in (("plain", plain), ("hidden", hidden)):
        made = run.simulate(
            {**values, "baselines": [], "partition": partition, "recipe": recipe}, output=tmp_path / name
        )
        lines.append(hash_chain.read(made.path / "journal.jsonl")[-1])
    first, second = lines
    counts = {site: count for site, count in first["examples"].items() if site != "hospital-4"}
    own = max(1, round(0.5 * first["examples"]["hospital-4"]))
    assert second["secure_aggregation"]["weight"] == sum(counts.values()) + own
    assert second["secure_aggregation"]["loss"] is None, "a loss without labels is none to join with others"


def test_masks_need_enough_sites_with_labels_for_the_first_rounds(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**values["recipe"], "min_sites": 3, "secure_aggregation": {"clip_norm": 100.0}}
    with pytest.raises(errors.ConfigError, match="rounds of the 1 sites with labels alone"):
        run.simulate({**values, "baselines": [], "recipe": recipe}, output=tmp_path / "run")


@pytest.mark.parametrize(
    ("partition", "recipe", "said"),
    [
        ({"unlabelled": ["nrth"]}, {}, "no such hospital 'nrth'; nearest: 'north'"),
        ({"unlabelled": list(SITES)}, {}, "none of 3 sites has labels"),
        ({"unlabelled": ["north"]}, {"unlabelled": None}, "takes no site without labels"),
    ],
)
def test_what_cannot_be_is_said_before_anything_trains(
    values: dict[str, Any], partition: dict[str, Any], recipe: dict[str, Any], said: str
) -> None:
    own = {key: value for key, value in {**values["recipe"], **recipe}.items() if value is not None}
    what = experiment.parse({**values, "partition": partition, "recipe": own}, "experiment")
    with pytest.raises(errors.ConfigError, match=said):
        experiment.hospitals(what)


def test_leave_one_out_keeps_a_site_with_labels(values: dict[str, Any]) -> None:
    what = experiment.parse({**values, "baselines": ["leave-one-out"]}, "experiment")
    with pytest.raises(errors.ConfigError, match="without 'east' has no site with labels"):
        experiment.hospitals(what)


@pytest.mark.slow
def test_real_processes_make_the_same_adapter(made: run.Result, values: dict[str, Any], tmp_path: Path) -> None:
    there = run.simulate({**values, "baselines": [], "engine": "deployment"}, output=tmp_path / "run")
    assert there.summary["fingerprint"] == made.summary["fingerprint"]
    assert hash_chain.read(there.path / "journal.jsonl")[-1]["without_labels"] == ["north", "west"]


def test_labels_that_are_not_there_cannot_be_poisoned(values: dict[str, Any]) -> None:
    def said(kind: str, site: str) -> list[str]:
        what = experiment.parse({**values, "attack": {"kind": kind, "sites": [site]}}, "experiment")
        return experiment.site_faults(what, SITES)

    (fault,) = said("label-flip", "north")
    assert "north has no labels to poison" in fault
    assert not said("label-flip", "east")
    assert not said("sign-flip", "north")


def test_the_mean_loss_of_a_round_is_of_sites_with_labels() -> None:
    line: dict[str, Any] = {"train": {"east": {"loss": 0.5}, "north": {"loss": 0.1}}, "examples": {}}
    assert rounds.mean_loss(line) == pytest.approx(0.3)
    line["without_labels"] = ["north"]
    assert rounds.mean_loss(line) == 0.5
    told = tracked.of_line(line, sites=True)
    assert (told["train/loss"], told["site/north/train/loss"]) == (0.5, 0.1)
