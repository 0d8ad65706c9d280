"""Secure aggregation in the round loop of a simulation: the sums are those of masked numbers, to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.secure_aggregation import fixed_point, opening, participant, round_keys
from fedvfm.secure_aggregation import session as sessions
from fedvfm.server.rounds import secure_sum
from fedvfm.simulation.engines import in_process
from fedvfm.state import checkpoint, factors, state
from fedvfm.storage import hash_chain

NAMES = ("east", "north", "west")
COUNTS = {"east": 10, "north": 20, "west": 70}


def run(sites: Any, folder: Path, members: list[Any], recipe: Any, **more: Any) -> Path:
    job = sites.make_job(folder, members, recipe, simulated=True, **more)
    grid = in_process.InProcessGrid(sites.client_app(members), len(members))
    found: Path = sites.run(job, members, grid=grid)
    return found


def three(sites: Any, kept: dict[tuple[int, str], state.SiteUpdate] | None = None) -> list[Any]:
    def change(kind: str, number: int, reply: Any) -> Any:
        if kind == "train" and kept is not None:
            kept[number, reply.site] = reply
        if kind == "hello":  # as a real site greets: with whether it has images to train on, not with how many
            return dataclasses.replace(reply, examples={**reply.examples, "train": 1})
        return reply

    return [sites.NumpySite(name, examples=COUNTS[name], change=change) for name in NAMES]


def secure(sites: Any, **values: Any) -> Any:
    return sites.make_recipe(min_sites=3, secure_aggregation={"clip_norm": 50.0}, **values)


@pytest.mark.parametrize("way", ["both", "freeze-A", "alternate"])
def test_the_adapter_is_the_one_that_comes_of_masked_numbers(sites: Any, tmp_path: Path, way: str) -> None:
    kept: dict[tuple[int, str], state.SiteUpdate] = {}
    recipe = secure(sites, rounds=2, adapter={"rank": 3, "alpha": 6.0, "factors": way})
    folder = run(sites, tmp_path / "run", three(sites, kept), recipe)
    locked = sites.lock(recipe)
    adapter, point = locked.adapter, fixed_point.of(recipe)
    for number in (1, 2):
        names = factors.trained(locked.manifest, way, number)
        rows = {
            name: point.encode(kept[number, name].state, adapter, names, COUNTS[name], 1.0 / number) for name in NAMES
        }
        total = _masked(rows, recipe.hash, number, adapter.fingerprint)
        adapter = point.decode(total, adapter, names, 3).state
    assert checkpoint.read(folder / "adapter.safetensors")[0].fingerprint == adapter.fingerprint


def _masked(rows: dict[str, Any], recipe: str, number: int, base: str) -> Any:
    """The sum of these numbers by the whole protocol; west drops out and comes back in no way."""
    names = [*rows, "zone"]  # a fourth site deals shares and sends nothing
    secrets = {name: round_keys.fresh() for name in names}
    members = tuple(round_keys.advertise(secrets[name], name, recipe, lambda _: "") for name in sorted(names))
    session = sessions.Session(recipe, number, base, "c" * 64, 3, members)
    dealt = {name: participant.deal(session, name, secrets[name]) for name in names}
    total, answers = np.zeros(len(rows["east"]), np.uint64), {}
    for name in rows:
        inbox = {peer: dealt[peer].outbox[name] for peer in names if peer != name}
        held = participant.received(session, name, secrets[name], dealt[name], inbox)
        total += participant.masked(session, name, secrets[name], dealt[name], names, rows[name], 3)
        answers[name] = participant.revealed(session, name, held, list(rows), 3)
    seals = {name: own.commitment for name, own in dealt.items()}
    return opening.opened(session, names, list(rows), total, answers, seals)


def test_the_journal_says_nothing_of_a_single_site(sites: Any, tmp_path: Path) -> None:
    folder = run(sites, tmp_path / "run", three(sites), secure(sites))
    for line in hash_chain.read(folder / "journal.jsonl"):
        assert line["examples"] == dict.fromkeys(NAMES)
        assert "norms" not in line
        assert (line["weights"], line["train"]) == ({}, {})
        told = line[secure_sum.ENTRY]
        assert (told["sites"], told["weight"]) == (3, 100)
        assert told["loss"] == pytest.approx(1 / line["round"], abs=1e-5)


def test_it_is_near_the_plain_mean_where_nothing_is_clipped(sites: Any, tmp_path: Path) -> None:
    hidden = run(sites, tmp_path / "hidden", three(sites), secure(sites))
    members = [sites.NumpySite(name, examples=COUNTS[name]) for name in NAMES]
    plain = run(sites, tmp_path / "plain", members, sites.make_recipe(min_sites=3))
    found, other = (checkpoint.read(folder / "adapter.safetensors")[0] for folder in (hidden, plain))
    for name in found:
        np.testing.assert_allclose(found[name], other[name], rtol=1e-5, atol=1e-6)


def test_of_too_few_sites_nothing_is_opened(sites: Any, tmp_path: Path) -> None:
    few = schema.ServerConfig(quorum=2)
    with pytest.raises(errors.ConfigError) as caught:
        run(sites, tmp_path / "run", three(sites), secure(sites, rounds=1), server=few)
    assert "min_sites = 3" in caught.value.faults[0]
    recipe = secure(sites)
    locked = sites.lock(recipe)
    intake = secure_sum.PlainSum(recipe, locked.adapter, locked.manifest, 1)
    for name in ("east", "north"):
        intake.take(state.SiteUpdate(name, locked.adapter, 5, 0, locked.adapter.fingerprint))
    with pytest.raises(errors.QuorumMissed):
        intake.finish({})


def test_a_deployment_without_a_roster_document_asks_for_nothing(sites: Any, tmp_path: Path) -> None:
    members = three(sites)
    job = sites.make_job(tmp_path / "run", members, secure(sites))
    with pytest.raises(errors.ConfigError) as caught:
        sites.run(job, members, grid=in_process.InProcessGrid(sites.client_app(members), 3))
    assert "secure_aggregation" in caught.value.faults[0]
    assert not any(kind == "train" for member in members for kind, _ in member.asked)
