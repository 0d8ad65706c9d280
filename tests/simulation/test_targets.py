"""Targets beside one class through the real simulation, prediction and export."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.config import target as target_config
from fedvfm.inference import forms, predict
from fedvfm.simulation import experiment, run, untrained
from tests.simulation import drawn_cases

TARGETS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "ordinal": (["plain", "spot"], {}),
    "multi-label": (["bright", "odd"], {"prevalence": [0.5, 0.3]}),
    "survival": (["months", "died"], {"bins": [6, 12, 24], "units": ["months", "yes or no"]}),
    "cox": (["months", "died"], {"bins": [6, 24], "units": ["months", "yes or no"]}),
    "regression": (["size", "age"], {"ranges": [[0, 10], [0, 100]], "centres": [2, 50], "scales": [2, 20]}),
}
METRICS = {
    "survival": {"one_minus_ibs", "calibration_error", "event_share"},
    "cox": {"c_index", "c_index_uno", "event_share"},
    "ordinal": {"quadratic_kappa", "mae", "balanced_accuracy"},
    "multi-label": {"one_minus_brier", "auroc", "auroc_bright", "auprc_bright", "balanced_accuracy"},
    "regression": {"one_minus_nmae", "mae_size", "mae_age", "r2_size"},
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes with a spot or none; columns that follow it, one value missing."""
    folder = drawn_cases.volumes(tmp_path_factory.mktemp("targets") / "data", ("east", "west"))
    with (folder / "index.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for at, row in enumerate(rows):
        spot = row["label"] == "spot"
        row |= {"bright": str(int(spot)), "odd": str(at // 2 % 2) if at else "", "size": "6" if spot else "0"}
        row["age"] = str(40 + at)
        row |= {"months": f"{5 if spot else 30}", "died": str(int(spot))}
    drawn_cases.table(folder / "index.csv", rows)
    return folder


def _values(drawn: Path, tiny_dino: Path, kind: str, **more: Any) -> dict[str, Any]:
    names, target = TARGETS[kind]
    recipe = drawn_cases.recipe(tiny_dino, target={"kind": kind, **target})
    recipe["data"] = {**recipe["data"], "class_names": names}
    data = {"source": "folder", "path": str(drawn)}
    return {"name": kind, "baselines": [], "data": data, "recipe": {**recipe, **more}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(TARGETS))
def test_a_target_is_trained_scored_predicted_and_exported(
    kind: str, drawn: Path, tiny_dino: Path, tmp_path: Path
) -> None:
    classical = ["classical"] if kind in ("cox", "survival") else []
    values = {**_values(drawn, tiny_dino, kind), "baselines": ["majority", *classical]}
    finished = run.simulate(values, output=tmp_path / "run")
    federated = finished.summary["arms"]["federated"]
    for name in classical:
        assert METRICS[kind] <= finished.summary["arms"][name]["sites"]["east"].keys()
        assert "Cox regression" in finished.summary["arms"][name]["rule"]
    assert METRICS[kind] <= federated["sites"]["east"].keys()
    assert finished.summary["primary"] in finished.summary["arms"]["majority"]["sites"]["east"]
    assert finished.summary["primary"] in METRICS[kind]
    assert (finished.path / "report.html").stat().st_size
    # What is predicted is what was scored.
    with (finished.path / "samples.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == "federated"]
    column = {"ordinal": "probability_1", "survival": "survival_0", "cox": "log_risk"}.get(kind, "answer_1")
    scored = {row["sample"]: float(row["value"]) for row in rows if row["metric"] == column}
    images = {f"image-{at:04d}": path for at, path in enumerate(sorted((drawn / "images").iterdir()), 1)}
    summary = predict.predict(finished.path / "adapter", images[min(scored)], tmp_path / "out")
    (row,) = summary["inputs"]
    answers = row["probabilities"] if kind == "ordinal" else row["values"]
    assert list(answers.values())[0 if kind == "cox" else 1] == pytest.approx(scored[min(scored)], rel=1e-4, abs=1e-5)
    with (tmp_path / "out" / ("classes.csv" if kind == "ordinal" else "values.csv")).open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert next(iter(line)) == "id"
    forms.export_adapter(finished.path / "adapter", tmp_path / "onnx", "onnx")
    card = (tmp_path / "onnx" / "README.md").read_text()
    words = {"ordinal": "grades", "multi-label": "sigmoid", "regression": "values in", "survival": "each interval"}
    words["cox"] = "the hazard"
    assert words[kind] in card
    assert "- classes, in the order" not in card
    assert json.loads((finished.path / "summary.json").read_text())["primary"] == finished.summary["primary"]


@pytest.mark.parametrize(
    ("target", "values", "expected"),
    [
        ({"kind": "multi-label"}, [(1.0, None), (0.0, None), (1.0, None), (1.0, None)], [0.75, 0.5]),
        ({"kind": "regression", "centres": [7.0, 8.0]}, [(1.0, None), (2.0, None)], [1.5, 8.0]),
        (
            {"kind": "survival", "bins": [1.0, 4.0, 9.0]},
            [(2.0, 1.0), (3.0, 0.0), (5.0, 1.0), (9.5, 0.0)],
            [1.0, 0.75, 0.375],
        ),
    ],
    ids=["labels", "numbers", "survival"],
)
def test_what_is_usual_is_known_by_hand(target: dict[str, Any], values: list[Any], expected: list[float]) -> None:
    chosen = schema.parse(target_config.TargetConfig, target, "target")
    assert untrained.usual(values, chosen).tolist() == pytest.approx(expected)


def test_what_knows_classes_alone_is_refused(drawn: Path, tiny_dino: Path) -> None:
    values = _values(drawn, tiny_dino, "regression")
    attack = {"kind": "label-flip", "sites": ["east"]}
    what = experiment.parse({**values, "baselines": ["classical"], "attack": attack}, "targets")
    with pytest.raises(errors.ConfigError) as caught:
        experiment.examine(what)
    told = " ".join(caught.value.faults)
    assert "'classical' is for one class a sample" in told
    assert "attack.kind = 'label-flip'" in told


@pytest.mark.parametrize("mechanism", ["record-level", "patient-level"])
def test_cox_has_no_gradient_of_one_case_to_clip(drawn: Path, tiny_dino: Path, mechanism: str) -> None:
    privacy = {"mechanism": mechanism, "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}
    more: dict[str, Any] = {"privacy": privacy, "aggregation": {"weighting": "uniform"}}
    values = _values(drawn, tiny_dino, "cox", **more)
    with pytest.raises(errors.ConfigError) as caught:
        experiment.examine(experiment.parse(values, "cox"))
    assert any("is no sum over them" in fault for fault in caught.value.faults)
    experiment.examine(experiment.parse(_values(drawn, tiny_dino, "survival", **more), "survival"))
