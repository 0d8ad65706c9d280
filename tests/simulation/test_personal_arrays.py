"""Whole simulations in which some arrays stay at each site: what leaves, what stays, resumed, and by any engine."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

import fedvfm
from fedvfm import errors
from fedvfm.client.personal import choice
from fedvfm.client.training import evaluator
from fedvfm.protocol import protocol
from fedvfm.simulation import baselines, experiment, plan, run, run_folder
from fedvfm.simulation.engines import worker_schedule
from fedvfm.state import checkpoint, groups
from fedvfm.storage import hash_chain

KINDS = ("head-local", "norm-local", "share-A", "by-part")
BESIDE = groups.BESIDE
SITES = ("east", "north", "west")
ROUNDS = 3


def what(tiny: Any, kind: str, **more: Any) -> dict[str, Any]:
    recipe = {
        **tiny.values["recipe"],
        "rounds": ROUNDS,
        "evaluation": {"every": 1, "surface": False},
        "personal": {"kind": kind},
        **more,
    }
    if kind == "dual":
        recipe["adapter"] = {**recipe["adapter"], "options": {"personal": 2}}
    return {**tiny.values, "baselines": [], "workers": 1, "recipe": recipe}


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("personal-arrays")
    return {kind: run.simulate(what(tiny, kind), output=root / kind).path for kind in (*KINDS, *BESIDE, "none")}


def summary(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return content


def locked(tiny: Any, kind: str) -> Any:
    return experiment.examine(experiment.parse(what(tiny, kind), "experiment")).locked()


def kept(path: Path, site: str) -> Path:
    """The file of a site's personal arrays after the last round."""
    return sorted(run_folder.RunFolder(path).personal_arrays(site).glob("*.personal"))[-1]


def results(path: Path) -> Any:
    """What must not hang on who computes, or on stops."""
    lines = [(line["fingerprint"], line["validation"]) for line in hash_chain.read(path / "journal.jsonl")]
    return lines, {site: kept(path, site).read_bytes() for site in SITES}, summary(path)["arms"]


@pytest.mark.parametrize("kind", [*KINDS, *BESIDE])
def test_the_global_adapter_holds_first_values_and_each_site_its_own(
    finished: dict[str, Path], tiny: Any, kind: str
) -> None:
    lock = locked(tiny, kind)
    own = groups.personal(lock.manifest, kind)
    adapter = checkpoint.read(finished[kind] / "adapter.safetensors")[0]
    for name in adapter:
        assert (adapter[name].tobytes() == lock.adapter[name].tobytes()) == (name in own), name
    sites = [checkpoint.read(finished[kind] / "sites" / site / "fedvfm_adapter.safetensors")[0] for site in SITES]
    stays = groups.kept(lock.manifest, kind)
    for name in set(adapter) - stays:
        assert len({site[name].tobytes() for site in sites}) == 1, name
    assert len({site.select(sorted(stays)).fingerprint for site in sites}) == len(SITES)


