"""SCAFFOLD through the real rounds: problems of known solution, a kill, refusals, few sites a round."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.config import rates, schema
from fedvfm.protocol import protocol
from fedvfm.server.rounds import controls
from fedvfm.state import checkpoint, control_variates, groups, state
from fedvfm.storage import hash_chain
from tests.server import numpy_sites

PLAIN = {"name": "sgd", "learning_rate": 0.1, "batch_size": 2, "schedule": "constant", "warmup": 0.0, "clip_norm": 0.0}


def recipe(corrected: bool = True, rounds: int = 30, **more: Any) -> schema.Recipe:
    optimiser = {**PLAIN, **({"control_variates": True} if corrected else {}), **more.pop("optimiser", {})}
    joined = {"weighting": "uniform", **more.pop("aggregation", {})}
    evaluation = {"every": 0}
    return numpy_sites.make_recipe(
        optimiser=optimiser, aggregation=joined, rounds=rounds, evaluation=evaluation, **more
    )


@dataclass
class Quadratic(numpy_sites.NumpySite):
    """A site whose loss is ``curvature / 2 (w - optimum)^2`` for every number w."""

    curvature: float = 1.0
    optimum: float = 0.0

    def train(self, task: protocol.Task) -> RecordDict:
        """Plain steps of the recipe's rates, as many as its images make."""
        assert task.state is not None
        own = task.recipe.optimiser
        steps = math.ceil(self.examples / own.batch_size) * own.local_epochs
        arrays = {name: array.astype(np.float64) for name, array in task.state.items()}
        for step in range(steps):
            share = rates.share(task.recipe.rounds, task.round, steps, step)
            rate = own.learning_rate * rates.factor(own, share)
            for name, array in arrays.items():
                added = task.correction[name] if task.correction is not None else 0.0
                arrays[name] = array - rate * (self.curvature * (array - self.optimum) + added)
        after = state.AdapterState({name: array.astype(np.float32) for name, array in arrays.items()})
        update = state.SiteUpdate(
            self.name, after, self.examples, task.round - 1, task.state.fingerprint, metrics={"loss": 1.0}
        )
        reply = self.change("train", task.round, update)
        return reply if isinstance(reply, RecordDict) else protocol.encode_update(reply)


def hospitals(**more: Any) -> list[Quadratic]:
    """Unlike optima, curvatures and numbers of steps; the best adapter for all is 3 everywhere."""
    return [
        Quadratic("north", 20, curvature=1.0, optimum=8.0, **more),
        Quadratic("south", 8, curvature=3.0, optimum=2.0),
        Quadratic("west", 12, curvature=2.0, optimum=2.0),
    ]


def final(folder: Path) -> state.AdapterState:
    return checkpoint.read(folder / "adapter.safetensors")[0]


def away(folder: Path) -> float:
    """The largest distance of a number from the best one."""
    return max(float(np.abs(array - 3.0).max()) for array in final(folder).values())


def test_unlike_sites_meet_where_the_sum_of_their_losses_is_least(tmp_path: Path) -> None:
    sites = hospitals()
    plain = numpy_sites.run(numpy_sites.make_job(tmp_path / "plain", sites, recipe(corrected=False)), sites)
    folder = numpy_sites.run(numpy_sites.make_job(tmp_path / "corrected", sites, recipe()), sites)
    assert away(folder) < 1e-4
    assert away(plain) > 0.2, "many local steps alone end elsewhere, however many rounds there are"
    _, kept, _ = checkpoint.read(checkpoint.path_of(folder / "checkpoints", 30))
    mean = np.mean([kept[f"control/{site.name}/head.bias"] for site in sites], axis=0)
    assert np.abs(mean).max() < 1e-4
    assert kept["control/south/head.bias"] == pytest.approx(3.0, abs=1e-3), "its own gradient at 3 is 3 (3 - 2)"


def test_killed_after_a_round_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    sites, chosen = hospitals(), recipe(rounds=4, optimiser={"schedule": "cosine", "head_learning_rate": 0.2})
    whole = numpy_sites.run(numpy_sites.make_job(tmp_path / "whole", sites, chosen), sites)
    job = numpy_sites.make_job(tmp_path / "killed", sites, chosen, durable=True)
    numpy_sites.run(job, sites, stop=numpy_sites.after(2))
    assert final(numpy_sites.run(job, sites)) == final(whole)


def test_sites_that_are_not_drawn_or_refused_leave_no_offset(tmp_path: Path) -> None:
    def sick(kind: str, number: int, reply: Any) -> Any:
        if kind == "train" and number in (2, 3, 7):
            raise errors.TrainingError("no answer in this round")
        return reply

    sites = hospitals(change=sick)
    server = schema.ServerConfig(cohort=2, quorum=1)
    job = numpy_sites.make_job(tmp_path / "some", sites, recipe(rounds=250), server=server)
    assert away(numpy_sites.run(job, sites)) < 1e-3


