"""``privacy audit`` on small federations: what plain updates tell, what private ones do, a claim that is false."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvfm import errors
from fedvfm.privacy import randomness
from fedvfm.secure_aggregation import discrete_gaussian
from fedvfm.simulation import experiment, privacy_audit
from tests.cli import conftest as drawn

PER_SITE = 26
PRIVATE = {"mechanism": "record-level", "clip": 1.0, "noise_multiplier": 4.0, "delta": 1e-5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn.write_data(tmp_path_factory.mktemp("audited") / "data", per_site=PER_SITE)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn.write_backbone(tmp_path_factory.mktemp("audited") / "backbone")


@pytest.fixture
def make(data: Path, backbone: Path) -> Callable[..., dict[str, Any]]:
    """Values of an experiment: one round of plain gradient steps."""

    def values(**recipe: Any) -> dict[str, Any]:
        return {
            "name": "audited",
            "data": {"source": "folder", "path": str(data)},
            "partition": {"kind": "natural", "val_share": 0.0, "test_share": 0.08},
            "recipe": {
                "rounds": 1,
                "threads": 1,
                "precision": "float32",
                "backbone": {"name": str(backbone)},
                "adapter": {"rank": 2},
                "data": {"class_names": ["background", "disc"], "input_size": [28, 28]},
                "optimiser": {"name": "sgd", "learning_rate": 0.05, "batch_size": 8, "weight_decay": 0.0},
                "aggregation": {"weighting": "uniform"},
                **recipe,
            },
        }

    return values


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_coefficients_of_a_known_sum_are_found(noise: float) -> None:
    stream = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 5000, generator=stream) + 3.0  # a large part is common to all
    true = torch.randint(0, 2, (30,), generator=stream).double()
    change = true @ rows.double() + noise * torch.randn(5000, generator=stream).double()
    found_weights = privacy_audit.coefficients(rows, change)
    assert np.corrcoef(found_weights, true)[0, 1] > 0.99
    assert np.abs(found_weights - true.numpy()).max() < 0.1


def test_a_change_of_nothing_and_rows_of_nothing_are_scored_alike() -> None:
    nothing = torch.zeros(12, 40)
    assert np.isfinite(privacy_audit.coefficients(nothing, torch.zeros(40, dtype=torch.float64))).all()
    assert np.isfinite(privacy_audit.coefficients(torch.ones(12, 40), torch.zeros(40, dtype=torch.float64))).all()


def test_units_with_a_coin_are_in_or_out_and_nothing_else_is_moved(make: Callable[..., dict[str, Any]]) -> None:
    what = experiment.parse(make(), "test")
    (hospital, *_) = experiment.hospitals(what)
    member = privacy_audit.with_coins(what, hospital, "record", 0)
    kept = {sample.id for sample in member.thinned.hospital.train}
    assert len(member.canaries) == len(hospital.train) - 1
    for unit, coin in zip(member.canaries, member.coins, strict=True):
        assert {sample.id in kept for sample in unit} == {bool(coin)}
    assert 0.2 < member.coins.mean() < 0.8
    assert member.thinned.hospital.test == hospital.test
    assert member.thinned.units == len(hospital.train), "rate, steps and noise know no coin"
    few = privacy_audit.with_coins(what, hospital, "record", 3)
    assert len(few.canaries) == 3
    assert len(few.thinned.hospital.train) >= len(hospital.train) - 3


def test_plain_updates_tell_who_was_trained_on(make: Callable[..., dict[str, Any]]) -> None:
    result = privacy_audit.audit(make())
    assert (result.mechanism, result.seen, result.claimed) == ("none", privacy_audit.UPDATES, None)
    assert result.shown.canaries == 3 * (round(PER_SITE * 0.92) - 1)
    assert result.shown.epsilon > 0.5
    assert not result.refuted


def test_what_stays_at_a_site_hides_nothing_of_what_leaves(make: Callable[..., dict[str, Any]]) -> None:
    """Gradients of a personal head, large beside the others, are in no update, and so in no score."""
    assert privacy_audit.audit(make(personal={"kind": "head-local"})).shown.epsilon > 0.5


def test_private_updates_show_no_more_than_they_claim(make: Callable[..., dict[str, Any]]) -> None:
    result = privacy_audit.audit(make(privacy=PRIVATE))
    assert result.claimed is not None
    assert 0 <= result.shown.epsilon < result.claimed


def test_a_mechanism_that_adds_no_noise_is_caught(
    make: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(randomness.Seeded, "normal", lambda self, size: np.zeros(size))
    silent = {**PRIVATE, "noise_multiplier": 20.0}
    result = privacy_audit.audit(make(privacy=silent), runs=2)
    assert result.claimed is not None
    assert result.claimed < 0.5 < result.shown.epsilon
    with pytest.raises(errors.ClaimRefuted, match="at least"):
        result.require_held()


def test_under_secure_aggregation_the_sum_alone_is_attacked(make: Callable[..., dict[str, Any]]) -> None:
    result = privacy_audit.audit(make(secure_aggregation={}, min_sites=3))
    assert result.seen == privacy_audit.SUMS
    assert result.shown.canaries == 3 * (round(PER_SITE * 0.92) - 1)


@pytest.mark.parametrize("noisy", [True, False])
def test_a_sum_is_held_to_what_shared_noise_claims_and_caught_without_it(
    make: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, noisy: bool
) -> None:
    if not noisy:
        monkeypatch.setattr(discrete_gaussian, "drawn", lambda key, sigma, size: np.zeros(size, np.int64))
    step = {"name": "sgd", "learning_rate": 0.05, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0}
    shared = {**PRIVATE, "mechanism": "record-level-shared", "noise_multiplier": 20.0}
    whole = {"privacy": shared, "optimiser": {**step, "batch_size": PER_SITE}}
    result = privacy_audit.audit(make(secure_aggregation={}, min_sites=3, **whole), runs=2)
    assert (result.seen, result.mechanism) == (privacy_audit.SUMS, "record-level-shared")
    assert result.claimed is not None
    assert result.claimed < 0.5
    assert result.refuted == (not noisy)


def test_the_command_prints_both_numbers(
    make: Callable[..., dict[str, Any]], cli: Callable[..., Any], tmp_path: Path, data: Path, backbone: Path
) -> None:
    path = drawn.write_experiment(tmp_path / "tiny.toml", data, backbone)
    answer = cli("privacy", "audit", path, "--json", "--set", "recipe.rounds=1", "--canaries", "8", "--runs", "2")
    assert answer.code == 0, answer.err
    said = json.loads(answer.out)
    assert (said["canaries"], said["runs"], said["claimed"], said["refuted"]) == (48, 2, None, False)
    assert 0 <= said["epsilon_at_least"] <= said["epsilon_most"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"codec": "int8"}, "recipe.codec"),
        (
            {"privacy": {**PRIVATE, "mechanism": "site-level"}, "secure_aggregation": None},
            "recipe.privacy.mechanism",
        ),
    ],
)
def test_what_cannot_be_audited_is_refused(
    make: Callable[..., dict[str, Any]], change: dict[str, Any], word: str
) -> None:
    with pytest.raises(errors.ConfigError, match=word):
        privacy_audit.audit(make(**change))


def test_too_few_units_are_refused(make: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(errors.DataError, match="units with a coin"):
        privacy_audit.audit(make(), canaries=3)
