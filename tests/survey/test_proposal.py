"""What is proposed of a survey: by the written rules, checked by hand, and never of what was withheld."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping

import pytest

from fedvfm.config import schema
from fedvfm.survey import answer, draft, layout, proposal, results
from tests.survey import hospital

EDGES = [16, 32, 48, 64, 128, 192, 256, 512]
CT = {"modality": "CT", "scale": "file", "intensity_range": [-1000.0, 1000.0], "intensity_bins": 100}


def result(rows: Mapping[str, Mapping[int, float]], patients: int = 100, **values: object) -> answer.Merged:
    """A result with these patients in these bins."""
    survey = hospital.ask(class_names=["background", "disc"], **values)
    filled = {
        group.name: [rows.get(group.name, {}).get(at) for at in range(len(group.labels))]
        for group in layout.groups(survey)
    }
    filled["patients"] = [float(patients)]
    hidden = {name: tuple(int(value is None) for value in row) for name, row in filled.items()}
    shown = {name: tuple(row) for name, row in filled.items()}
    return answer.Merged(survey, ("north",), shown, hidden, {}, 10)


def at(name: str, value: float, **values: object) -> int:
    group = next(one for one in layout.groups(hospital.ask(**values)) if one.name == name)
    return layout.place(group, value)


def test_the_input_is_the_median_on_the_grid_of_the_backbone() -> None:
    rows = {"rows": {at("rows", 256): 60.0, at("rows", 700): 40.0}, "columns": {at("columns", 1100): 100.0}}
    proposed = proposal.propose(result(rows), "dinov2-small-imgfocus")
    assert proposed.values["data.input_size"] == [252, 504]  # 256 and at most 512, on a grid of 14
    assert proposal.propose(result(rows), "dinov2-small-imgfocus", 224).values["data.input_size"] == [224, 224]


def test_no_median_of_what_is_withheld() -> None:
    few = {"rows": {7: 40.0}, "columns": {7: 100.0}}
    left = dict(proposal.propose(result(few), "dinov2-small-imgfocus").left)
    assert "60% of the patients are withheld" in left["data.input_size"]


def test_a_sam_keeps_the_size_it_was_trained_at() -> None:
    rows = {"rows": {7: 100.0}, "columns": {7: 100.0}}
    proposed = proposal.propose(result(rows), "sam-vit-base")
    assert "data.input_size" not in proposed.values


def test_a_window_goes_from_tail_to_tail_of_the_structures() -> None:
    low, middle, high = (at("foreground-0", value, **CT) for value in (-100, 50, 180))
    rows = {"foreground-0": {low: 1.0, middle: 98.0, high: 1.0}}
    proposed = proposal.propose(result(rows, **CT), "dinov2-small-imgfocus")
    assert proposed.values["data.window"] == [50.0, 300.0]  # -100 to 200: the bins' outer edges, 20 wide
    thin = {"foreground-0": {low: 0.4, middle: 99.2, high: 0.4}}
    assert proposal.propose(result(thin, **CT), "dinov2-small-imgfocus").values["data.window"] == [50.0, 20.0]


def test_no_window_where_grey_values_have_no_unit_or_tails_are_withheld() -> None:
    rows = {"foreground-0": {5: 90.0}}
    for values, word in (({}, "no unit"), (CT, "10% of the intensities")):
        left = dict(proposal.propose(result(rows, **values), "dinov2-small-imgfocus").left)
        assert word in left["data.window"]


def test_class_weights_are_inverse_shares_within_bounds() -> None:
    rows = {"class-shares": {0: 80.0, 1: 20.0}}
    assert proposal.propose(result(rows), "dinov2-small-imgfocus").values["task.class_weights"] == [0.625, 2.5]
    rows = {"class-shares": {0: 99.0, 1: 1.0}}
    assert proposal.propose(result(rows), "dinov2-small-imgfocus").values["task.class_weights"] == [0.505, 4.0]
    boxes = proposal.propose(result(rows), "dinov2-small-imgfocus", task="detection")
    assert (boxes.task, "task.class_weights" in boxes.values) == ("detection", False)
    left = dict(proposal.propose(result({"class-shares": {0: 99.0}}), "dinov2-small-imgfocus").left)
    assert "withheld" in left["task.class_weights"]


@pytest.mark.parametrize(("noise", "said"), [(3.0, True), (0.01, False)])
def test_nothing_is_proposed_of_what_noise_alone_may_have_made(noise: float, said: bool) -> None:
    rows = {name: dict.fromkeys(range(20), -3.0) | {7: 160.0} for name in ("rows", "columns")}
    rows |= {"foreground-0": {50: 100.0}, "class-shares": {0: 90.0, 1: 10.0}}
    exact = result(rows, **CT)
    names = [group.name for group in layout.groups(exact.survey)]
    noisy = dataclasses.replace(exact, noise=dict.fromkeys(names, noise))
    left = dict(proposal.propose(noisy, "dinov2-small-imgfocus").left)
    keys = ("data.input_size", "data.window", "task.class_weights")
    assert ["the noise" in left.get(key, "") for key in keys] == [said] * 3
    assert said == ("a standard deviation of 3 patients" in left.get("data.input_size", ""))


def told(site: str, patients: int, side: int, **values: object) -> answer.Answer:
    """The answer of a site whose images are all of one size."""
    survey = hospital.ask(statistics=["patients", "sizes"], **values)
    rows = {group.name: [0] * len(group.labels) for group in layout.groups(survey)}
    for group in layout.groups(survey):
        rows[group.name][layout.place(group, side) if group.edges else 0] = patients * layout.WHOLE
    return answer.Answer(survey=survey.hash, site=site, least=10, values={key: tuple(row) for key, row in rows.items()})


SIZES = hospital.ask(statistics=["patients", "sizes"])
HONEST = [told("east", 40, 512), told("north", 60, 512), told("south", 50, 512)]


@pytest.mark.parametrize("claimed", [40, 151, 10**9])
def test_one_site_that_lies_moves_no_median_however_many_patients_it_claims(claimed: int) -> None:
    answers = [*HONEST, told("mal", claimed, 64)]
    proposed = proposal.of_answers(SIZES, answers, "dinov2-small-imgfocus")
    assert proposed.values["data.input_size"] == [504, 504]
    said = dict(proposed.reasons)["data.input_size"]
    assert ("site 'mal' counts for" in said) == (claimed > 150)
    assert answer.merged(SIZES, answers).patients == 150 + claimed, "the tables have what was told"


@pytest.mark.parametrize("below", [0, -1])
def test_under_noise_a_site_that_says_few_patients_and_tells_of_many_moves_no_median(below: int) -> None:
    noisy = hospital.ask(statistics=["patients", "sizes"], privacy={"epsilon": 1.0, "delta": 1e-4})
    sigmas = {group.name: 1 for group in layout.groups(noisy)}
    update = {"survey": noisy.hash, "sigmas": sigmas}
    answers = [own.model_copy(update=update) for own in (*HONEST, told("mal", 40, 64))]
    rows = dict(answers[-1].values)
    for name in ("rows", "columns"):
        row = [count * 1000 for count in rows[name]]
        row[at(name, 512)] = below * max(row)
        rows[name] = tuple(row)
    answers[-1] = answers[-1].model_copy(update={"values": rows})
    assert answer.faults(answers[-1], noisy, "mal") == []
    assert proposal.of_answers(noisy, answers, "dinov2-small-imgfocus").values["data.input_size"] == [504, 504]


def test_a_value_that_hangs_on_one_site_says_so() -> None:
    answers = [told("east", 40, 512), told("north", 60, 224), told("south", 50, 512)]
    proposed = proposal.of_answers(SIZES, answers, "dinov2-small-imgfocus")
    assert proposed.values["data.input_size"] == [504, 504]
    said = dict(proposed.reasons)["data.input_size"]
    assert said.endswith("without site 'east' it would be [224, 224]; without site 'south' it would be [224, 224]")
    two = proposal.of_answers(SIZES, answers[:2], "dinov2-small-imgfocus")
    assert "without site" not in dict(two.reasons)["data.input_size"], "of two neither can be told from the other"


def test_slices_far_apart_are_called_anisotropic() -> None:
    rows = {
        name: {at(name, value): 100.0}
        for name, value in (("row-spacing", 0.5), ("column-spacing", 0.5), ("slice-spacing", 5.0))
    }
    left = dict(proposal.propose(result(rows), "dinov2-small-imgfocus").left)
    assert "anisotropic" in left["spacing"]


@pytest.mark.parametrize(("rows", "columns", "size"), [(512, 512, [96, 96]), (50, 200, [48, 192]), (30, 30, [16, 16])])
def test_a_piece_of_a_volume_fits_where_the_drafted_one_does(rows: int, columns: int, size: list[int]) -> None:
    edges = {"size_edges": EDGES}
    sizes = {name: {at(name, side, **edges): 100.0} for name, side in (("rows", rows), ("columns", columns))}
    assert proposal.propose(result(sizes, **edges), "unet3d").values["data.input_size"] == size


@pytest.mark.parametrize(
    ("between", "target"), [({2.0: 100.0}, [2.0, 0.5, 0.5]), ({1.0: 15.0, 5.0: 85.0}, [1.0, 0.5, 0.5])]
)
def test_volumes_are_brought_to_the_median_spacing(between: dict[float, float], target: list[float]) -> None:
    """Of slices far apart to a fine tenth of it, as nnU-Net has it."""
    rows = {name: {at(name, 0.5): 100.0} for name in ("row-spacing", "column-spacing")}
    rows["slice-spacing"] = {at("slice-spacing", value): count for value, count in between.items()}
    whole = result(rows)
    proposed = proposal.propose(whole, "unet3d")
    assert proposed.values["data.spacing"] == target
    assert "data.depth" in dict(proposed.left)
    assert f"spacing = {target}" in proposal.recipe(whole, proposed, "unet3d")
    assert "keep their size" in dict(proposal.propose(result({}), "unet3d").left)["data.spacing"]
    assert "data.spacing" not in proposal.propose(whole, "dinov2-small-imgfocus").values


def test_what_nothing_decides_is_said() -> None:
    proposed = proposal.propose(result({}), "dinov2-small-imgfocus")
    left = dict(proposed.left)
    assert proposed.values["optimiser.learning_rate"] == 1.5e-3
    assert {"optimiser.batch_size", "data.window", "data.input_size"} <= set(left)


def test_the_proposed_recipe_can_be_read_and_locked() -> None:
    rows = {"rows": {7: 100.0}, "columns": {7: 100.0}, "class-shares": {0: 80.0, 1: 20.0}}
    found = result(rows, purpose="why |\n# not a heading", title="a\n\x1b[31mb")
    proposed = proposal.propose(found, "dinov2-small-imgfocus")
    text = proposal.recipe(found, proposed, "dinov2-small-imgfocus")
    recipe = schema.parse(schema.Recipe, tomllib.loads(text), "recipe")
    assert recipe.task.class_weights == (0.625, 2.5)
    assert recipe.data.input_size == (252, 252)
    page = results.page(found, proposed)
    assert "\x1b" not in page
    assert "why \\| \\# not a heading" in page


@pytest.mark.parametrize(("task", "modality"), [("segmentation", "CT"), ("classification", "any")])
def test_a_draft_has_every_key_and_can_be_read(task: str, modality: str) -> None:
    values = tomllib.loads(draft.text(task, ["a", "b"], modality))
    assert values["task"] == task
    assert ("scale" in values) == (modality == "CT")
