"""Federations in which one factor trains at a time: exact means, nothing idle moves, and only what trained travels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.state import checkpoint, state
from fedvfm.storage import hash_chain, storage

PAIR, A, B = "block.00.q", "block.00.q.A", "block.00.q.B"
IDLE = {"freeze-A": (A, A, A, A, A), "alternate": (A, B, A, B, A)}
"""By way and round: what does not train."""
ways = pytest.mark.parametrize("way", sorted(IDLE))


class Country:
    """Three sites of different size.

    Attributes:
        given: round -> the adapter that all sites started from.
        sent: round -> the updates as they left, by site.
    """

    def __init__(self, sites: Any, root: Path) -> None:
        self.sites, self.root = sites, root
        self.given: dict[int, state.AdapterState] = {}
        self.sent: dict[int, dict[str, state.SiteUpdate]] = {}

    def run(
        self, folder: str, way: str, stop_after: int = 0, durable: bool = False, change: Any = None, **recipe: Any
    ) -> Path:
        """Run or resume."""
        country, members = self, []

        class Site(self.sites.NumpySite):  # type: ignore[misc, name-defined]
            """One that notes what came and what left."""

            def train(self, task: protocol.Task) -> Any:
                country.given.setdefault(task.round, task.state)  # type: ignore[arg-type]
                assert country.given[task.round] == task.state
                return super().train(task)

        def keep(kind: str, number: int, reply: Any) -> Any:
            if kind != "train":
                return reply
            country.sent.setdefault(number, {})[reply.site] = reply
            return reply if change is None else change(reply, country.given[number])

        for name, examples in (("east", 10), ("north", 20), ("west", 70)):
            members.append(Site(name, examples=examples, change=keep))
        values = {"rounds": 5, "adapter": {"rank": 3, "alpha": 6.0, "factors": way}, **recipe}
        server = schema.ServerConfig(quorum=2)
        job = self.sites.make_job(
            self.root / folder, members, self.sites.make_recipe(**values), durable=durable, server=server
        )
        found: Path = self.sites.run(job, members, stop=self.sites.after(stop_after))
        return found


@pytest.fixture
def country(sites: Any, tmp_path: Path) -> Country:
    return Country(sites, tmp_path)


def rounds(folder: Path) -> list[dict[str, Any]]:
    return hash_chain.read(folder / "journal.jsonl")


def final(folder: Path) -> state.AdapterState:
    return checkpoint.read(folder / "adapter.safetensors")[0]


def product(adapter: state.AdapterState) -> np.ndarray[Any, Any]:
    return adapter[B].astype(np.float64) @ adapter[A].astype(np.float64)


@ways
def test_the_mean_is_exact_in_every_round_and_what_is_idle_does_not_move(country: Country, way: str) -> None:
    folder = country.run("run", way)
    adapters = {**country.given, 6: final(folder)}
    assert [line["factor_error"] for line in rounds(folder)] == [0.0] * 5
    for number, idle in enumerate(IDLE[way], 1):
        before, after = adapters[number], adapters[number + 1]
        updates = country.sent[number]
        assert {name for one in updates.values() for name in one.state} == set(before) - {idle}
        assert before[idle].tobytes() == after[idle].tobytes()
        assert all(not np.array_equal(before[name], after[name]) for name in set(before) - {idle})
        whole = [product(state.AdapterState({**before, **updates[name].state})) for name in ("east", "north", "west")]
        np.testing.assert_allclose(product(after), np.average(whole, axis=0, weights=[10, 20, 70]), rtol=1e-5)


def test_both_factors_at_once_are_not_exact_and_cost_more(country: Country, sites: Any, tmp_path: Path) -> None:
    both = country.run("both", "both")
    assert all(line["factor_error"] > 1e-3 for line in rounds(both))
    halves = {way: Country(sites, tmp_path / way).run("run", way) for way in IDLE}
    numbers = {A: 3 * 7, B: 5 * 3}
    for way, folder in halves.items():
        for mine, theirs, idle in zip(rounds(folder)[1:], rounds(both)[1:], IDLE[way][1:], strict=True):
            assert theirs["bytes"]["up"] - mine["bytes"]["up"] >= 3 * 4 * numbers[idle]
            # The recipe of the one has a longer word in it.
            assert abs(theirs["bytes"]["down"] - mine["bytes"]["down"]) < 200


@ways
@pytest.mark.parametrize("after", [1, 2, 3, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_a_stop_between_two_factors_changes_nothing(
    country: Country, sites: Any, tmp_path: Path, way: str, after: int, momentum: float
) -> None:
    moving = {"aggregation": {"server_momentum": momentum, "server_learning_rate": 0.5 if momentum else 1.0}}
    whole = country.run("whole", way, **moving)
    other = Country(sites, tmp_path / "other")
    other.run("run", way, stop_after=after, **moving)
    stopped = other.run("run", way, **moving)
    assert [line["fingerprint"] for line in rounds(stopped)] == [line["fingerprint"] for line in rounds(whole)]
    assert final(stopped) == final(whole)


def test_momentum_of_a_factor_waits_for_its_turn(country: Country) -> None:
    """By hand: A moves in rounds 2 and 4 alone, with the speed that it had in round 2."""
    folder = country.run("run", "alternate", aggregation={"server_momentum": 0.5})
    adapters = {**country.given, 6: final(folder)}

    def mean(number: int) -> np.ndarray[Any, Any]:
        found = [country.sent[number][name].state[A] for name in ("east", "north", "west")]
        return np.average(np.asarray(found, dtype=np.float64), axis=0, weights=[10, 20, 70])

    second = mean(2) - adapters[2][A]
    fourth = 0.5 * second + mean(4) - adapters[4][A]
    np.testing.assert_allclose(adapters[3][A], adapters[2][A] + second, rtol=1e-4, atol=1e-5)
    assert adapters[3][A].tobytes() == adapters[4][A].tobytes(), "round 3 is B's"
    np.testing.assert_allclose(adapters[5][A], adapters[4][A] + fourth, rtol=1e-4, atol=1e-5)
    assert adapters[5][A].tobytes() == adapters[6][A].tobytes()


@ways
def test_a_site_that_moves_what_is_idle_is_refused(country: Country, way: str) -> None:
    def meddle(reply: state.SiteUpdate, base: state.AdapterState) -> Any:
        if reply.site != "west":
            return reply
        whole = state.AdapterState({**{name: array + np.float32(1) for name, array in base.items()}, **reply.state})
        return state.SiteUpdate("west", whole, reply.num_examples, reply.base_round, reply.base_fingerprint)

    folder = country.run("run", way, change=meddle, rounds=2)
    assert [line["refused"]["west"] for line in rounds(folder)] == [
        {"reason": "manifest", "detail": "0 arrays missing, 0 not in the manifest, 1 that must not leave in this round"}
    ] * 2


@ways
def test_an_update_that_was_kept_counts_after_a_crash(
    country: Country, sites: Any, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies in round 2 with one update on disk; that site is not asked again and the end is the same."""
    whole = country.run("whole", way, durable=True, rounds=3)
    dying = Country(sites, tmp_path / "dying")
    points: list[str] = []

    def die(name: str) -> None:
        points.append(name)
        if name == "update-kept" and points.count(name) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "fault_point", die)
    dying.run("run", way, durable=True, rounds=3, stop_after=99)
    monkeypatch.undo()
    assert len(rounds(tmp_path / "dying" / "run")) == 1
    dying.sent.clear()
    made = dying.run("run", way, durable=True, rounds=3)
    assert len(dying.sent[2]) == 2
    assert final(made) == final(whole)


def test_a_rule_that_makes_new_factors_is_refused_before_anybody_is_asked(country: Country) -> None:
    with pytest.raises(errors.ConfigError, match=r"factors = 'freeze-A': rule 'svd' makes both factors"):
        country.run("run", "freeze-A", aggregation={"rule": "svd"})
    assert not country.given


def test_the_recipe_of_an_earlier_release_is_named_as_before(sites: Any) -> None:
    made = sites.make_recipe()
    values = json.loads(made.model_dump_json())
    del values["adapter"]["factors"]
    earlier = type(made).model_validate(values)
    assert earlier.hash == made.hash == sites.make_recipe(adapter={"rank": 3, "alpha": 6.0, "factors": "both"}).hash
    internals.be_server_task(1)
    found = protocol.decode_task(protocol.encode_task(protocol.Task(made, 1, sites.draw(sites.manifest(), 0))))
    assert found.recipe.adapter.factors == "both"
