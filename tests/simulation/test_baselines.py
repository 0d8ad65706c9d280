"""What every arm of an experiment trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.server.rounds import cohort
from fedvfm.simulation import baselines, experiment, run

SITES = ["east", "north", "west"]


@pytest.fixture
def moving() -> schema.Experiment:
    """The bundled demo with every baseline, and a server that takes steps of its own."""
    names = '["local-only", "pooled", "pooled-2x", "head-only", "leave-one-out", "unet", "classical"]'
    sets = [f"baselines={names}", "recipe.aggregation.server_momentum=0.5"]
    return experiment.load("brain-mri", sets)


def arms(what: schema.Experiment) -> dict[str, Any]:
    return {arm.name: arm for arm in run.arms(what, SITES)}


def test_equal_gradient_steps_per_sample_in_all_trained_arms(moving: schema.Experiment) -> None:
    own = moving.recipe
    for name, arm in arms(moving).items():
        if arm.recipe is None:
            continue
        assert arm.recipe.rounds == own.rounds, name
        assert arm.recipe.optimiser.batch_size == own.optimiser.batch_size, name
        epochs = own.optimiser.local_epochs * (2 if name == "pooled-2x" else 1)
        assert arm.recipe.optimiser.local_epochs == epochs, name


def test_arms_of_one_site_take_no_server_step(moving: schema.Experiment) -> None:
    for name, arm in arms(moving).items():
        if arm.recipe is not None:
            alone = len(arm.train_sites) == 1
            momentum = arm.recipe.aggregation.server_momentum
            assert momentum == (0.0 if alone else 0.5), name


def test_who_trains_and_who_tests(moving: schema.Experiment) -> None:
    found = arms(moving)
    assert next(iter(found)) == "federated"
    assert found["local-only/north"].train_sites == ("north",)
    assert found["local-only/north"].test_sites == tuple(SITES)
    assert found["pooled"].train_sites == (virtual_hospitals.POOLED,)
    assert found["leave-one-out/west"].train_sites == ("east", "north")
    assert found["leave-one-out/west"].test_sites == ("west",)
    assert found["classical"].recipe is None
    assert found["unet"].recipe.backbone.name == "unet"
    assert found["head-only"].recipe.adapter.kind == "head-only"


# --- cohorts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_cohort_leaves_equal_gradient_steps_per_sample(moving: schema.Experiment, size: int) -> None:
    """Rounds times the share of its sites that a round asks is the same in every arm: a sample's expected visits."""
    recipe = moving.recipe.model_copy(update={"rounds": 6})
    what = moving.model_copy(update={"recipe": recipe, "server": schema.ServerConfig(cohort=size)})
    found = arms(what)
    assert found["federated"].recipe.rounds == found["unet"].recipe.rounds == found["head-only"].recipe.rounds == 6
    assert found["pooled"].recipe.rounds == found["local-only/north"].recipe.rounds == 2 * size
    for name, arm in found.items():
        if arm.recipe is None:
            continue
        asked = cohort.choose(arm.train_sites, baselines.server_of(arm, what.server), 0, 1)
        visits = arm.recipe.rounds * len(asked) / len(arm.train_sites)
        assert visits == pytest.approx(6 * size / 3), name
    said = baselines.fewer_rounds({name: arm.recipe.rounds for name, arm in found.items() if arm.recipe}, what, 3)
    assert ("pooled 4" in said) == (size == 2)
    assert (said == "") == (size == 3)


def test_rounds_under_a_cohort_are_the_nearest_whole_number_and_never_none(moving: schema.Experiment) -> None:
    for rounds, size, expected in ((1, 1, 1), (5, 2, 3), (4, 1, 1)):
        recipe = moving.recipe.model_copy(update={"rounds": rounds})
        what = moving.model_copy(update={"recipe": recipe, "server": schema.ServerConfig(cohort=size)})
        assert arms(what)["pooled"].recipe.rounds == expected


def test_every_federation_has_the_cohort_and_quorum_of_the_first(moving: schema.Experiment) -> None:
    server = schema.ServerConfig(cohort=3, quorum=3, round_timeout_s=7.0)
    found = arms(moving)
    for name, asked in (("federated", 3), ("unet", 3), ("head-only", 3), ("leave-one-out/west", 2), ("pooled", 1)):
        own = baselines.server_of(found[name], server)
        assert (own.cohort, own.quorum, own.round_timeout_s) == (asked, asked, 7.0), name
        assert cohort.faults(len(found[name].train_sites), own) == []


