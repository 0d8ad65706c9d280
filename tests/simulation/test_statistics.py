"""Intervals and paired tests: hand arithmetic, textbook widths, naive loops, scipy, and coverage."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from scipy import stats

from fedvfm import errors
from fedvfm.report import bootstrap
from fedvfm.simulation.results import statistics
from fedvfm.simulation.results.statistics import Scores
from fedvfm.tasks import metrics


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def run(values: Mapping[str, list[float]], arm: str = "federated", seed: int = 0) -> Scores:
    """Samples are numbered inside each site."""
    return Scores(arm, seed, {site: {f"{at:03d}": x for at, x in enumerate(row)} for site, row in values.items()})


def normal_sites(seed: int, samples: int = 200, sites: int = 2, offset: float = 0.0) -> dict[str, list[float]]:
    rng = generator(seed)
    return {f"site-{k}": (offset + 0.1 * k + rng.standard_normal(samples)).tolist() for k in range(sites)}


def width(found: statistics.Interval | statistics.Difference) -> float:
    return found.high - found.low


def test_the_mean_is_macro_over_sites_and_seeds() -> None:
    first, second = run({"a": [1.0, 0.0], "b": [0.2]}), run({"a": [1.0, 1.0], "b": [0.4]}, seed=1)
    found = statistics.interval([first, second], rng=generator())
    assert found.mean == pytest.approx((0.35 + 0.7) / 2)
    assert found.low <= found.mean <= found.high


def test_the_width_is_the_textbook_one_for_fixed_sites() -> None:
    sites = normal_sites(1)
    found = statistics.interval([run(sites)], rng=generator(), draws=8000)
    error = math.sqrt(sum(np.var(row) / len(row) for row in sites.values())) / len(sites)
    assert width(found) == pytest.approx(2 * 1.96 * error, rel=0.05)
    narrow = statistics.interval([run(sites)], rng=generator(), draws=8000, level=0.5)
    assert width(narrow) == pytest.approx(2 * 0.674 * error, rel=0.05)


def test_seeds_are_resampled() -> None:
    """Every sample of a seed is equal, so all spread comes from the seeds: 1/4, 1/2, 1/4 on 0, .5 and 1."""
    runs = [run({"a": [float(seed)] * 9, "b": [float(seed)] * 4}, seed=seed) for seed in (0, 1)]
    _, table = statistics._bootstrap([runs], generator(), 4000, False)
    values, counts = np.unique(table, return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    assert (counts / 4000).tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_a_sample_tested_by_every_seed_is_one_sample() -> None:
    """Three seeds with equal results know no more about the patients than one."""
    sites = normal_sites(2, samples=60)
    once = statistics.interval([run(sites)], rng=generator(), draws=8000)
    thrice = statistics.interval([run(sites, seed=seed) for seed in range(3)], rng=generator(), draws=8000)
    assert width(thrice) == pytest.approx(width(once), rel=0.05)


def test_resampled_sites_widen_the_interval_to_the_spread_between_sites() -> None:
    sites = {f"site-{k}": [float(k)] * 5 for k in range(6)}
    fixed = statistics.interval([run(sites)], rng=generator())
    assert (fixed.low, fixed.high) == pytest.approx((2.5, 2.5))
    _, table = statistics._bootstrap([[run(sites)]], generator(), 8000, True)
    assert table.std() == pytest.approx(np.std(range(6)) / math.sqrt(6), rel=0.04)


def test_a_site_picked_twice_brings_two_resamples() -> None:
    """Two equal sites of n samples: resampling the sites must add no variance, nor take any away."""
    row = generator(3).standard_normal(100).tolist()
    _, fixed = statistics._bootstrap([[run({"a": row, "b": row})]], generator(), 8000, False)
    _, picked = statistics._bootstrap([[run({"a": row, "b": row})]], generator(), 8000, True)
    assert picked.std() == pytest.approx(fixed.std(), rel=0.04)


def test_patients_are_drawn_whole() -> None:
    """Four copies of each patient's image carry no more than one copy."""
    row = generator(4).standard_normal(80)
    copies = {f"{at:03d}-{copy}": float(x) for at, x in enumerate(row) for copy in range(4)}
    owners = {"a": {sample: sample[:3] for sample in copies}}
    plain = statistics.interval([run({"a": row.tolist()})], rng=generator(), draws=8000)
    grouped = statistics.interval([Scores("x", 0, {"a": copies}, patients=owners)], rng=generator(), draws=8000)
    careless = statistics.interval([Scores("x", 0, {"a": copies})], rng=generator(), draws=8000)
    assert width(grouped) == pytest.approx(width(plain), rel=0.05)
    assert width(careless) == pytest.approx(width(plain) / 2, rel=0.05)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for trial in range(200):
        sites = normal_sites(100 + trial, samples=40)
        found = statistics.interval([run(sites)], rng=generator(trial), draws=400)
        hits += found.low <= 0.05 <= found.high
    assert 178 <= hits <= 199  # 190 expected; the binomial spread is 3