def test_a_site_that_is_there_no_more_is_in_the_mean_no_more() -> None:
    chosen, manifest = recipe(), numpy_sites.manifest()
    kept = {f"control/{site}/head.bias": np.full(2, value, np.float32) for site, value in (("a", 1.0), ("b", 7.0))}
    own = controls.Controls(chosen, manifest, ["c", "a"])
    own.begin(5, kept)
    assert own.correction("a")["head.bias"].tolist() == [-0.5, -0.5], "of a and c, which begins at zero"
    assert set(own.correction("c")) == set(groups.leaving(manifest, chosen, 5))
    assert not any("/b/" in name for name in own.kept())


def test_a_site_that_says_it_took_fewer_steps_is_refused(tmp_path: Path) -> None:
    def few(kind: str, number: int, reply: Any) -> Any:
        return dataclasses.replace(reply, num_examples=1) if kind == "train" else reply

    sites = hospitals(change=few)
    job = numpy_sites.make_job(tmp_path / "few", sites, recipe(rounds=1), server=schema.ServerConfig(quorum=2))
    lines = hash_chain.read(numpy_sites.run(job, sites) / "journal.jsonl")
    assert lines[-1]["refused"]["north"]["reason"] == "examples"


def test_no_control_variate_is_longer_than_a_clipped_gradient() -> None:
    manifest, rows = numpy_sites.manifest(), {"clip_norm": 1.0, "weight_decay": 0.0}
    for factor, length in ((0.5, 0.5), (50.0, 1.0)):
        chosen = recipe(optimiser=rows)
        own, start = controls.Controls(chosen, manifest, ["a", "b"]), numpy_sites.draw(manifest, 1)
        own.begin(1, {})
        lengths = control_variates.lengths(manifest, chosen, 1, 4)
        gradient = {
            name: np.full(start[name].shape, factor / math.sqrt(start.parameters), np.float32) for name in start
        }
        after = state.AdapterState({name: start[name] - np.float32(lengths[name]) * gradient[name] for name in start})
        own.take(state.SiteUpdate("a", after, 4, 0, start.fingerprint), start)
        kept = state.AdapterState({name: array for name, array in own.kept().items() if "/a/" in name})
        assert kept.norm() == pytest.approx(length, rel=1e-4)


def test_what_is_sent_in_the_first_round_is_zero_and_travels_whole() -> None:
    chosen, manifest = recipe(), numpy_sites.manifest()
    correction = control_variates.first(manifest, chosen, 1)
    task = protocol.Task(chosen, 1, numpy_sites.draw(manifest, 1), correction=correction)
    back = protocol.decode_task(protocol.encode_task(task))
    assert back == task
    assert back.correction is not None
    assert back.correction.norm() == 0.0
    assert control_variates.first(manifest, recipe(corrected=False), 1) is None


@pytest.mark.parametrize(
    "other",
    [
        {"optimiser": {"name": "adamw"}},
        {"optimiser": {"proximal": 0.1}},
        {"optimiser": {"round_minutes": 5.0}},
        {"aggregation": {"rule": "median"}},
        {"aggregation": {"weighting": "examples"}},
        {"adapter": {"rank": 3, "alpha": 6.0, "factors": "alternate"}},
        {"codec": "int8"},
        {"privacy": {"mechanism": "site-level", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}},
        {"secure_aggregation": {}, "min_sites": 3},
    ],
)
def test_where_an_update_is_no_sum_of_gradients_it_is_refused(other: dict[str, Any]) -> None:
    assert rules.faults(recipe()) == []
    told = [fault for fault in rules.faults(recipe(**other)) if "control_variates" in fault]
    assert len(told) == 1
    assert rules.faults(recipe(corrected=False, **other)) == [
        fault for fault in rules.faults(recipe(**other)) if fault not in told
    ]


def test_a_correction_of_another_form_is_refused() -> None:
    manifest = numpy_sites.manifest()
    whole = control_variates.nothing(manifest, recipe(), 1)
    less = whole.select([name for name in whole if name != "head.bias"])
    wrong = state.AdapterState({**whole, "head.bias": np.full(2, np.nan, np.float32)})
    control_variates.require(whole, manifest, recipe(), 1)
    for correction, chosen in ((None, recipe()), (whole, recipe(False)), (less, recipe()), (wrong, recipe())):
        with pytest.raises(errors.ProtocolError, match="round 1"):
            control_variates.require(correction, manifest, chosen, 1)