@pytest.mark.parametrize("kind", BESIDE)
def test_what_trains_beside_the_federation_changes_nothing_of_it(
    finished: dict[str, Path], tiny: Any, kind: str
) -> None:
    """Scores, norms and adapter of every round are to the bit those of the recipe without it."""
    plain, own = finished["none"], finished[kind]
    for line, other in zip(
        hash_chain.read(plain / "journal.jsonl"), hash_chain.read(own / "journal.jsonl"), strict=True
    ):
        assert [line[key] for key in ("validation", "norms")] == [other[key] for key in ("validation", "norms")]
    adapter, same = (checkpoint.read(path / "adapter.safetensors")[0] for path in (plain, own))
    assert same.select(sorted(adapter)) == adapter
    assert {name for name in same if name not in adapter} == groups.personal(locked(tiny, kind).manifest, kind)
    assert summary(plain)["arms"]["federated"]["sites"] == summary(own)["arms"]["federated"]["sites"]
    parsed = experiment.parse(what(tiny, kind), "experiment")
    planned = plan.plan(parsed, experiment.hospitals(parsed))["bytes"]
    assert planned["up"] == pytest.approx(summary(own)["bytes"]["up"], rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_says_what_truly_leaves(finished: dict[str, Path], tiny: Any, kind: str) -> None:
    parsed = experiment.parse(what(tiny, kind), "experiment")
    planned, done = plan.plan(parsed, experiment.hospitals(parsed)), summary(finished[kind])
    assert planned["bytes"]["up"] == pytest.approx(done["bytes"]["up"], rel=0.05)
    lock = locked(tiny, kind)
    saved = 4 * groups.personal_numbers(lock.manifest, lock.recipe) * ROUNDS * len(SITES)
    assert summary(finished["none"])["bytes"]["up"] - done["bytes"]["up"] >= saved


@pytest.mark.parametrize(("after", "kind"), [(1, "head-local"), (2, "ditto")])
def test_a_stopped_run_ends_as_one_that_was_not(
    finished: dict[str, Path], tiny: Any, tmp_path: Path, after: int, kind: str
) -> None:
    """Stopped in the middle of a round, when one site has trained and settled what it keeps."""

    def stop(event: str, /, **fields: Any) -> None:
        if event == "reply" and fields["phase"] == "train" and fields["round"] == after + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.simulate(what(tiny, kind), output=tmp_path / "run", observer=stop)
    run.resume(tmp_path / "run")
    assert results(tmp_path / "run") == results(finished[kind])


@pytest.mark.skipif(not worker_schedule.can_fork(), reason="workers cannot be forked safely here")
def test_two_workers_give_the_same_bits(finished: dict[str, Path], tiny: Any, tmp_path: Path) -> None:
    again = run.simulate({**what(tiny, "dual"), "workers": 2}, output=tmp_path / "run").path
    assert results(again) == results(finished["dual"])


@pytest.mark.parametrize("kind", [*KINDS, *BESIDE])
def test_no_file_of_the_server_holds_what_a_site_keeps(finished: dict[str, Path], kind: str) -> None:
    """Journal, checkpoints and final adapter: what a coordinator has. ``personal/`` and ``sites/`` are the sites'."""
    at_sites = {"personal", "sites"}
    files = [path for path in finished[kind].rglob("*") if path.is_file()]
    theirs = [path for path in files if path.relative_to(finished[kind]).parts[0] not in at_sites]
    assert {"journal.jsonl", "adapter.safetensors"} <= {path.name for path in theirs}
    for site in SITES:
        for path in kept(finished[kind], site).parent.iterdir():
            own = safetensors.numpy.load(path.read_bytes())
            for name, array in own.items():
                if kind == "ditto" and array.size < 16:
                    continue  # after Adam's first steps of one size, two numbers may be those of another adapter
                holders = [str(file) for file in theirs if array.tobytes() in file.read_bytes()]
                assert not holders, f"{name} of {site}"
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_a_site_is_scored_with_its_own_arrays(finished: dict[str, Path], tiny: Any) -> None:
    """The scores in the run are those of ``sites/NAME``, not those of the global adapter."""
    parsed = experiment.parse(what(tiny, "head-local"), "experiment")
    members = run.members(parsed, experiment.hospitals(parsed))
    scores = summary(finished["head-local"])["arms"]["federated"]["sites"]
    for site in members[: len(SITES)]:
        model = fedvfm.load_adapter(finished["head-local"] / "sites" / site.name)
        task = protocol.Task(model.recipe, ROUNDS, None, "test")
        assert evaluator.evaluate(model, site, model.read(), task).metrics["dice"] == scores[site.name]["dice"]


def test_a_global_adapter_whose_head_nobody_trained_predicts_nothing(finished: dict[str, Path]) -> None:
    with pytest.raises(errors.CheckpointError, match="the head of this adapter was never trained"):
        fedvfm.load_adapter(finished["head-local"] / "adapter")
    assert fedvfm.load_adapter(finished["norm-local"] / "adapter").personal
    assert "personal (norm-local): scale and shift" in (finished["norm-local"] / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["head-local", "dual"])
def test_it_is_one_more_candidate_of_the_choice(tiny: Any, tmp_path: Path, kind: str) -> None:
    values = {**what(tiny, kind), "baselines": ["local-only"], "personal": {"rounds": 1}}
    path = run.simulate(values, output=tmp_path / "run").path
    for site in SITES:
        folder = path / "arms" / "personal" / site
        seen = json.loads((folder / "evaluation.json").read_text())["choice"]["gains"]
        assert set(seen) == set(choice.PREFERENCE)
        # Few steps of a second pair may change no pixel of a mask.
        assert kind == "dual" or seen[choice.PARTIAL] != seen[choice.GLOBAL]
    local = json.loads((path / "arms" / "local-only" / "east" / "evaluation.json").read_text())["recipe"]
    assert local != locked(tiny, kind).recipe.hash, "alone at home nothing is shared, and no store is"


def test_a_probe_of_frozen_features_shares_its_head(tiny: Any) -> None:
    asked = experiment.parse(what(tiny, "head-local"), "experiment").recipe
    assert baselines.frozen(asked).personal.kind == groups.NONE


def test_what_has_no_meaning_is_a_fault_of_the_experiment(tiny: Any) -> None:
    for kind, more, word in (
        ("share-A", {"adapter": {**tiny.values["recipe"]["adapter"], "factors": "freeze-A"}}, "use factors"),
        ("by-part", {"aggregation": {"rule": "svd"}}, "joins the products of both factors"),
        ("share-A", {"adapter": {"kind": "bias"}}, "has no such array"),
        ("head-local", {"adapter": {"kind": "head-only"}}, "nothing that trains would be shared"),
        ("dual", {"adapter": {"kind": "bias"}}, "unknown option of 'bias'"),
        ("ditto", {"aggregation": {"rule": "svd"}}, "a pull to them means nothing"),
    ):
        with pytest.raises(errors.ConfigError, match=word):
            experiment.examine(experiment.parse(what(tiny, kind, **more), "experiment"))
    pairless = what(tiny, "dual")
    del pairless["recipe"]["adapter"]["options"]
    with pytest.raises(errors.ConfigError, match="has no second pairs"):
        experiment.examine(experiment.parse(pairless, "experiment"))
    with pytest.raises(errors.ConfigError, match="baselines: 'leave-one-out' has no meaning"):
        experiment.examine(experiment.parse({**what(tiny, "share-A"), "baselines": ["leave-one-out"]}, "experiment"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["head-local", "dual"])
@pytest.mark.parametrize(
    "more",
    [
        {"codec": "int8"},
        {"aggregation": {"rule": "svd"}},
        {"aggregation": {"server_optimiser": "adam", "server_learning_rate": 0.01}},
        {"aggregation": {"weighting": "uniform"}, "secure_aggregation": {}, "min_sites": 3},
        {
            "aggregation": {"weighting": "uniform"},
            "privacy": {"mechanism": "site-level", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-4},
        },
        {
            "aggregation": {"weighting": "uniform"},
            "privacy": {"mechanism": "record-level", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-4},
        },
    ],
    ids=["codec", "svd", "server-optimiser", "secure-aggregation", "site-level", "record-level"],
)
def test_what_stays_does_so_beside_everything_else(tiny: Any, tmp_path: Path, more: dict[str, Any], kind: str) -> None:
    """Neither noise nor a server's step nor rounding moves a personal array of the global adapter by one bit."""
    path = run.simulate(what(tiny, kind, **more), output=tmp_path / "run").path
    lock = locked(tiny, kind)
    own = groups.personal(lock.manifest, kind)
    adapter = checkpoint.read(path / "adapter.safetensors")[0]
    assert {name for name in adapter if adapter[name].tobytes() == lock.adapter[name].tobytes()} == own
    assert {len(list(kept(path, site).parent.iterdir())) for site in SITES} == {ROUNDS}
