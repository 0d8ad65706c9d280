"""Laws of a survey's numbers: sums of sites are those of all patients, and what few have a part in does not show."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import errors
from fedvfm.survey import answer, layout, statistics
from tests.survey import hospital

SURVEY = hospital.ask(images_per_patient=2)
GROUPS = layout.groups(SURVEY)


EVERYBODY = hospital.totals(SURVEY, 0, 40)


@pytest.fixture
def whole() -> statistics.Totals:
    return EVERYBODY


def part(whole: statistics.Totals, members: list[int]) -> statistics.Totals:
    return statistics.Totals(len(members), {name: rows[members] for name, rows in whole.rows.items()})


def test_a_split_over_sites_equals_the_pooled_statistics_exactly(whole: statistics.Totals) -> None:
    parts = [hospital.totals(SURVEY, 0, 13), hospital.totals(SURVEY, 13, 40)]
    for name, sums in whole.sums().items():
        assert (sums == parts[0].sums()[name] + parts[1].sums()[name]).all(), name


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=40, max_size=40))
def test_answers_merge_to_the_pooled_ones_in_any_order(sites: list[int]) -> None:
    """Of sums from which nothing is withheld, however few patients a site has."""
    answers = []
    for site in sorted(set(sites)):
        own = part(EVERYBODY, [at for at, of in enumerate(sites) if of == site])
        values = {name: tuple(int(value) for value in sums) for name, sums in own.sums().items()}
        answers.append(answer.Answer(survey=SURVEY.hash, site=f"s{site}", least=10, values=dict(values)))
    pooled = {name: tuple(sums / layout.WHOLE) for name, sums in EVERYBODY.sums().items()}
    results = [answer.merged(SURVEY, order) for order in (answers, answers[::-1])]
    assert results[0] == results[1]
    assert results[0].values == pooled


def test_every_patient_adds_the_same_to_every_group(whole: statistics.Totals) -> None:
    for group in GROUPS:
        rows = whole.rows[group.name]
        assert (rows >= 0).all()
        norms = np.sqrt((rows.astype(float) ** 2).sum(axis=1))
        assert (norms <= group.sensitivity * (1 + 1e-12)).all()
        if not group.several:
            assert (rows.sum(axis=1) == layout.WHOLE).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=300).filter(any))
def test_apportioned_parts_are_whole_and_right(amounts: list[int]) -> None:
    parts = layout.apportioned(np.array(amounts))
    assert parts.sum() == layout.WHOLE
    exact = np.array(amounts, dtype=object) * layout.WHOLE
    assert all(abs(int(got) * sum(amounts) - want) < sum(amounts) for got, want in zip(parts, exact, strict=True))


def test_amounts_that_are_none_are_refused() -> None:
    for amounts in ([0, 0], [-1, 3], [2**50]):
        with pytest.raises(ValueError, match="amounts"):
            layout.apportioned(np.array(amounts))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=0, max_size=60), st.integers(2, 12))
def test_nothing_of_few_shows_or_can_be_had_by_subtraction(places: list[int], least: int) -> None:
    rows = np.zeros((len(places), 6), np.int64)
    rows[np.arange(len(places)), places] = layout.WHOLE
    hidden = statistics.withheld(rows, least)
    counts = np.bincount(np.array(places, dtype=int), minlength=6)
    assert (counts[~hidden] >= least).all()
    behind = int(counts[hidden].sum())
    assert behind == 0 or behind >= least or hidden.all()


def test_who_is_not_in_a_class_is_not_told_either() -> None:
    rows = np.zeros((30, 3), np.int64)
    rows[:, 0] = rows[:27, 1] = rows[:15, 2] = layout.WHOLE
    assert statistics.withheld(rows, 5, several=True).tolist() == [False, True, False]


def test_a_rare_class_of_patients_with_one_class_each_is_not_left_over_by_the_others() -> None:
    rows = np.repeat(np.eye(3, dtype=np.int64), [40, 30, 5], axis=0) * layout.WHOLE
    assert statistics.withheld(rows, 10, several=True).tolist() == [False, True, True]
    everywhere = np.ones((75, 1), np.int64) * layout.WHOLE  # a background: the counts shown leave nobody over
    hidden = statistics.withheld(np.hstack([everywhere, rows[:, 1:]]), 10, several=True)
    assert hidden.tolist() == [False, False, True]


def test_an_answer_withholds_the_rare_class_and_what_gives_it_away(whole: statistics.Totals) -> None:
    reply = answer.of_totals(SURVEY, "north", whole, 10)
    patients = layout.WHOLE * 40
    assert reply.values["patients"] == (patients,)
    assert reply.values["class-patients"] == (patients, None, None)  # 8 are without discs, 3 have the rare class
    # Three patients have the rare class: neither its share nor all the others', which would leave it over.
    shares = reply.values["class-shares"]
    assert shares[2] is None
    assert sum(value is None for value in shares) >= 2
    assert answer.faults(reply, SURVEY, "north") == []


def test_too_few_patients_answer_nothing() -> None:
    with pytest.raises(errors.PolicyRefused) as caught:
        answer.of_totals(SURVEY, "north", hospital.totals(SURVEY, 0, 9), 10)
    assert caught.value.reason == "policy-units"


@pytest.mark.parametrize(
    "change",
    [
        lambda values: {**values, "extra": (1,)},
        lambda values: {name: row for name, row in values.items() if name != "rows"},
        lambda values: {**values, "rows": values["rows"][:-1]},
        lambda values: {**values, "rows": (-1, *values["rows"][1:])},
        lambda values: {**values, "rows": (values["patients"][0] + 1, *values["rows"][1:])},
    ],
)
def test_answers_that_no_data_could_give_are_refused(whole: statistics.Totals, change: object) -> None:
    reply = answer.of_totals(SURVEY, "north", whole, 10)
    assert answer.parse(answer.text(reply), SURVEY, "north") == reply
    wrong = reply.model_copy(update={"values": change(dict(reply.values))})  # type: ignore[operator]
    with pytest.raises(errors.ProtocolError):
        answer.parse(answer.text(wrong), SURVEY, "north")


def test_an_answer_of_another_site_survey_or_form_is_refused(whole: statistics.Totals) -> None:
    reply = answer.of_totals(SURVEY, "north", whole, 10)
    texts = [answer.text(reply.model_copy(update={"site": "south"})), answer.text(reply)[:-1], "[]", "{}"]
    texts += [answer.text(reply).replace("{", '{"note":"J. Smith",', 1)]
    texts += [answer.text(reply.model_copy(update={"survey": "0" * 64}))]
    texts += [answer.text(reply.model_copy(update={"least": 5}))]
    for text in texts:
        with pytest.raises(errors.ProtocolError) as caught:
            answer.parse(text, SURVEY, "north")
        assert "Smith" not in str(caught.value)


def test_the_hash_names_every_value_of_a_survey() -> None:
    others = [
        {"least_patients": 11},
        {"purpose": "p"},
        {"size_edges": [64.0, 128.0]},
        {"privacy": {"epsilon": 1.0, "delta": 1e-4}},
    ]
    hashes = {SURVEY.hash, *(hospital.ask(images_per_patient=2, **values).hash for values in others)}
    assert len(hashes) == 5


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"statistics": ["patients", "names"]}, "statistics"),
        ({"statistics": ["patients", "patients"]}, "each once"),
        ({"task": "classification"}, "foreground"),
        ({"size_edges": [64.0, 64.0]}, "size_edges"),
        ({"intensity_range": [1.0, 1.0]}, "intensity_range"),
        ({"intensity_range": [0.0, 1e308]}, "intensity_range"),
        ({"intensity_range": [1.0, 1.0 + 1e-15]}, "intensity_range"),
        ({"least_patients": 1}, "least_patients"),
        ({"file_names": True}, "file_names"),
    ],
)
def test_surveys_that_ask_for_more_have_no_form(values: dict[str, object], word: str) -> None:
    with pytest.raises(errors.ConfigError, match=word):
        hospital.ask(**values)


def test_bins_hold_what_their_labels_say() -> None:
    for group in GROUPS:
        if not group.edges:
            continue
        assert len(group.labels) in (len(group.edges) + 1, len(group.edges) + 2)
        assert layout.place(group, group.edges[0] - 1e-9) == 0
        for at, (low, high) in enumerate(itertools.pairwise(group.edges), 1):
            assert layout.place(group, low) == layout.place(group, (low + high) / 2) == at
        assert layout.place(group, group.edges[-1]) == len(group.edges)
