"""Noise on a survey: one patient changes an answer by at most the bound, and the noise is what the event says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.privacy import accountant
from fedvfm.survey import answer, layout, noise
from tests.survey import hospital

PRIVATE = hospital.ask(privacy={"epsilon": 1.0, "delta": 1e-4}, images_per_patient=2)
GROUPS = layout.groups(PRIVATE)


def test_one_patient_changes_each_group_by_at_most_its_sensitivity() -> None:
    """Every patient is taken out once; whatever its images are, no group moves further."""
    whole = hospital.totals(PRIVATE, 0, 20)
    for patient in range(20):
        rest = {name: np.delete(rows, patient, axis=0).sum(axis=0) for name, rows in whole.rows.items()}
        for group in GROUPS:
            moved = whole.sums()[group.name] - rest[group.name]
            assert math.sqrt(float((moved.astype(float) ** 2).sum())) <= group.sensitivity * (1 + 1e-12)


def test_all_groups_together_spend_what_the_event_says() -> None:
    event = noise.event(PRIVATE)
    assert event is not None
    sizes = noise.sigmas(GROUPS, event.noise_multiplier)
    spent = sum((group.sensitivity / sizes[group.name]) ** 2 for group in GROUPS)
    assert spent <= 1 / event.noise_multiplier**2
    assert (event.unit, event.sample_rate, event.steps, event.shared) == ("patient", 1.0, 1, True)
    assert accountant.epsilon(accountant.curve([event]), 1e-4).value <= 1.0
    # No more noise than that takes: a thousandth less would spend more than was asked for.
    less = accountant.steps(1.0, event.noise_multiplier - 2e-3, 1, True)
    assert accountant.epsilon(less, 1e-4).value > 1.0


def test_noise_has_the_standard_deviation_that_is_told() -> None:
    group = GROUPS[0]
    size = noise.sigmas(GROUPS, 3.5)[group.name]
    zeros = {group.name: np.zeros(20_000, np.int64)}
    drawn = np.array(noise.added(zeros, {group.name: size})[group.name], float)
    assert abs(drawn.std() / size - 1) < 0.03  # six standard errors
    assert abs(drawn.mean()) < 6 * size / math.sqrt(len(drawn))


def test_noise_is_drawn_anew_unless_it_is_of_a_simulation() -> None:
    zeros = {group.name: np.zeros(len(group.labels), np.int64) for group in GROUPS}
    sizes = noise.sigmas(GROUPS, 3.5)
    assert noise.added(zeros, sizes) != noise.added(zeros, sizes)
    assert noise.added(zeros, sizes, 7, "north") == noise.added(zeros, sizes, 7, "north")
    assert noise.added(zeros, sizes, 7, "north") != noise.added(zeros, sizes, 7, "south")


def test_no_survey_without_noise_spends() -> None:
    assert noise.event(hospital.ask()) is None


def test_an_epsilon_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(errors.ConfigError, match="epsilon"):
        noise.event(hospital.ask(privacy={"epsilon": 1e-9, "delta": 1e-9}))


def test_answers_with_noise_say_so_and_withhold_nothing() -> None:
    whole = hospital.totals(PRIVATE, 0, 20)
    sizes = noise.sigmas(GROUPS, 3.5)
    values = noise.added(whole.sums(), sizes)
    reply = answer.Answer(survey=PRIVATE.hash, site="north", least=10, values=values, sigmas=sizes)
    assert answer.parse(answer.text(reply), PRIVATE, "north") == reply
    bare = reply.model_copy(update={"sigmas": {}})
    with pytest.raises(errors.ProtocolError, match="noise"):
        answer.parse(answer.text(bare), PRIVATE, "north")
    two = answer.merged(PRIVATE, [reply, reply.model_copy(update={"site": "south"})])
    assert two.noise["rows"] == pytest.approx(math.sqrt(2) * sizes["rows"] / layout.WHOLE)