def test_a_constant_difference_has_no_spread() -> None:
    second = normal_sites(5)
    first = {site: [x + 0.125 for x in row] for site, row in second.items()}
    found = statistics.paired([run(first)], [run(second, "local-only")], rng=generator(), resample_sites=True)
    assert (found.mean, found.low, found.high) == pytest.approx((0.125, 0.125, 0.125))


def test_pairing_takes_out_what_the_arms_share() -> None:
    noise = generator(6)
    second = normal_sites(6)
    first = {site: [x + 0.05 + 0.1 * noise.standard_normal() for x in row] for site, row in second.items()}
    found = statistics.paired([run(first)], [run(second, "local-only")], rng=generator())
    assert found.low > 0.03
    assert found.high < 0.07
    assert width(found) < 0.3 * width(statistics.interval([run(first)], rng=generator()))


def test_samples_are_paired_by_id_and_runs_by_seed_not_by_order() -> None:
    sites = normal_sites(7)
    runs = [run(normal_sites(seed), seed=seed) for seed in (1, 2)]
    backwards = [
        Scores(
            "pooled",
            one.seed,
            {site: dict(reversed(list(one.sites[site].items()))) for site in sorted(one.sites, reverse=True)},
        )
        for one in reversed(runs)
    ]
    found = statistics.paired(runs, backwards, rng=generator())
    assert (found.mean, found.low, found.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    assert statistics.interval(runs, rng=generator()) == statistics.interval(backwards, rng=generator())
    assert statistics.interval([run(sites)], rng=generator(1)) != statistics.interval([run(sites)], rng=generator(2))


def test_memory_blocks_do_not_change_the_mean_or_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = normal_sites(8)
    whole = statistics.interval([run(sites)], rng=generator(), draws=1000)
    monkeypatch.setattr(bootstrap, "BLOCK", 1500)
    assert statistics.interval([run(sites)], rng=generator(), draws=1000) == whole


def test_seeds_may_have_test_sets_of_their_own() -> None:
    runs = [Scores("x", seed, {"a": {f"{seed}-0": 0.2, f"{seed}-1": 0.6}}) for seed in range(3)]
    found = statistics.interval(runs, rng=generator())
    assert found.mean == pytest.approx(0.4)
    assert 0.2 <= found.low < 0.4 < found.high <= 0.6


def classified(seed: int, samples: int = 50) -> tuple[metrics.ClassificationScores, list[int], list[int]]:
    rng = generator(seed)
    scores, labels, predicted = metrics.ClassificationScores(["a", "b", "c"]), [], []
    for at in range(samples):
        label = int(rng.choice(3, p=[0.7, 0.2, 0.1]))
        row = rng.dirichlet([1, 1, 1]) * 0.6 + 0.4 * np.eye(3)[label]
        scores.add(f"{at:03d}", row, label)
        labels.append(label)
        predicted.append(int(row.argmax()))
    return scores, labels, predicted


def test_balanced_accuracy_is_computed_anew_in_every_draw() -> None:
    """Class by class, n - 1 of n samples: every draw is the mean of the recalls of what was drawn."""
    scores, labels, predicted = classified(9)
    arm = Scores.from_tables("x", 0, {"a": (scores.ids, scores.per_sample())})
    means, table = statistics._bootstrap([[arm]], generator(3), 500, False)
    assert means[0] == pytest.approx(scores.value()["balanced_accuracy"])
    rng, recalls = generator(3), []
    for k in range(3):
        hits = np.array([float(guess == k) for guess, label in zip(predicted, labels, strict=True) if label == k])
        drawn = rng.multinomial(len(hits) - 1, np.full(len(hits), 1 / len(hits)), size=500)
        recalls.append(drawn @ hits / (len(hits) - 1))
    assert table[0] == pytest.approx(np.mean(recalls, axis=0))


def test_the_difference_of_every_site_stands_by_itself() -> None:
    second = normal_sites(12, samples=40, sites=3)
    shifts = {"site-0": 0.5, "site-1": -0.5, "site-2": 0.0}
    noise = generator(13)
    first = {site: [x + shift + 0.2 * noise.standard_normal() for x in second[site]] for site, shift in shifts.items()}
    found = statistics.by_site([run(first)], [run(second, "local-only")], rng=generator())
    assert [found[site].word for site in sorted(found)] == ["gains", "loses", "cannot tell"]
    for site in second:
        assert found[site].mean == pytest.approx(np.mean(first[site]) - np.mean(second[site]))
        assert found[site].units == 40


def test_scores_from_the_tables_of_a_metric_set() -> None:
    scores = metrics.SegmentationScores(["background", "nucleus"], surface=False)
    scores.add("b", np.zeros((2, 2), dtype=np.int64), np.ones((2, 2), dtype=np.int64))
    scores.add("a", np.ones((2, 2), dtype=np.int64), np.ones((2, 2), dtype=np.int64))
    tables = {"north": (scores.ids, scores.per_sample())}
    assert Scores.from_tables("x", 3, tables).sites == {"north": {"a": 1.0, "b": 0.0}}
    with pytest.raises(
        errors.DataError, match="site 'north': no column 'nsd'; there are: dice, foreground, iou, true_foreground"
    ):
        Scores.from_tables("x", 3, tables, column="nsd")


def test_wilcoxon_is_scipys_with_holm_over_sites() -> None:
    first, second = normal_sites(10, samples=30, sites=3, offset=0.5), normal_sites(11, samples=30, sites=3)
    found = statistics.wilcoxon([run(first)], [run(second, "local-only")])
    alone = [float(stats.wilcoxon(first[site], second[site]).pvalue) for site in sorted(first)]
    assert [found[site].p for site in sorted(first)] == pytest.approx(alone)
    assert [found[site].adjusted for site in sorted(first)] == pytest.approx(statistics.holm(alone))
    assert found["site-0"].pairs == 30
    assert found["site-0"].difference == pytest.approx(np.mean(first["site-0"]) - np.mean(second["site-0"]))


def test_wilcoxon_averages_seeds_and_patients_before_it_pairs() -> None:
    owners = {"a": {"0": "p", "1": "p", "2": "q"}}
    first = [Scores("x", seed, {"a": {"0": 0.5 + seed, "1": 0.7, "2": 0.3}}, patients=owners) for seed in (0, 1)]
    second = [Scores("y", seed, {"a": {"0": 0.0, "1": 0.0, "2": 0.0}}, patients=owners) for seed in (0, 1)]
    found = statistics.wilcoxon(first, second)["a"]
    assert found.pairs == 2
    assert found.difference == pytest.approx((0.85 + 0.3) / 2)
    assert found.p == found.adjusted == pytest.approx(0.5)


@pytest.mark.parametrize("change", [[0.0], [0.1], [0.0, 0.0], [0.1, 0.1, 0.0], [1.0, -1.0, 1.0, 0.0, 1.0] * 12])
def test_wilcoxon_of_few_tied_or_equal_pairs_is_a_probability(change: list[float]) -> None:
    first, second = run({"a": [0.5 + x for x in change]}), run({"a": [0.5] * len(change)}, "y")
    found = statistics.wilcoxon([first], [second])["a"]
    assert 0 < found.p <= found.adjusted <= 1
    assert any(change) or found.p == 1.0


def test_rounding_is_no_difference() -> None:
    """0.1 + 0.2 and 0.3 are equal on paper."""
    first, second = run({"a": [0.1 + 0.2] * 20}), run({"a": [0.3] * 20}, "y")
    assert statistics.wilcoxon([first], [second])["a"].p == 1.0


def test_holm_by_hand() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


BASE = run({"a": [0.1, 0.2], "b": [0.3]})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([run({"a": [0.1, 0.2], "b": [0.3]}, "y", seed=7)], "different seeds"),
        ([run({"a": [0.1, 0.2]}, "y")], "different sites"),
        ([run({"a": [0.1], "b": [0.3]}, "y")], "seed 0, site 'a': the models were tested on different samples"),
        ([Scores("y", 0, BASE.sites, labels={"a": {"000": 0, "001": 1}, "b": {"000": 1}})], "or other labels"),
        ([], "an arm without runs"),
    ],
)
def test_arms_that_cannot_be_paired_are_refused(other: list[Scores], message: str) -> None:
    with pytest.raises(errors.DataError, match=message):
        statistics.paired([BASE], other, rng=generator())
    with pytest.raises(errors.DataError, match=message):
        statistics.wilcoxon([BASE], other)


