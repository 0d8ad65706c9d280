"""Scores with noise: what one patient may move, what they are charged, and what leaves where they cannot be charged."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.client import privacy_report, site_file
from fedvfm.client.gate import policy, private_scores
from fedvfm.client.training import evaluator
from fedvfm.client.training import site as sites
from fedvfm.config import privacy, schema
from fedvfm.data import sample as samples
from fedvfm.ledger import summary
from fedvfm.privacy import accountant, randomness
from fedvfm.protocol import protocol
from fedvfm.tasks import classification, metrics
from tests.client import private_site

BUDGET = privacy.Budget(data_set="discs", epsilon=8.0, delta=1e-5, unit="patient")


class Fixed:
    """Draws that are known."""

    def normal(self, size: Any) -> NDArray[np.float64]:
        return np.full(size, 1.0)

    def uniform(self, size: Any) -> NDArray[np.float64]:
        return np.full(size, 0.5)


# -- the mechanism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "noise"), [(0.5, 8.2), (1.0, 4.3), (4.0, 1.2)])
def test_one_release_comes_to_the_epsilon_and_no_less_noise_does(epsilon: float, noise: float) -> None:
    spent = private_scores.event(epsilon, BUDGET, 4)
    assert (spent.unit, spent.sample_rate, spent.steps, spent.clip) == ("patient", 1.0, 1, 2.0)
    assert spent.noise_multiplier == pytest.approx(noise, rel=0.15)
    assert accountant.epsilon(accountant.steps(1.0, spent.noise_multiplier, 1), 1e-5, "rdp").value <= epsilon
    assert accountant.epsilon(accountant.steps(1.0, 0.98 * spent.noise_multiplier, 1), 1e-5, "rdp").value > epsilon


def test_an_epsilon_that_no_noise_reaches() -> None:
    with pytest.raises(errors.ConfigError):
        private_scores.event(1e-9, BUDGET, 1)


def test_the_noise_by_hand() -> None:
    """k = 4 means over 200 patients: the sums move by sqrt(4) at most, so the noise on a mean is 2 sigma / 200."""
    spent = private_scores.event(4.0, BUDGET, 4)
    means = dict.fromkeys(("brier", "dice", "dice_cell", "iou"), 0.25)
    found = private_scores.noised(means, 200, spent, Fixed())
    one = spent.noise_multiplier * 2.0 / 200
    assert found["dice"] == pytest.approx(0.25 + one, abs=1 / 400)
    assert found["brier"] == pytest.approx(0.25 + 2 * one, abs=1 / 400), "whose bound is 2"


def test_the_noise_is_what_is_charged() -> None:
    spent = private_scores.event(2.0, BUDGET, 1)
    drawn = [private_scores.noised({"dice": 0.5}, 1000, spent, randomness.System())["dice"] for _ in range(4000)]
    assert np.std(drawn) == pytest.approx(spent.noise_multiplier / 1000, rel=0.06)
    assert np.mean(drawn) == pytest.approx(0.5, abs=5 * spent.noise_multiplier / 1000 / math.sqrt(4000))


def test_what_leaves_is_a_score_on_the_grid_of_its_patients() -> None:
    spent = private_scores.event(0.1, BUDGET, 1)
    for _ in range(200):
        value = private_scores.noised({"dice": 0.9}, 20, spent, randomness.System())["dice"]
        assert 0.0 <= value <= 1.0
        assert value * 40 == pytest.approx(round(value * 40))


def test_one_patient_moves_the_means_by_no_more_than_is_charged() -> None:
    """Whatever his images are, and however many."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        names = sorted({"dice", "iou", "nsd", "dice_a", "dice_b"})
        n, k = int(rng.integers(2, 30)), len(names)
        before = rng.random((n, k))
        after = before.copy()
        after[rng.integers(n)] = rng.integers(0, 2, k)
        clip = private_scores.event(1.0, BUDGET, k).clip
        assert np.linalg.norm(before.mean(axis=0) - after.mean(axis=0)) <= clip / n + 1e-12


