"""The baselines of classification that no federation trains: against scikit-learn, by hand, and in a real run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from fedvfm.simulation import linear_probe, run


@pytest.fixture(scope="module")
def references(tiny_classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny classification run again, with these baselines."""
    values = json.loads((tiny_classes / "experiment.json").read_text())
    values["baselines"] = ["classical", "majority"]
    return run.simulate(values, output=tmp_path_factory.mktemp("references") / "run").path


def blobs(classes: int, unequal: bool = True) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    counts = [60, 20, 8][:classes] if unequal else [30] * classes
    labels = np.repeat(np.arange(classes), counts)
    return rng.normal(size=(len(labels), 12)) * 3 + 5 + labels[:, None] * rng.normal(size=12), labels


@pytest.mark.parametrize("classes", [2, 3])
def test_it_is_scikit_learns_balanced_logistic_regression(classes: int) -> None:
    features, labels = blobs(classes)
    own = linear_probe.fit(features, labels, classes)
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    other = LogisticRegression(C=2.0 if classes == 2 else 1.0, class_weight="balanced", max_iter=5000, tol=1e-9)
    other.fit(standard, labels)
    found = np.stack([own.predict(row) for row in features])
    # Of two classes scikit-learn has one vector w = w1 - w0, whose penalty is twice that of the pair.
    assert found == pytest.approx(other.predict_proba(standard), abs=2e-3)


def test_a_class_without_training_images_has_no_chance_and_constant_features_no_say() -> None:
    features, labels = blobs(2)
    features[:, 0] = 7.0
    own = linear_probe.fit(features, labels * 2, 3)
    found = own.predict(features[0])
    assert found[1] == 0.0
    assert found.sum() == pytest.approx(1.0)
    assert own.weight[:, 0] == pytest.approx(0.0)
    assert linear_probe.fit(features, labels * 2, 3).weight.tobytes() == own.weight.tobytes()


def test_majority_is_the_shares_of_the_training_labels() -> None:
    assert linear_probe.majority([0, 2, 2, 2], 3).tolist() == [0.25, 0.0, 0.75]
    assert linear_probe.majority([], 4).tolist() == [0.25] * 4


def test_both_stand_beside_the_federation(references: Path) -> None:
    made = json.loads((references / "summary.json").read_text())
    assert set(made["arms"]) == {"federated", "classical", "majority"}
    assert made["arms"]["majority"]["macro"] == 0.5
    assert made["arms"]["majority"]["rounds"] == 0
    assert "logistic regression" in made["arms"]["classical"]["rule"]
    assert made["arms"]["classical"]["macro"] == 1.0, "dark and bright images are told apart by any features"
    codes = {row["code"] for row in made["findings"] if row["headline"]}
    assert codes == {"constant-answer", "baseline-ahead"}
    page = (references / "report.html").read_text()
    assert page.index("Attention: one answer for every test image") < page.index("<main>")
    assert "Answers, class by class" in page
    assert made["answers"]["all"]["commonest"]["share"] == 1.0
