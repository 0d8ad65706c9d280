"""The round loop on a real Flower Grid, with sites that answer with arithmetic."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.server.rounds import federation
from fedvfm.simulation.engines import in_process
from fedvfm.state import checkpoint, state
from fedvfm.storage import hash_chain


class Harness:
    """Builds sites, jobs and grids; keeps the events of the last run."""

    def __init__(self, sites: Any, folder: Path) -> None:
        self.sites, self.folder = sites, folder
        self.events: list[tuple[str, dict[str, Any]]] = []

    def site(self, name: str, **more: Any) -> Any:
        return self.sites.NumpySite(name, **more)

    def three(self, **more: Any) -> list[Any]:
        return [self.site(name, examples=count, **more) for name, count in (("east", 10), ("north", 20), ("west", 70))]

    def run(self, members: list[Any], folder: str = "run", stop_after: int = 0, grid: Any = None, **more: Any) -> Path:
        """Run or resume; with ``stop_after`` the watcher raises as that round ends."""
        recipe = self.sites.make_recipe(**more.pop("recipe", {}))
        job = self.sites.make_job(self.folder / folder, members, recipe, **more)
        chosen = grid or in_process.InProcessGrid(self.sites.client_app(members), len(members))
        note, stop = lambda *event: self.events.append(event), self.sites.after(stop_after)
        found: Path = self.sites.run(job, members, stop=stop, note=note, grid=chosen)
        return found


@pytest.fixture
def harness(sites: Any, tmp_path: Path) -> Harness:
    return Harness(sites, tmp_path)


def journal(folder: Path) -> list[dict[str, Any]]:
    return hash_chain.read(folder / "journal.jsonl")


def evaluation(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


def lasting(folder: Path) -> list[dict[str, Any]]:
    """Journal lines without what time and the handshake of a resume change."""
    changing = ("seconds", "ended", "bytes", "peak_mib", "prev", "hash")
    return [{key: value for key, value in line.items() if key not in changing} for line in journal(folder)]


# -- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_journal_checkpoints_and_evaluation(harness: Harness) -> None:
    folder = harness.run(harness.three(), per_sample=True)
    lines = journal(folder)
    assert [line["round"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["cohort"] == ["east", "north", "west"]
        assert line["refused"] == {}
        assert line["examples"] == {"east": 10, "north": 20, "west": 70}
        assert line["train"]["east"]["loss"] == pytest.approx(1 / line["round"])
        assert set(line["validation"]) == {"east", "north", "west"}
        assert line["factor_error"] > 0
        assert line["aggregate_error"] is None
        assert line["peak_mib"] > 10
        assert line["bytes"]["up"] > 0 < line["bytes"]["down"]
    adapter, _, marks = checkpoint.read(folder / "checkpoints" / "round-00003.safetensors")
    assert adapter.fingerprint == lines[-1]["fingerprint"]
    assert marks["round"] == "3"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "round-00002.safetensors",
        "round-00003.safetensors",
    ]
    found = evaluation(folder)
    assert found["fingerprint"] == adapter.fingerprint == checkpoint.read(folder / "adapter.safetensors")[0].fingerprint
    assert found["last"]["sites"]["west"] == {
        "num_examples": 2,
        "dice": pytest.approx(float(1 / (1 + np.abs(adapter["head.bias"]).sum()))),
    }
    assert found["last"]["samples"]["west"]["id"] == ["a", "b"]


def test_one_round_is_the_weighted_mean_of_what_the_sites_sent(harness: Harness) -> None:
    sent: dict[str, state.SiteUpdate] = {}

    def keep(kind: str, number: int, reply: Any) -> Any:
        if kind == "train":
            sent[reply.site] = reply
        return reply

    for weighting, weights in (("examples", [10, 20, 70]), ("uniform", [1, 1, 1])):
        folder = harness.run(
            harness.three(change=keep), weighting, recipe={"rounds": 1, "aggregation": {"weighting": weighting}}
        )
        adapter = checkpoint.read(folder / "adapter.safetensors")[0]
        for name, array in adapter.items():
            mean = np.average([sent[site].state[name] for site in ("east", "north", "west")], axis=0, weights=weights)
            np.testing.assert_allclose(array, mean, rtol=1e-5)


def test_equal_runs_are_equal_and_seeds_differ(harness: Harness) -> None:
    one, two = (harness.run(harness.three(), name) for name in ("one", "two"))
    other = harness.run(harness.three(), "other", recipe={"seed": 1})
    assert lasting(one) == lasting(two)
    assert evaluation(one)["fingerprint"] == evaluation(two)["fingerprint"] != evaluation(other)["fingerprint"]


def test_the_order_of_nodes_does_not_matter(harness: Harness) -> None:
    one = harness.run(harness.three(), "one")
    two = harness.run(harness.three()[::-1], "two")
    assert lasting(one) == lasting(two)


@pytest.mark.parametrize(("every", "rounds"), [(0, []), (2, [2, 3]), (1, [1, 2, 3])])
def test_how_often_sites_validate(harness: Harness, every: int, rounds: list[int]) -> None:
    folder = harness.run(harness.three(), recipe={"evaluation": {"every": every}})
    assert [line["round"] for line in journal(folder) if line["validation"]] == rounds


def test_a_site_without_validation_samples_is_not_asked(harness: Harness) -> None:
    folder = harness.run([harness.site("east"), harness.site("west", val=0)])
    assert set(journal(folder)[0]["validation"]) == {"east"}


def test_the_best_validation_round_is_tested_too(harness: Harness) -> None:
    def scores(kind: str, number: int, reply: Any) -> Any:
        return (
            dataclasses.replace(reply, metrics={"dice": {1: 0.2, 2: 0.9}.get(number, 0.5)})
            if kind == "evaluate val"
            else reply
        )

    folder = harness.run(harness.three(change=scores), test_best=True)
    best = evaluation(folder)["best"]
    assert best["round"] == 2
    assert best["fingerprint"] == journal(folder)[1]["fingerprint"]
    assert set(best["sites"]) == {"east", "north", "west"}


def test_test_sites_need_not_train(harness: Harness) -> None:
    members = harness.three()
    folder = harness.run(members, train_sites=("east",), test_sites=("north", "west"))
    assert journal(folder)[0]["cohort"] == ["east"]
    assert set(evaluation(folder)["last"]["sites"]) == {"north", "west"}
    assert ("train", 1) not in members[1].asked


def test_bytes_are_those_of_all_messages(harness: Harness) -> None:
    app = harness.sites.client_app(harness.three())

    class Counting(in_process.InProcessGrid):
        def __init__(self) -> None:
            super().__init__(app, 3)
            self.down = self.up = 0

        def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
            kept = list(messages)
            self.down += sum(len(internals.serialise(message)) for message in kept)
            return super().push_messages(kept)

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
            replies = list(super().pull_messages(message_ids))
            self.up += sum(len(internals.serialise(message)) for message in replies)
            return replies

    grid = Counting()
    folder = harness.run(harness.three(), grid=grid)
    rows = [line["bytes"] for line in journal(folder)] + [evaluation(folder)["bytes"]]
    assert sum(row["up"] for row in rows) == pytest.approx(grid.up, rel=1e-3)
    assert sum(row["down"] for row in rows) == pytest.approx(grid.down, rel=1e-3)


# -- handshake -------------------------------------------------------------------------------------------------------


def refused(harness: Harness, members: list[Any], match: str, **more: Any) -> None:
    with pytest.raises(errors.HandshakeRefused, match=match):
        harness.run(members, **more)
    assert not (harness.folder / "run" / "journal.jsonl").exists()
    assert not any(kind == "train" for member in members for kind, _ in member.asked)


def test_sites_must_agree_on_settings_that_the_lock_does_not_know(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.sites, "SETTINGS", "")
    members = [harness.site("east"), harness.site("west", config_sha256="cd" * 32)]
    refused(harness, members, "sites east and west hold the backbone with different settings .config.json")


def test_handshake_refusals(harness: Harness) -> None:
    east = harness.site("east")
    refused(
        harness,
        [east, harness.site("west", sha256="cd" * 32)],
        "site 'west' holds backbone cdcdcdcdcdcd.*Fetch the same weights",
    )
    refused(
        harness,
        [east, harness.site("west", config_sha256="cd" * 32)],
        "site 'west' holds the same backbone with other settings .config.json cdcdcdcdcdcd.*config.json again",
    )
    refused(
        harness,
        [east, harness.site("west", fingerprint="0" * 64)],
        "site 'west' builds another adapter.*same fedvfm at both ends",
    )
    refused(harness, [east, harness.site("east")], "two nodes call themselves site 'east'")
    refused(harness, [east], "sites not connected: south, west", train_sites=("east", "west"), test_sites=("south",))
    refused(harness, [east, harness.site("west", rank=2)], "Use rule 'svd' for mixed ranks")

    def fail(kind: str, number: int, reply: Any) -> Any:
        raise errors.WeightsError("/data/patients")

    failing = harness.site("west", change=fail)
    refused(harness, [east, failing], r"^sites not connected: west; node 101 refused the handshake: weights$")


@pytest.mark.parametrize("how", ["error", "nonsense", "another backbone"])
def test_a_node_that_is_not_wanted_may_answer_as_it_likes(harness: Harness, how: str) -> None:
    def change(kind: str, number: int, reply: Any) -> Any:
        if how == "error":
            raise errors.WeightsError("/data/patients")
        return dataclasses.replace(reply, rank=0) if how == "nonsense" else reply

    guest = harness.site("guest", change=change, sha256="cd" * 32)
    members = [harness.site("east"), guest, harness.site("west")]
    folder = harness.run(members, train_sites=("east", "west"), test_sites=("east", "west"))
    assert evaluation(folder)["round"] == 3
    assert [kind for kind, _ in guest.asked] == ["hello"]
    told = [fields["text"] for event, fields in harness.events if event == "note"]
    assert len(told) == (how != "another backbone")
    assert all(text.startswith("node 101 ") and "no site of 'federated' is missing" in text for text in told)
    assert "patients" not in "".join(told)


@pytest.mark.parametrize(
    ("server", "fault"),
    [
        ({"cohort": 3}, r"server\.cohort = 3: 2 sites can train; give at most 2"),
        ({"quorum": 3}, r"server\.quorum = 3: 2 sites can train; give at most 2"),
    ],
)
def test_cohort_and_quorum_that_cannot_be(harness: Harness, server: dict[str, int], fault: str) -> None:
    members = [harness.site("east"), harness.site("west")]
    with pytest.raises(errors.ConfigError, match=fault):
        harness.run(members, server=schema.ServerConfig(**server))
    assert not members[0].asked


@pytest.mark.parametrize("rank", [0, -2, 10**7])
def test_a_rank_that_cannot_be(harness: Harness, rank: int) -> None:
    west = harness.site(
        "west", fingerprint="0" * 64, change=lambda kind, number, reply: dataclasses.replace(reply, rank=rank)
    )
    with pytest.raises(errors.ProtocolError):
        harness.run([harness.site("east"), west])


# -- cohort, quorum, admission ---------------------------------------------------------------------------------------


def test_a_cohort_is_a_seeded_sample(harness: Harness) -> None:
    members = [harness.site(name) for name in ("a", "bb", "ccc", "dddd")]
    server = schema.ServerConfig(cohort=2)
    folder = harness.run(members, recipe={"rounds": 8}, server=server)
    cohorts = [line["cohort"] for line in journal(folder)]
    assert all(len(set(cohort)) == 2 and cohort == sorted(cohort) for cohort in cohorts)
    assert len({tuple(cohort) for cohort in cohorts}) > 2
    for member in members:
        assert [n for kind, n in member.asked if kind == "train"] == [
            n for n, cohort in enumerate(cohorts, 1) if member.name in cohort
        ]
    again = harness.run(
        [harness.site(name) for name in ("a", "bb", "ccc", "dddd")], "again", recipe={"rounds": 8}, server=server
    )
    assert [line["cohort"] for line in journal(again)] == cohorts


def test_an_erring_site_is_named_and_the_round_goes_on(harness: Harness) -> None:
    def fail(kind: str, number: int, reply: Any) -> Any:
        if kind == "train" and number == 2:
            raise errors.DataError("/data/patients/Jane Doe.dcm")
        return reply

    members = [harness.site("east"), harness.site("north"), harness.site("west", change=fail)]
    folder = harness.run(members, server=schema.ServerConfig(quorum=2))
    lines = journal(folder)
    assert [line["refused"] for line in lines] == [
        {},
        {"west": {"reason": "site-data", "detail": "the site answered with an error"}},
        {},
    ]
    assert [sorted(line["examples"]) for line in lines] == [
        ["east", "north", "west"],
        ["east", "north"],
        ["east", "north", "west"],
    ]
    assert b"Jane" not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_missed_quorum_stops_before_anything_is_written(harness: Harness) -> None:
    def fail(kind: str, number: int, reply: Any) -> Any:
        if kind == "train" and number == 2:
            raise ValueError("surprise")
        return reply

    members = [harness.site("east"), harness.site("west", change=fail)]
    with pytest.raises(
        errors.QuorumMissed, match=r"round 2: 1 of 2 sites were admitted, the quorum is 2 \(west: site-error\)"
    ):
        harness.run(members)
    folder = harness.folder / "run"
    assert [line["round"] for line in journal(folder)] == [1]
    whole = harness.run([harness.site("east"), harness.site("west")], "whole")
    harness.run([harness.site("east"), harness.site("west")])
    assert evaluation(folder)["fingerprint"] == evaluation(whole)["fingerprint"]


def changed(**fields: Any) -> Callable[[Any], Any]:
    return lambda update: dataclasses.replace(update, **fields)


def with_array(value: float) -> Callable[[Any], Any]:
    return lambda update: dataclasses.replace(
        update, state=state.AdapterState({**update.state, "head.bias": np.full(2, value, np.float32)})
    )


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("site-name", changed(site="north")),
        ("stale", changed(base_round=7)),
        ("base", changed(base_fingerprint="0" * 64)),
        ("examples", changed(num_examples=10**9)),
        ("examples", changed(num_examples=-1)),
        ("manifest", lambda update: dataclasses.replace(update, state=update.state.select(["head.bias"]))),
        ("not-finite", with_array(float("nan"))),
        ("norm", with_array(1e9)),
        ("protocol", changed(metrics={"loss": float("nan")})),
        ("protocol", lambda update: _without(update, "metrics")),
        ("protocol", lambda update: _without(update, "fedvfm")),
        ("protocol", lambda update: _without(update, "adapter")),
    ],
)
def test_a_bad_update_is_refused_by_name_and_the_round_goes_on(
    harness: Harness, reason: str, change: Callable[[Any], Any]
) -> None:
    west = harness.site("west", change=lambda kind, number, reply: change(reply) if kind == "train" else reply)
    folder = harness.run([harness.site("east"), west], server=schema.ServerConfig(quorum=1), recipe={"rounds": 1})
    (line,) = journal(folder)
    assert line["refused"]["west"]["reason"] == reason
    assert set(line["examples"]) == {"east"}
    alone = harness.run([harness.site("east")], "alone", recipe={"rounds": 1})
    assert line["fingerprint"] == journal(alone)[0]["fingerprint"], (
        "nothing of a refused update may touch the aggregate"
    )


def _without(update: Any, record: str) -> Any:
    from fedvfm.protocol import protocol

    content = protocol.encode_update(update)
    del content[record]
    return content


class Deaf(in_process.InProcessGrid):
    """Loses the train messages of the second node, from a round on."""

    since = 1

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        kept = list(messages)
        ids = list(super().push_messages(kept))
        for message in kept:
            about = message.metadata
            late = int(about.group_id) >= self.since
            if late and about.message_type == "train" and about.dst_node_id == in_process.FIRST_NODE + 1:
                del self._waiting[about.message_id]
        return ids


def test_a_site_that_does_not_answer_in_time(harness: Harness) -> None:
    members = [harness.site("east"), harness.site("west")]
    grid = Deaf(harness.sites.client_app(members), 2)
    folder = harness.run(
        members, grid=grid, server=schema.ServerConfig(quorum=1, round_timeout_s=0.3), recipe={"rounds": 1}
    )
    assert journal(folder)[0]["refused"] == {"west": {"reason": "no-answer", "detail": "no reply within 0.3 s"}}


def test_after_a_quorum_a_round_waits_for_the_stated_grace_and_no_longer(harness: Harness) -> None:
    members = [harness.site("east"), harness.site("west")]
    server = schema.ServerConfig(quorum=1, round_timeout_s=1000.0, grace_s=0.25)
    grid = Deaf(harness.sites.client_app(members), 2)
    (line,) = journal(harness.run(members, grid=grid, server=server, recipe={"rounds": 1}))
    assert line["refused"]["west"]["reason"] == "no-answer"
    assert 0.25 <= line["seconds"] < 100.0
    patient = server.model_copy(update={"grace_s": 500.0})
    whole = journal(harness.run(members, "whole", server=patient, recipe={"rounds": 1}))
    assert [row["refused"] for row in whole] == [{}], "who answers within it is taken"


def test_a_deadline_follows_the_pace_that_was_measured(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "LEAST_S", 0.3)
    members = [harness.site("east"), harness.site("west")]
    server = schema.ServerConfig(quorum=1, round_timeout_s=1000.0, patience=1.5)
    grid = Deaf(harness.sites.client_app(members), 2)
    grid.since = 2
    first, second = journal(harness.run(members, grid=grid, server=server, recipe={"rounds": 2}))
    assert set(first["answered"]) == {"east", "west"}
    assert first["refused"] == {}
    assert second["refused"]["west"]["reason"] == "no-answer"
    assert second["seconds"] < 100.0


def test_a_round_that_is_asked_for_again_measures_no_pace(harness: Harness) -> None:
    """What is on disk, or a site kept, comes at once: by that the next round would never wait for a slow site again."""
    broken = True

    def slow(kind: str, number: int, reply: Any) -> Any:
        time.sleep(0.5 * (kind == "train"))
        return reply

    def once(kind: str, number: int, reply: Any) -> Any:
        if kind == "train" and broken:
            raise errors.DataError("gone")
        return reply

    members = [harness.site("east", change=slow), harness.site("west", change=once)]
    server = schema.ServerConfig(round_timeout_s=1000.0, patience=1.5)
    about = {"server": server, "recipe": {"rounds": 2}, "durable": True}
    with pytest.raises(errors.QuorumMissed):
        harness.run(members, **about)
    broken = False
    folder = harness.run(members, **about)
    first, second = journal(folder)
    assert [number for kind, number in members[0].asked if kind == "train"] == [1, 2], "it is not asked twice"
    assert "answered" not in first, "by west alone round 2 would wait for no time"
    assert second["answered"]["east"] >= 0.5
    assert set(second["answered"]) == {"east", "west"}
    assert not [path for path in (folder / "received").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("kind", ["evaluate val", "evaluate test"])
@pytest.mark.parametrize("how", ["error", "nan", "other site"])
def test_a_site_that_cannot_evaluate(harness: Harness, kind: str, how: str) -> None:
    """Validation goes on without it; the final test is not finished, and a resume finishes it."""

    def change(asked: str, number: int, reply: Any) -> Any:
        if asked != kind:
            return reply
        if how == "error":
            raise errors.DataError("unreadable")
        return dataclasses.replace(reply, **({"metrics": {"dice": float("nan")}} if how == "nan" else {"site": "east"}))

    members = [harness.site("east"), harness.site("west", change=change)]
    if kind == "evaluate val":
        folder = harness.run(members)
        assert set(journal(folder)[-1]["validation"]) == {"east"}
        return
    with pytest.raises(errors.QuorumMissed, match="the final test is missing from: west"):
        harness.run(members)
    folder = harness.run([harness.site("east"), harness.site("west")])
    assert set(evaluation(folder)["last"]["sites"]) == {"east", "west"}


def test_values_of_single_samples_are_kept_only_where_they_were_asked_for(harness: Harness) -> None:
    """A site that sends them unasked shows nobody's; the others' scores stand."""

    def tell(asked: str, number: int, reply: Any) -> Any:
        if not asked.startswith("evaluate"):
            return reply
        return dataclasses.replace(reply, samples={"dice": [0.125, 0.25]}, ids=("Jane Doe", "b"))

    members = [harness.site("east"), harness.site("west", change=tell)]
    folder = harness.run(members)
    assert evaluation(folder)["last"]["samples"] == {"east": {"id": []}, "west": {"id": []}}
    assert set(evaluation(folder)["last"]["sites"]) == {"east", "west"}
    assert b"Jane" not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    asked = harness.run([harness.site("east"), harness.site("west")], "asked", per_sample=True)
    assert evaluation(asked)["last"]["samples"]["east"]["id"] == ["a", "b"]


def test_mixed_ranks_with_svd(harness: Harness) -> None:
    members = [harness.site("east", rank=1), harness.site("north", rank=2), harness.site("west", rank=3)]
    folder = harness.run(members, recipe={"aggregation": {"rule": "svd"}})
    adapter = checkpoint.read(folder / "adapter.safetensors")[0]
    assert adapter["block.00.q.A"].shape == (3, 7)
    assert journal(folder)[0]["refused"] == {}
    for line in journal(folder):
        assert line["factor_error"] is None
        assert 0 < line["aggregate_error"] < 1


# -- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mean", "svd"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_stopped_run_ends_as_one_that_was_not(harness: Harness, after: int, rule: str) -> None:
    more: dict[str, Any] = {"recipe": {"aggregation": {"rule": rule}}, "test_best": True}
    whole = harness.run(harness.three(), "whole", **more)
    members = harness.three()
    folder = harness.run(members, stop_after=after, **more)
    assert [line["round"] for line in journal(folder)] == list(range(1, after + 1))
    assert not (folder / "evaluation.json").exists()
    for member in members:
        member.asked.clear()
    harness.run(members, **more)
    assert [number for kind, number in members[0].asked if kind == "train"] == list(range(after + 1, 4))
    assert lasting(folder) == lasting(whole)
    assert evaluation(folder)["fingerprint"] == evaluation(whole)["fingerprint"]
    assert evaluation(folder)["best"] == evaluation(whole)["best"]


@pytest.mark.parametrize("damage", ["line lost", "line cut short", "checkpoint lost with its line"])
def test_a_round_whose_line_is_not_there_is_run_again(harness: Harness, damage: str) -> None:
    whole = harness.run(harness.three(), "whole")
    folder = harness.run(harness.three(), stop_after=3)
    path = folder / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + (lines[-1][:-20] if damage == "line cut short" else b""))
    if damage == "checkpoint lost with its line":
        (folder / "checkpoints" / "round-00003.safetensors").unlink()
    harness.run(harness.three())
    assert lasting(folder) == lasting(whole)
    assert evaluation(folder)["fingerprint"] == evaluation(whole)["fingerprint"]


def test_a_finished_run_asks_nobody(harness: Harness) -> None:
    members = harness.three()
    folder = harness.run(members)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for member in members:
        member.asked.clear()
    harness.run(members)
    assert [member.asked for member in members] == [[], [], []]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_lost_evaluation_is_made_again_without_training(harness: Harness) -> None:
    members = harness.three()
    folder = harness.run(members)
    before = evaluation(folder)
    (folder / "evaluation.json").unlink()
    for member in members:
        member.asked.clear()
    harness.run(members)
    assert not any(kind == "train" for member in members for kind, _ in member.asked)
    assert evaluation(folder)["last"] == before["last"]


def edit_line(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def swap_checkpoint(folder: Path) -> None:
    """A whole and valid checkpoint, but of another adapter than the journal names."""
    path = folder / "checkpoints" / "round-00002.safetensors"
    adapter, _, marks = checkpoint.read(path)
    checkpoint.write(path, 2.0 * adapter, marks)


def flip_last_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "number in the journal": (
        lambda f: edit_line(f / "journal.jsonl", b'"east":10', b'"east":11'),
        "line 1 does not continue the chain",
    ),
    "line of the journal taken out": (
        lambda f: edit_line(f / "journal.jsonl", (f / "journal.jsonl").read_bytes().splitlines(True)[0], b""),
        "line 1 does not",
    ),
    "NaN in the journal": (lambda f: edit_line(f / "journal.jsonl", b'"east":10', b'"east":NaN'), "line 1 does not"),
    "journal is no text": (
        lambda f: edit_line(f / "journal.jsonl", b'"east":10', b'"east":\xff\xff'),
        "line 1 does not",
    ),
    "checkpoint changed": (
        lambda f: flip_last_bit(f / "checkpoints" / "round-00002.safetensors"),
        "changed or is damaged",
    ),
    "checkpoint of another adapter": (swap_checkpoint, "is not the adapter the journal names"),
    "checkpoint cut short": (
        lambda f: (f / "checkpoints" / "round-00002.safetensors").write_bytes(b"123"),
        "cannot be read as a checkpoint",
    ),
    "checkpoint gone": (
        lambda f: (f / "checkpoints" / "round-00002.safetensors").unlink(),
        "cannot be read as a checkpoint",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_edited_run_is_refused(harness: Harness, damage: str) -> None:
    folder = harness.run(harness.three(), stop_after=2)
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(errors.CheckpointError, match=message):
        harness.run(harness.three())


def test_a_folder_of_another_recipe_is_refused(harness: Harness) -> None:
    harness.run(harness.three(), stop_after=2)
    with pytest.raises(errors.CheckpointError, match=r"was written for recipe .*Choose another output folder"):
        harness.run(harness.three(), recipe={"seed": 9})


def test_a_run_folder_can_be_moved(harness: Harness) -> None:
    whole = harness.run(harness.three(), "whole")
    folder = harness.run(harness.three(), "here", stop_after=1)
    shutil.move(folder, harness.folder / "there")
    harness.run(harness.three(), "there")
    assert evaluation(harness.folder / "there")["fingerprint"] == evaluation(whole)["fingerprint"]


# -- the server's own step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["momentum", "adam", "yogi"])
def test_what_the_server_keeps_for_its_step_survives_a_stop(harness: Harness, kind: str) -> None:
    step = {"server_optimiser": kind, "server_momentum": 0.8, "server_learning_rate": 0.5}
    moving = {"recipe": {"aggregation": step}}
    whole = harness.run(harness.three(), "whole", **moving)
    harness.run(harness.three(), "stopped", stop_after=2, **moving)
    stopped = harness.run(harness.three(), "stopped", **moving)
    assert lasting(stopped) == lasting(whole)
    plain = harness.run(harness.three(), "plain")
    assert journal(plain)[-1]["fingerprint"] != journal(whole)[-1]["fingerprint"]


def test_an_edited_velocity_is_refused(harness: Harness) -> None:
    moving = {"recipe": {"aggregation": {"server_momentum": 0.8}}}
    folder = harness.run(harness.three(), stop_after=2, **moving)
    path = checkpoint.path_of(folder / "checkpoints", 2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # names are stored in order: the last bytes are a velocity's
    path.write_bytes(data)
    with pytest.raises(errors.CheckpointError, match="changed"):
        harness.run(harness.three(), **moving)


# -- updates as they come ----------------------------------------------------------------------------------------------


class Shuffled(in_process.InProcessGrid):
    """A Grid whose replies come in another order than the questions went."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        return super().pull_messages(sorted(message_ids, reverse=True))