def test_what_cannot_be_with_these_sites_is_told_at_once(moving: schema.Experiment) -> None:
    server = schema.ServerConfig(cohort=5, quorum=5)
    said = experiment.site_faults(moving.model_copy(update={"server": server, "site_ranks": {"south": 2}}), SITES)
    assert said == [
        "server.cohort = 5: 3 sites can train; give at most 3, or 0 for all",
        "server.quorum = 5: 3 sites can train; give at most 3, or 0 for all that are asked",
        "site_ranks: no site south; sites: east, north, west",
    ]
    with pytest.raises(ValueError, match=r"no round could reach quorum = 3; give at least 3"):
        schema.ServerConfig(cohort=2, quorum=3)
    (fault,) = experiment.site_faults(moving, ["solo"])
    assert fault == "baselines: 'leave-one-out' needs more sites than solo; bring more or leave it out"


def test_a_baseline_of_another_task_is_found_with_the_other_faults() -> None:
    with pytest.raises(errors.ConfigError, match=r"baselines: 'unet' is for segmentation"):
        experiment.examine(experiment.load("cells", ['baselines=["unet"]']))


def test_beyond_its_cap_the_matrix_is_a_balanced_sample(tiny: Any) -> None:
    """Every model at home, every site tests equally many models, the seed decides which; below the cap all cells."""
    names = [f"site-{number:02d}" for number in range(40)]

    def drawn(seed: int, most: int) -> dict[str, tuple[str, ...]]:
        recipe = {**tiny.values["recipe"], "seed": seed}
        values = {**tiny.values, "recipe": recipe, "baseline": {"matrix_sites": most}}
        return baselines.tested_at(experiment.parse(values, "x"), names)

    found = drawn(0, 16)
    assert all(home in tested and len(set(tested)) == 16 for home, tested in found.items())
    assert {sum(name in tested for tested in found.values()) for name in names} == {16}
    assert found == drawn(0, 16)
    assert found != drawn(1, 16)
    assert set(drawn(0, 40).values()) == {tuple(names)}
    assert drawn(0, 1) == {name: (name,) for name in names}


def test_a_sampled_matrix_is_said_wherever_it_is_shown(tiny: Any, tmp_path: Path) -> None:
    notes: list[str] = []

    def watch(event: str, /, **fields: Any) -> None:
        notes.extend([fields["text"]] if event == "note" else [])

    values = {**tiny.values, "baselines": ["local-only"], "baseline": {"matrix_sites": 2}}
    values["recipe"] = {**tiny.values["recipe"], "rounds": 1}
    made = run.simulate(values, output=tmp_path / "run", observer=watch)
    local = made.summary["arms"]["local-only"]
    assert local["matrix_sites"] == 2
    assert all(home in row and len(row) == 2 for home, row in local["matrix"].items())
    said = "ach local-only model is tested at home and at 1 of 2 other sites, drawn from the seed"
    assert any(said in note for note in notes)
    assert said in (made.path / "report.html").read_text()


@pytest.mark.parametrize(
    ("shared", "alone", "joined"),
    [
        ("record-level-shared", "record-level", "record-level"),
        ("patient-level-shared", "patient-level", "patient-level"),
        ("site-level-shared", "none", "site-level"),
    ],
)
def test_where_nobody_shares_a_noise_the_whole_of_it_is_one_s_own(shared: str, alone: str, joined: str) -> None:
    values = {
        "backbone": {"name": "none"},
        "data": {"class_names": ["rest", "cell"]},
        "min_sites": 3,
        "secure_aggregation": {},
        "privacy": {"mechanism": shared, "clip": 1.0, "noise_multiplier": 1.5, "delta": 1e-5},
    }
    recipe = schema.parse(schema.Recipe, values, "recipe")
    by_itself = baselines.alone(recipe).privacy
    assert by_itself.mechanism == alone
    assert by_itself.noise_multiplier == (None if alone == "none" else 1.5)
    arm = baselines.whole(baselines.Arm("left out", "leave-one-out", recipe, ("a", "b"), ("a", "b")))
    assert arm.recipe is not None
    assert (arm.recipe.privacy.mechanism, arm.recipe.secure_aggregation) == (joined, None)


def test_a_network_without_prompts_is_told_nothing_of_them() -> None:
    sets = ['baselines=["unet"]', 'recipe.task.prompt="auto"', "recipe.task.options.passes=3"]
    sets += ['recipe.task.head="sam-masks"', 'recipe.adapter.kind="lora"']
    what = experiment.load("sam-brain-mri", sets)
    experiment.examine(what)
    (arm,) = baselines.unet(what, SITES)
    assert (arm.recipe.task.prompt, arm.recipe.task.options) == ("none", {})