def test_means_of_bounded_values_alone() -> None:
    free = ["assd", "auroc", "balanced_accuracy", "brier", "dice", "dice_cell", "ece", "hd95", "iou", "macro_f1", "nsd"]
    assert private_scores.names(free, dict.fromkeys(free, 0.5)) == ["brier", "dice", "dice_cell", "iou", "nsd"]
    assert private_scores.names(free, {"dice": 0.5}) == ["dice"]


def test_what_a_metric_set_says_of_each_sample_is_within_its_bound_and_its_mean_the_value() -> None:
    rng = np.random.default_rng(1)
    cells = metrics.SegmentationScores(("rest", "a", "b"))
    kinds = metrics.ClassificationScores(("x", "y", "z"))
    for number in range(12):
        cells.add(str(number), rng.integers(0, 3, (6, 6)), rng.integers(0, 3, (6, 6)))
        kinds.add(str(number), rng.dirichlet(np.full(3, 0.1)), int(rng.integers(3)))
    assert set(cells.bounded()) == {"dice", "iou", "nsd", "dice_a", "dice_b"}
    assert set(kinds.bounded()) == {"brier"}
    for scores in (cells, kinds):
        for name, values in scores.bounded().items():
            assert 0.0 <= min(values) <= max(values) <= (metrics.bound(name) or 0.0)
            assert np.mean(values) == pytest.approx(scores.value()[name])


# -- at a site ---------------------------------------------------------------------------------------------------------


class Scoring(private_site.Training):
    """As a site's app, with what each patient's images come to."""

    def __call__(self, message: Message, context: Context) -> Message:
        reply = super().__call__(message, context)
        if message.metadata.message_type != protocol.EVALUATE:
            return reply
        task = protocol.decode_task(message.content)
        told = {"dice": 0.5, "iou": 0.25, "hd95": 3.0}
        made = protocol.Evaluation("north", task.round, 6, told, patients={"dice": 0.5, "iou": 0.25})
        return Message(protocol.encode_evaluation(made), reply_to=message)


def score(number: int, split: str = "val") -> protocol.Task:
    return protocol.Task(private_site.make_recipe(evaluation={"every": 1}), number, private_site.START, split)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., private_site.Site]:
    def made(epsilon: str = "metrics_epsilon = 1.0", budget: str = private_site.BUDGET) -> private_site.Site:
        asked = private_site.make_recipe(evaluation={"every": 1})
        site = private_site.Site(tmp_path, asked, budget)
        text = site.settings.read_text().replace("[policy]\n", f"[policy]\n{epsilon}\n", 1)
        text = text.replace('metrics = ["', 'metrics = ["hd95", "').replace("min_units = 5", "min_units = 2")
        site.settings.write_text(text)
        return again(tmp_path)

    return made


def again(folder: Path) -> private_site.Site:
    """As after a restart."""
    site = private_site.Site(folder)
    site.app = Scoring()
    site.door._app = site.app
    return site


def test_scores_leave_with_noise_charged_before_and_the_same_again(
    make: Callable[..., private_site.Site], tmp_path: Path
) -> None:
    site = make()
    reply = site.ask(score(0), protocol.EVALUATE)
    assert not reply.has_error(), (protocol.error_word(reply), site.faults)
    said = protocol.decode_evaluation(reply.content)
    assert set(said.metrics) == {"dice", "iou"}, "a distance has no bound"
    assert "patients" not in reply.content
    (line,) = site.charged()
    assert (line["mechanism"], line["round"], line["sample_rate"], line["steps"]) == ("metrics", 0, 1.0, 1)
    assert line["clip"] == pytest.approx(math.sqrt(2))
    hospital = site_file.hospital(site.terms.config, private_site.make_recipe())
    assert len(site.book.records.find(line["records"]) or ()) == len(hospital.val), "those that were scored, no others"
    sent = [one for one in site.where.audit.entries if one["event"] == "sent"][-1]
    assert sent["ledger"] == str(site.book.mark), "a ledger that is cut later shows"

    later = again(tmp_path)
    second = later.ask(score(0), protocol.EVALUATE)
    assert protocol.digest(second.content) == protocol.digest(reply.content)
    assert len(later.charged()) == 1
    later.ask(score(1, "test"), protocol.EVALUATE)