@pytest.mark.parametrize("rule", ["mean", "svd"])
@pytest.mark.parametrize("durable", [False, True])
def test_the_order_of_arrival_changes_no_bit(harness: Harness, rule: str, durable: bool) -> None:
    chosen: dict[str, Any] = {"recipe": {"aggregation": {"rule": rule}}, "durable": durable}
    one = harness.run(harness.three(), "one", **chosen)
    members = harness.three()
    two = harness.run(members, "two", grid=Shuffled(harness.sites.client_app(members), 3), **chosen)
    assert lasting(one) == lasting(two)


@pytest.mark.parametrize("rule", ["mean", "svd"])
def test_a_site_that_answers_late_or_never_holds_no_other_up(harness: Harness, rule: str) -> None:
    def fail(kind: str, number: int, reply: Any) -> Any:
        if kind == "train" and number == 2:
            raise errors.DataError("no")
        return reply

    def members() -> list[Any]:
        return [harness.site("east", examples=10, change=fail), *harness.three()[1:]]

    more: dict[str, Any] = {"recipe": {"aggregation": {"rule": rule}}, "server": schema.ServerConfig(quorum=2)}
    one = harness.run(members(), "one", **more)
    late = members()
    two = harness.run(late, "two", grid=Shuffled(harness.sites.client_app(late), 3), **more)
    assert set(journal(one)[1]["weights"]) == {"north", "west"}
    assert lasting(one) == lasting(two)


