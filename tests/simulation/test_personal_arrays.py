"""Whole simulations in which some arrays stay at each site: what leaves, what stays, resumed, and by any engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedvfm.simulation import experiment, plan, run, run_folder
from fedvfm.simulation.engines import worker_schedule
from fedvfm.state import checkpoint, groups
from fedvfm.storage import hash_chain

KINDS = ("head-local", "norm-local", "share-A", "by-part")
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
    return {**tiny.values, "baselines": [], "workers": 1, "recipe": recipe}


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("personal-arrays")
    return {kind: run.simulate(what(tiny, kind), output=root / kind).path for kind in (*KINDS, "none")}


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


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_adapter_holds_first_values_and_each_site_its_own(
    finished: dict[str, Path], tiny: Any, kind: str
) -> None:
    lock = locked(tiny, kind)
    own = groups.personal(lock.manifest, kind)
    adapter = checkpoint.read(finished[kind] / "adapter.safetensors")[0]
    for name in adapter:
        assert (adapter[name].tobytes() == lock.adapter[name].tobytes()) == (name in own), name
    sites = [checkpoint.read(finished[kind] / "sites" / site / "fedvfm_adapter.safetensors")[0] for site in SITES]
    for name in adapter:
        assert len({site[name].tobytes() for site in sites}) == (len(SITES) if name in own else 1), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_says_what_truly_leaves(finished: dict[str, Path], tiny: Any, kind: str) -> None:
    parsed = experiment.parse(what(tiny, kind), "experiment")
    planned, done = plan.plan(parsed, experiment.hospitals(parsed)), summary(finished[kind])
    assert planned["bytes"]["up"] == pytest.approx(done["bytes"]["up"], rel=0.02)
    lock = locked(tiny, kind)
    saved = 4 * groups.personal_numbers(lock.manifest, lock.recipe) * ROUNDS * len(SITES)
    assert summary(finished["none"])["bytes"]["up"] - done["bytes"]["up"] >= saved


@pytest.mark.parametrize("after", [1, 2])
def test_a_stopped_run_ends_as_one_that_was_not(
    finished: dict[str, Path], tiny: Any, tmp_path: Path, after: int
) -> None:
    """Stopped in the middle of a round, when one site has trained and settled what it keeps."""

    def stop(event: str, /, **fields: Any) -> None:
        if event == "reply" and fields["phase"] == "train" and fields["round"] == after + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.simulate(what(tiny, "head-local"), output=tmp_path / "run", observer=stop)
    run.resume(tmp_path / "run")
    assert results(tmp_path / "run") == results(finished["head-local"])


@pytest.mark.skipif(not worker_schedule.can_fork(), reason="workers cannot be forked safely here")
def test_two_workers_give_the_same_bits(finished: dict[str, Path], tiny: Any, tmp_path: Path) -> None:
    again = run.simulate({**what(tiny, "by-part"), "workers": 2}, output=tmp_path / "run").path
    assert results(again) == results(finished["by-part"])
