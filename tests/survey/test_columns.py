"""Columns of a table in a survey: three bounded sums a column, what is withheld of them, and the constants proposed."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.client import site_file, survey_review
from fedvfm.config import schema
from fedvfm.config import survey as surveys
from fedvfm.data import sample as data
from fedvfm.simulation import survey as simulated
from fedvfm.survey import answer, collection, layout, noise, proposal, results, statistics
from tests.data.test_columns import folder
from tests.survey import hospital
from tests.survey.test_gate import POLICY, Site, joined, site

__all__ = ["joined", "site"]

AGE: dict[str, Any] = {"columns": ["age"], "column_ranges": [[0.0, 100.0]], "column_units": ["years"]}
ASKED = {"task": "classification", "class_names": ["a", "b"], "statistics": ["patients", "columns"], **AGE}
BEFORE = "68418e36a1259739b2d18dd949588b05e980953fe9162ef0815cb0a00e2ac035"


def totals(values: Sequence[float | None], **more: Any) -> tuple[surveys.Survey, statistics.Totals]:
    survey = hospital.ask(**{**ASKED, **more})
    group = layout.groups(survey)[-1]
    rows = ({"patients": np.array([layout.WHOLE]), group.name: layout.powers(group, value)} for value in values)
    return survey, statistics.Totals.of(layout.groups(survey), rows)


def told(site_name: str, values: Sequence[float | None], least: int = 10, **more: Any) -> answer.Answer:
    survey, own = totals(values, **more)
    return answer.of_totals(survey, site_name, own, least)


def test_a_survey_without_columns_has_the_hash_that_it_had() -> None:
    assert hospital.ask().hash == BEFORE


def test_a_patient_adds_its_share_of_the_range_and_the_square() -> None:
    group = layout.groups(hospital.ask(**ASKED))[-1]
    assert layout.powers(group, 25.0).tolist() == [65536, 16384, 4096]
    assert layout.powers(group, 0.0).tolist() == [65536, 0, 0]
    assert layout.powers(group, 100.0).tolist() == [65536] * 3
    assert layout.powers(group, None).tolist() == [0, 0, 0]
    norm = float(np.linalg.norm(layout.powers(group, 100.0).astype(float)))
    assert norm <= group.sensitivity < norm + 1, "no value of the range adds more"


def test_a_patient_counts_once_with_the_lower_median_of_its_cases() -> None:
    """A case of many images has one row, and counts as one."""
    survey = hospital.ask(**ASKED)
    cases = {"c1": (60.0,), "c2": (60.0,), "c3": (60.0,), "c4": (None,), "c5": ()}
    rows = [("c0", (40.0,))] * 9 + list(cases.items())
    own = [data.Sample(f"3-{at}", 0, patient="p3", case=case, inputs=row) for at, (case, row) in enumerate(rows)]
    row = collection.row(survey, layout.groups(survey), own, hospital.read)
    assert row["value-age"].tolist() == layout.powers(layout.groups(survey)[-1], 60.0).tolist()


def test_sums_of_sites_give_the_mean_and_deviation_of_all_patients() -> None:
    rng = np.random.default_rng(3)
    values = [rng.uniform(20, 90, size).tolist() for size in (30, 55)]
    survey = hospital.ask(**ASKED)
    merged = answer.merged(survey, [told("north", values[0]), told("south", values[1])])
    seen = layout.moments(layout.groups(survey)[-1], merged.values["value-age"])
    assert seen is not None
    every = np.concatenate(values)
    assert (seen.count, seen.mean, seen.deviation) == pytest.approx((85, every.mean(), every.std()), rel=1e-4)
    page = results.page(merged, proposal.propose(merged, "unet"))
    assert f"85.00 patients, mean {every.mean():.4g}" in page


@pytest.mark.parametrize(
    ("have", "lack", "count"),
    [(9, 20, None), (20, 20, 20), (20, 0, 20), (20, 3, 23), (20, 9, 29), (20, 10, 20)],
)
def test_how_few_have_a_value_or_lack_it_is_not_told(have: int, lack: int, count: int | None) -> None:
    values: list[float | None] = [30.0 + at for at in range(have)]
    known = told("north", values + [None] * lack).values["value-age"]
    if count is None:
        assert known == (None, None, None)
        return
    assert known[0] == count * layout.WHOLE
    seen = layout.moments(layout.groups(hospital.ask(**ASKED))[-1], known)
    assert seen is not None
    assert seen.mean == pytest.approx(np.mean([value for value in values if value is not None]), abs=1e-2)
    assert seen.deviation == pytest.approx(np.std([value for value in values if value is not None]), abs=1e-2)


def test_one_patient_changes_a_private_answer_by_at_most_its_bound() -> None:
    survey, whole = totals([5.0, 100.0, None, 42.0], privacy={"epsilon": 1.0, "delta": 1e-4})
    groups = layout.groups(survey)
    event = noise.event(survey)
    assert event is not None
    sizes = noise.sigmas(groups, event.noise_multiplier)
    spent = sum((group.sensitivity / sizes[group.name]) ** 2 for group in groups)
    assert spent <= 1 / event.noise_multiplier**2
    for patient in range(4):
        moved = sum(
            float((rows[patient].astype(float) ** 2).sum()) / sizes[name] ** 2 for name, rows in whole.rows.items()
        )
        assert moved <= 1 / event.noise_multiplier**2


def test_constants_are_proposed_as_a_recipe_takes_them() -> None:
    values = [float(value) for value in range(20, 80)]
    survey = hospital.ask(**ASKED)
    proposed = proposal.of_answers(survey, [told("north", values)], "dinov2-small-imgfocus")
    assert proposed.values["inputs.numbers"] == ["age"]
    assert proposed.values["inputs.centres"] == [pytest.approx(np.mean(values), rel=1e-3)]
    assert proposed.values["inputs.scales"] == [pytest.approx(np.std(values), rel=1e-3)]
    text = proposal.recipe(answer.merged(survey, [told("north", values)]), proposed, "dinov2-small-imgfocus")
    recipe = schema.parse(schema.Recipe, tomllib.loads(text), "recipe")
    assert recipe.inputs.columns == ("age",)
    assert recipe.inputs.units == ("years",)
    assert not recipe.inputs.faults(())


def test_nothing_is_proposed_of_what_is_withheld_alike_noisy_or_for_masks() -> None:
    survey = hospital.ask(**ASKED)
    for values, words in (
        ([30.0] * 9 + [None] * 9, "withheld"),
        ([30.0 + at / 100 for at in range(40)], "less than 1.2% of its range"),
    ):
        proposed = proposal.of_answers(survey, [told("north", values)], "unet")
        assert "inputs.numbers" not in proposed.values
        assert any(words in why for key, why in proposed.left if key == "inputs.numbers")
    merged = answer.merged(survey, [told("north", [float(value) for value in range(90)])])
    noisy = dataclasses.replace(merged, noise={"value-age": 5.0})
    assert any("the noise" in why for _, why in proposal.propose(noisy, "unet").left)
    small = dataclasses.replace(merged, noise={"value-age": 0.1})
    assert "inputs.scales" in proposal.propose(small, "unet").values
    assert dict(proposal.propose(merged, "unet", task="segmentation").left)["inputs"].endswith("beside the image")


def test_a_mean_that_hangs_on_one_site_says_so() -> None:
    sites = {"east": 40.0, "north": 40.0, "south": 90.0}
    answers = [told(name, [base + at % 10 for at in range(30)]) for name, base in sites.items()]
    reasons = dict(proposal.of_answers(hospital.ask(**ASKED), answers, "unet").reasons)
    assert "without site 'south' it would be [44.5]" in reasons["inputs.centres"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"statistics": ["patients"]}, 'the statistic "columns" go together'),
        ({"columns": []}, 'the statistic "columns" go together'),
        ({"columns": ["label"]}, "none of id, label"),
        ({"column_ranges": []}, "one for each of columns"),
        ({"column_ranges": [[5.0, 5.0]]}, "the first must be below the second"),
        ({"column_units": ["years", "mg"]}, "one for each of columns"),
    ],
)
def test_columns_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.ConfigError, match=words):
        hospital.ask(**{**ASKED, **change})


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.0] * 199 + [37.0], False),  # the sum is that patient's value
        ([0.0] * 197 + [1.0] * 3, False),  # of a yes or no it says how many
        ([1.0] * 200, False),  # and here everybody's
        ([0.0] * 187 + [1.0] * 12 + [2.0], False),
        ([0.0] * 187 + [1.0] * 5 + [2.0] * 8, False),  # two sums say how many of two values
        ([0.0] * 190 + [1.0] * 10, True),
        ([0.0] * 190 + [10.0 + at for at in range(10)], True),
        ([0.0] * 190 + [10.0 + at for at in range(9)], False),
        ([10.0 + at for at in range(10)], True),
        ([None] * 10 + [0.0] * 20 + [5.0], False),
    ],
)
def test_sums_that_tell_of_few_patients_are_withheld(values: list[float | None], shown: bool) -> None:
    assert (told("north", values).values["value-age"] != (None, None, None)) == shown


@pytest.mark.parametrize("row", [(None, 1, 1), (5, 6, 1), (5, 1, 2)])
def test_sums_that_no_values_have_are_refused(row: tuple[int | None, ...]) -> None:
    survey = hospital.ask(**ASKED)
    sent = answer.Answer(survey=survey.hash, site="north", least=10, values={"patients": (None,), "value-age": row})
    with pytest.raises(errors.ProtocolError, match="sums of a column"):
        answer.parse(answer.text(sent), survey, "north")


def _asked() -> surveys.Survey:
    values = {"title": "t", "task": "segmentation", "class_names": ["background", "disc"], "least_patients": 5}
    return schema.parse(surveys.Survey, {**values, "statistics": ["columns"], **AGE}, "survey")


def test_a_site_tells_of_columns_only_where_its_policy_names_them(site: Site) -> None:
    (site.folder / "data" / "table.csv").write_text(
        "id,age\n" + "".join(f"{path.stem},{40 + at / 50}\n" for at, path in enumerate(_images(site)))
    )
    survey = _asked()
    site.agree(survey)
    assert site.word(survey) == "policy-survey"
    site.terms_of(POLICY.replace("[policy]\nsurveys = [", '[policy]\nsurveys = ["columns", '))
    reply = site.told(survey)
    seen = layout.moments(layout.groups(survey)[-1], reply.values["value-age"])
    assert seen is not None
    assert 40 < seen.mean < 41
    words = dict(survey_review.words(survey))
    assert words["columns"] == "of your table: age (0 to 100 years)"
    config = site_file.read_site(site.settings)
    assert "years" in survey_review.told_lines(survey, survey_review.tell(survey, config))[0]


def _images(site: Site) -> list[Path]:
    return sorted((site.folder / "data" / "images").iterdir())


@pytest.mark.parametrize("cell", ["140", "SECRET"])
def test_a_value_that_cannot_be_meant_stops_the_answer(site: Site, cell: str) -> None:
    name = _images(site)[0].stem
    (site.folder / "data" / "table.csv").write_text(f"id,age\n{name},{cell}\n")
    site.terms_of(POLICY)
    with pytest.raises(errors.DataError, match="column 'age'") as caught:
        site_file.surveyed(site_file.read_site(site.settings), _asked())
    assert "SECRET" not in str(caught.value)


def test_a_site_without_a_table_tells_nothing_of_columns(site: Site) -> None:
    site.terms_of(POLICY.replace("[policy]\nsurveys = [", '[policy]\nsurveys = ["columns", '))
    text = site.settings.read_text()
    site.settings.write_text(f'table = "absent"\n{text}')
    survey = _asked()
    site.agree(survey)
    assert site.told(survey).values["value-age"] == (None, None, None)


def test_virtual_hospitals_propose_the_constants_of_their_recipe(tmp_path: Path) -> None:
    names = [f"{number:02d}" for number in range(60)]
    labels = "id,label,image\n" + "".join(f"{name},{'xy'[at % 2]},\n" for at, name in enumerate(names))
    ages = {name: 30.0 + at for at, name in enumerate(names)}
    table = "id,age,sex\n" + "".join(f"{name},{age},\n" for name, age in ages.items())
    labels, table = labels + "visit,x,none\n", table + "visit,,F\n"
    root = folder(tmp_path / "data", labels, names, table=table)  # type: ignore[arg-type]
    inputs: dict[str, Any] = {"numbers": ["age"], "ranges": [[0.0, 100.0]], "centres": [50.0], "scales": [25.0]}
    inputs |= {"categories": {"sex": ["F", "M"]}, "images_missing": True}
    recipe = {"backbone": {"name": "unet"}, "task": {"kind": "classification"}, "adapter": {"kind": "full"}}
    recipe |= {"inputs": inputs, "data": {"class_names": ["x", "y"], "input_size": [32, 32]}, "rounds": 1}
    values = {
        "name": "e",
        "recipe": recipe,
        "data": {"source": "folder", "path": str(root)},
        "partition": {"kind": "iid", "sites": 2},
    }
    what = schema.parse(schema.Experiment, values, "e")
    merged, proposed, files = simulated.run(what, tmp_path / "out")
    assert merged.survey.columns == ("age",)
    assert proposed.values["inputs.centres"][0] == pytest.approx(np.mean(list(ages.values())), abs=8)
    assert proposed.values["inputs.scales"][0] == pytest.approx(np.std(list(ages.values())), abs=5)
    group = json.loads(files[0].read_text())["groups"]["value-age"]
    assert math.isclose(group["mean"], proposed.values["inputs.centres"][0], rel_tol=1e-3)
    assert group["range"] == [0.0, 100.0]
    partly = what.model_copy(update={"partition": what.partition.model_copy(update={"without_table": ("hospital-1",)})})
    merged, _, _ = simulated.run(partly, tmp_path / "partly")
    assert merged.withheld["value-age"] == (1, 1, 1)