def test_a_federation_whose_quorum_breaks_the_rules_promise_does_not_start(harness: Harness) -> None:
    members = [harness.site(name) for name in ("alpha", "east", "north", "south", "west")]
    rule = {"aggregation": {"rule": "krum", "weighting": "uniform", "options": {"bad": 1}}}
    with pytest.raises(errors.ConfigError) as caught:
        harness.run(members, "weak", recipe=rule, server=schema.ServerConfig(quorum=4))
    assert "needs 5 updates" in str(caught.value)
    assert len(journal(harness.run(members, "strong", recipe=rule))) == 3


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "geometric-median"])
def test_a_bad_site_of_five_leaves_a_robust_rule_where_the_others_are(harness: Harness, rule: str) -> None:
    """It sends a far point within the admission's bounds; the mean goes with it, the rule does not."""

    def far(kind: str, number: int, reply: Any) -> Any:
        if kind != "train":
            return reply
        moved = state.AdapterState({name: array + np.float32(20.0) for name, array in reply.state.items()})
        return dataclasses.replace(reply, state=moved)

    def last(chosen: str, members: list[Any]) -> state.AdapterState:
        settings = {"aggregation": {"rule": chosen, "weighting": "uniform"}}
        folder = harness.run(members, f"{chosen}-{len(members)}", recipe=settings)
        return checkpoint.read(folder / "adapter.safetensors")[0]

    honest = [harness.site(name) for name in ("alfa", "bear", "cart", "duck")]
    members = [*honest, harness.site("evil", change=far)]
    without = last("mean", honest)
    assert (last(rule, members) - without).norm() < 0.05 * without.norm()
    assert (last("mean", members) - without).norm() > without.norm()