def test_scores_take_no_round_off_what_the_recipe_will_spend(make: Callable[..., private_site.Site]) -> None:
    site, asked = make(), private_site.make_recipe(evaluation={"every": 1})
    hospital, budget = site_file.hospital(site.terms.config, asked), site.terms.config.privacy
    before = privacy_report.look(asked, hospital, budget)
    assert not site.ask(score(0), protocol.EVALUATE).has_error()
    assert [line["mechanism"] for line in site.charged()] == ["metrics"]
    now = privacy_report.look(asked, hospital, budget)
    assert before is not None
    assert now is not None
    assert now.after == before.after, "all rounds are still to come"
    shown = summary.build(site.book.path.parent, budget)["data_sets"][0]
    assert (shown["releases"], shown["scores"]) == (1, 1)


def test_a_budget_that_is_used_up_lets_no_score_out(make: Callable[..., private_site.Site]) -> None:
    site = make("metrics_epsilon = 6.0", private_site.BUDGET.replace("epsilon = 8.0", "epsilon = 5.0"))
    reply = site.ask(score(0), protocol.EVALUATE)
    said = protocol.decode_evaluation(reply.content)
    assert (dict(said.metrics), said.num_examples) == ({}, 6)
    assert site.charged() == []


def test_without_it_scores_are_rounded_and_nothing_is_charged(make: Callable[..., private_site.Site]) -> None:
    site = make("")
    said = protocol.decode_evaluation(site.ask(score(0), protocol.EVALUATE).content)
    assert said.metrics == pytest.approx({"dice": 0.5, "iou": 0.25, "hd95": 3.0}, abs=0.5)
    assert said.metrics["dice"] == 0.5
    assert not (site.folder / "fedvfm-ledger" / "ledger.jsonl").exists() or site.charged() == []


@pytest.mark.parametrize("budget", ["", private_site.BUDGET.replace("record", "site")])
def test_it_needs_a_budget_that_counts_images_or_patients(tmp_path: Path, budget: str) -> None:
    text = f'name = "north"\n[data]\nsource = "folder"\npath = "{tmp_path}"\n[policy]\nmetrics_epsilon = 1.0\n'
    (tmp_path / "north.toml").write_text(text + (f"[privacy]\n{budget}" if budget else ""))
    with pytest.raises(errors.ConfigError):
        site_file.read_site(tmp_path / "north.toml")
    assert schema.PolicyConfig().metrics_epsilon is None


def test_no_score_tells_of_a_column_that_few_patients_have_a_value_in() -> None:
    target = {"kind": "regression", "ranges": [[0, 9], [0, 9]], "centres": [1, 1], "scales": [1, 1]}
    names = {"class_names": ["age", "volume"]}
    chosen = schema.parse(
        schema.Recipe,
        {"backbone": {"name": "dino"}, "task": {"kind": "classification"}, "data": names, "target": target},
        "recipe",
    )
    having: dict[str, set[str]] = {}
    for at in range(10):
        sample = samples.Sample(str(at), patient=str(at), values=(1.0, 2.0 if at < 3 else None))
        evaluator._note_classes(having, sample, sites.NO_IMAGE, classification.Classification(chosen))
    known = {name: len(subjects) for name, subjects in having.items()}
    scores = {"one_minus_nmae": 0.5, "mae_age": 0.5, "r2_age": 0.5, "mae_volume": 0.5, "r2_volume": 0.5}
    leaving = policy.release_scores(schema.PolicyConfig(metrics=("*",), min_units=4), scores, 10, known)
    assert set(leaving) == {"one_minus_nmae", "mae_age", "r2_age"}
