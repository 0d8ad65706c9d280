"""Which adapter a site uses: the paired gain by hand, and what the rule promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvfm.client.personal import choice, tuning
from fedvfm.state import state

NAMES = list(choice.PREFERENCE)


def cases(*values: float, units: tuple[str, ...] = (), strata: tuple[int, ...] = ()) -> list[choice.Case]:
    names = units or tuple(map(str, range(len(values))))
    classes = strata or (0,) * len(values)
    return [choice.Case(*row) for row in zip(names, values, classes, strict=True)]


def test_the_gain_of_single_samples_is_the_mean_and_its_standard_error() -> None:
    gain = choice.gain(cases(0.5, 0.9, 0.7), cases(0.4, 0.6, 0.8))
    differences = np.array([0.1, 0.3, -0.1])
    assert gain.mean == pytest.approx(differences.mean())
    assert gain.error == pytest.approx(differences.std(ddof=1) / math.sqrt(3))
    assert gain.units == 3


def test_images_of_a_patient_count_as_one() -> None:
    gain = choice.gain(cases(1.0, 0.0, 0.4, units=("a", "a", "b")), cases(0.0, 0.0, 0.0, units=("a", "a", "b")))
    assert gain.mean == pytest.approx((0.5 + 0.4) / 2)
    assert gain.error == pytest.approx(np.std([0.5, 0.4], ddof=1) / math.sqrt(2))
    assert gain.units == 2


def test_a_rare_class_counts_as_much_as_a_frequent_one() -> None:
    gain = choice.gain(cases(0.3, 0.3, 0.3, 0.9, strata=(0, 0, 0, 1)), cases(0.2, 0.2, 0.2, 0.2, strata=(0, 0, 0, 1)))
    assert gain.mean == pytest.approx((0.1 + 0.7) / 2)


def test_one_patient_tells_nothing_about_the_error() -> None:
    gain = choice.gain(cases(0.9), cases(0.1))
    assert (gain.mean, gain.error, gain.units) == (pytest.approx(0.8), math.inf, 1)


def test_in_classification_a_value_is_the_probability_of_the_true_class() -> None:
    columns = {"label": [1.0, 0.0], "probability_0": [0.2, 0.7], "probability_1": [0.8, 0.3]}
    rows = choice.cases(["x", "y"], columns, "balanced_accuracy", {"x": "p"})
    assert rows == [choice.Case("p", 0.8, 1), choice.Case("y", 0.7, 0)]
    assert choice.cases([], {}, "dice", {}) == []


@pytest.mark.parametrize("values", [(), (0.9,)])
def test_with_too_few_patients_the_default_is_taken_whatever_they_say(values: tuple[float, ...]) -> None:
    seen = {name: cases(*(0.0 for _ in values)) for name in NAMES} | {choice.ALONE: cases(*values)}
    chosen = choice.choose(seen)
    assert (chosen.name, chosen.reason) == (choice.PREFERENCE[0], "few")


@pytest.mark.parametrize("kept", [(0.9,), (0.9, 0.5)])
def test_what_few_patients_choose_is_not_far_below_the_global_adapter_on_them(kept: tuple[float, ...]) -> None:
    """Where it finds everything in the one patient and the first of the order nothing, it is kept; not else."""
    lost = (0.0, *kept[1:])
    seen = {name: cases(*lost) for name in NAMES} | {choice.GLOBAL: cases(*kept), "mix 0.25": cases(0.86, *kept[1:])}
    assert choice.choose(seen).name == "mix 0.25", "the first of the order that is near enough"
    level = {name: cases(*(value - 0.04 for value in kept)) for name in NAMES} | {choice.GLOBAL: cases(*kept)}
    assert choice.choose(level).name == (choice.PREFERENCE[0] if len(kept) == 1 else choice.GLOBAL)
    if len(kept) == 2:
        third = {name: cases(*(row.value for row in rows), 0.5) for name, rows in seen.items()}
        assert choice.choose(third).name == choice.PREFERENCE[0], "three have an error that is worth something"


def test_who_has_few_patients_is_told_on_how_many_the_choice_rests() -> None:
    assert choice.rests_on(0).startswith("the choice rests on no validation patient")
    assert choice.rests_on(1).startswith("the choice rests on 1 validation patient: on it it is not below the global")
    assert choice.rests_on(2).startswith("the choice rests on 2 validation patients: on them it is")


def test_what_all_patients_agree_on_is_taken() -> None:
    level = dict.fromkeys(NAMES, 0.5) | {choice.GLOBAL: 0.8}
    chosen = choice.choose({name: cases(*(value + 0.01 * at for at in range(4))) for name, value in level.items()})
    assert (chosen.name, chosen.reason) == (choice.GLOBAL, "validation")


def test_one_patient_of_three_does_not_move_the_choice() -> None:
    seen = {name: cases(0.5, 0.5, 0.5) for name in NAMES} | {choice.ALONE: cases(0.9, 0.5, 0.5)}
    assert choice.choose(seen).name == choice.PREFERENCE[0]


values = st.lists(st.lists(st.floats(0, 1), min_size=len(NAMES), max_size=len(NAMES)), min_size=2, max_size=8)


@given(values)
def test_nothing_is_chosen_that_validation_puts_below_another(rows: list[list[float]]) -> None:
    seen = {name: cases(*(row[at] for row in rows)) for at, name in enumerate(NAMES)}
    chosen = choice.choose(seen)
    best = max(seen, key=lambda name: chosen.gains[name].mean)
    behind = choice.gain(seen[best], seen[chosen.name])
    assert behind.mean <= choice.widened(behind.error, len(rows)) + 1e-12
    over = choice.gain(seen[choice.GLOBAL], seen[chosen.name])
    assert over.mean <= choice.widened(behind.error, len(rows)) + 1e-12, "nor below the global adapter"


def test_the_error_is_widened_as_students_t_is() -> None:
    assert choice.widened(1.0, 2) == pytest.approx(1.837, abs=1e-3)
    assert choice.widened(1.0, 5) == pytest.approx(1.142, abs=1e-3)
    assert choice.widened(2.0, 10_000) == pytest.approx(2.0, abs=1e-3)


def test_a_choice_is_plain_values() -> None:
    row = choice.choose({name: cases(0.5) for name in NAMES}).to_json()
    assert row["gains"][choice.ALONE] == {"mean": 0.0, "error": None}
    assert (row["name"], row["units"]) == (choice.PREFERENCE[0], 1)


def test_the_ends_of_a_mix_are_themselves_and_its_middle_is_the_mean() -> None:
    shared, own = (state.AdapterState({"a": np.array(v, dtype=np.float32)}) for v in ([0.0, 2.0], [1.0, 4.0]))
    assert tuning.mix(shared, own, 0.0) is shared
    assert tuning.mix(shared, own, 1.0) is own
    assert tuning.mix(shared, own, 0.5)["a"].tolist() == [0.5, 3.0]
    assert list(tuning.candidates(shared, own, shared)) == [
        choice.GLOBAL, "mix 0.25", "mix 0.50", "mix 0.75", choice.PERSONAL, choice.ALONE,
    ]  # fmt: skip
    assert set(tuning.candidates(shared, own, shared, own)) == set(choice.PREFERENCE)
