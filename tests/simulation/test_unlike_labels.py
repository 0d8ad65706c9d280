"""A whole simulation in which each hospital labels another class: what trains, what is scored, what is said."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.simulation import experiment, run
from fedvfm.storage import hash_chain
from tests.simulation import drawn_cases

pytestmark = pytest.mark.slow
SPLITS = ("train",) * 3 + ("val",) * 2 + ("test",) * 3


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory, tiny_dino: Path) -> dict[str, Any]:
    """Two sites; every mask holds a box and a bar, and each site labels one of them."""
    folder = tmp_path_factory.mktemp("two-classes")
    rng, drawn = np.random.default_rng(3), []
    for site in ("east", "west"):
        for at, split in enumerate(SPLITS):
            mask = np.zeros((56, 56), dtype=np.uint8)
            top = int(rng.integers(4, 12))
            mask[top : top + 16, 6:26] = 1
            mask[top + 24 : top + 32, 30:50] = 2
            grey = (60 * rng.random(mask.shape) + 90 * mask).astype(np.uint8)
            drawn.append(({"id": f"{site}-{at}", "patient": f"{site} {at}", "site": site, "split": split}, grey, mask))
    drawn_cases.pairs(folder, drawn)
    return {
        "name": "unlike-labels",
        "baselines": ["local-only", "pooled", "classical"],
        "workers": 1,
        "data": {
            "source": "folder",
            "path": str(folder),
            "options": {"class_names": ["background", "box", "bar"]},
        },
        "partition": {"labelled": {"east": ["box"], "west": ["bar"]}},
        "recipe": {
            "rounds": 1,
            "threads": 1,
            "backbone": {"name": str(tiny_dino)},
            "adapter": {"rank": 2, "layers": [3]},
            "task": {"partial_labels": True},
            "data": {"class_names": ["background", "box", "bar"], "input_size": [56, 56]},
        },
    }


def test_each_hospital_is_trained_and_scored_on_what_it_labels(values: dict[str, Any], tmp_path: Path) -> None:
    made = run.simulate(values, output=tmp_path / "run")
    (line,) = hash_chain.read(made.path / "journal.jsonl")
    assert line["labelled"] == {"east": ["box"], "west": ["bar"]}
    scored: dict[tuple[str, str], set[str]] = {}
    with (made.path / "metrics.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["split"] == "test" and row["metric"].startswith("dice_"):
                scored.setdefault((row["arm"], row["site"]), set()).add(row["metric"])
    arms = ("federated", "pooled", "classical", "local-only/east")
    assert {key: value for key, value in scored.items() if key[0] in arms} == {
        (arm, site): {name} for arm in arms for site, name in (("east", "dice_box"), ("west", "dice_bar"))
    }
    assert scored["personal/east", "east"] == {"dice_box"}
    report = (made.path / "report.html").read_text()
    assert "labels only box: it is trained and scored on these alone" in report
    assert "Attention: sites are scored on unlike classes" in report
    with (made.path / "samples.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["arm"], row["metric"]) == ("federated", "dice")]
    tested = {(row["site"], row["sample"]): float(row["value"]) for row in rows}
    shown = re.findall(r"<figcaption>(east|west): ([^<,]+), Dice ([0-9.]+)<", report)
    assert len(shown) == 6
    for site, name, value in shown:
        assert float(value) == pytest.approx(tested[site, name], abs=6e-4), "a picture is scored as the test was"


def test_leave_one_out_needs_another_site_that_labels_it(values: dict[str, Any]) -> None:
    what = experiment.parse({**values, "baselines": ["leave-one-out"]}, "experiment")
    with pytest.raises(errors.ConfigError, match="without 'west' has no site that labels bar"):
        experiment.hospitals(what)