def test_bad_runs_and_settings_are_refused() -> None:
    with pytest.raises(errors.DataError, match="every run needs its own seed"):
        statistics.interval([BASE, BASE], rng=generator())
    with pytest.raises(errors.DataError, match="seed 1 has the sites a, seed 0 a, b"):
        statistics.interval([BASE, run({"a": [0.1]}, seed=1)], rng=generator())
    with pytest.raises(errors.DataError, match="draws is 0"):
        statistics.interval([BASE], rng=generator(), draws=0)
    with pytest.raises(errors.DataError, match="level is 95"):
        statistics.interval([BASE], rng=generator(), level=95)


@pytest.mark.parametrize(
    ("sites", "labels", "message"),
    [
        ({}, None, "no site has sample values"),
        ({"a": {}}, None, "site 'a' has no or non-finite"),
        ({"a": {"0": math.nan}}, None, "site 'a' has no or non-finite"),
        ({"a": {"0": 1.0}}, {"a": {"1": 0}}, "a sample of site 'a' has no label"),
    ],
)
def test_scores_that_hold_nothing_usable_are_refused(
    sites: dict[str, dict[str, float]], labels: dict[str, dict[str, int]] | None, message: str
) -> None:
    with pytest.raises(errors.DataError, match=message):
        Scores("x", 0, sites, labels)
