"""Buffered asynchronous rounds on a Grid without processes: what late updates count, what survives, what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.config import asynchronous, schema
from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.server import status
from fedvfm.server.rounds import buffer
from fedvfm.state import checkpoint, state
from fedvfm.storage import hash_chain
from tests.server import numpy_sites

SIZES = {"east": 10, "north": 20, "west": 70}
CHANGING = ("seconds", "ended", "bytes", "peak_mib", "prev", "hash")
"""What time and the handshake of a resume change in a line of the journal."""


def recipe(rounds: int = 5, size: int | None = 2, **values: Any) -> schema.Recipe:
    own = {k: values.pop(k) for k in ("staleness_limit", "staleness_power") if k in values}
    more = {} if size is None else {"asynchronous": {"buffer_size": size, **own}}
    return numpy_sites.make_recipe(rounds=rounds, **more, **values)


class Counted:
    """A simulation of three sites, of which west is slow by the counted clock; keeps what was sent and made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent: dict[tuple[str, int], state.SiteUpdate] = {}
        self.made: dict[int, state.AdapterState] = {}
        self.files = 0
        self.members = [numpy_sites.NumpySite(site, count, change=self._keep) for site, count in SIZES.items()]
        self.asked = {site.name: site.asked for site in self.members}

    def run(
        self, chosen: schema.Recipe, west: float = 2.5, name: str = "run", stop: int = 0, grid: Any = None
    ) -> list[dict[str, Any]]:
        job = numpy_sites.make_job(self.folder / name, self.members, chosen, simulated=True, site_times={"west": west})
        self.made[0] = job.locked.adapter
        numpy_sites.run(job, self.members, stop=numpy_sites.after(stop), note=self._look, grid=grid)
        return hash_chain.read(self.folder / name / "journal.jsonl")

    def _keep(self, kind: str, number: int, reply: Any) -> Any:
        if kind == "train":
            self.sent[reply.site, number] = reply
        return reply

    def _look(self, event: str, fields: Mapping[str, Any]) -> None:
        if event == "round-end":
            (folder,) = self.folder.glob("*/checkpoints")
            self.made[fields["round"]] = checkpoint.read(checkpoint.path_of(folder, fields["round"]))[0]
            self.files = max(self.files, len(list(folder.iterdir())))


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    return Counted(tmp_path)


def lasting(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in CHANGING} for line in lines]


# -- laws --------------------------------------------------------------------------------------------------------------


def test_where_nobody_is_late_it_is_the_mean_bit_for_bit(tmp_path: Path) -> None:
    plain = Counted(tmp_path / "plain").run(recipe(3, None))
    lines = Counted(tmp_path / "all").run(recipe(3, 3))
    assert [line["fingerprint"] for line in lines] == [line["fingerprint"] for line in plain]
    assert [line["clock"] for line in lines] == [2.5, 5.0, 7.5]
    assert all(line["out"] == {} == line["staleness"] for line in lines)
    assert not {"out", "staleness", "clock"} & plain[0].keys(), "journals of other recipes are as they were"


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_late_update_counts_less_and_moves_the_adapter_by_what_it_changed(counted: Counted, weighting: str) -> None:
    lines = counted.run(recipe(aggregation={"weighting": weighting}))
    assert [sorted(line["examples"]) for line in lines] == [
        ["east", "north"],
        ["east", "north"],
        ["east", "west"],  # west answers at 2.5, the others at 3, and two are enough
        ["east", "north"],  # north was left over, a round late
        ["east", "north", "west"],  # the last one waits for all
    ]
    assert [line["staleness"] for line in lines] == [{}, {}, {"west": 2}, {"north": 1}, {"west": 1}]
    assert [line["clock"] for line in lines] == [1.0, 2.0, 3.0, 4.0, 5.5]
    assert lines[0]["out"] == {"west": {"round": 1, "due": 2.5}}
    assert lines[-1]["out"] == {}
    assert [line["cohort"] for line in lines] == [
        ["east", "north", "west"],
        ["east", "north"],
        ["east", "north"],
        ["east", "west"],
        ["east", "north"],
    ]
    plain = SIZES if weighting == "examples" else dict.fromkeys(SIZES, 1)
    for line in lines:
        number, late = line["round"], line["staleness"]
        start, step = counted.made[number - 1], {}
        shares = {site: plain[site] / math.sqrt(1 + late.get(site, 0)) for site in line["examples"]}
        for site, share in shares.items():
            asked = number - late.get(site, 0)
            for name, array in (counted.sent[site, asked].state - counted.made[asked - 1]).items():
                part = share * array.astype(np.float64) / sum(plain[site] for site in shares)
                step[name] = step.get(name, 0.0) + part
        for name, array in counted.made[number].items():
            np.testing.assert_allclose(array, start[name] + step[name], rtol=1e-5, atol=1e-6)
        total = sum(shares.values())
        assert line["weights"] == pytest.approx({site: share / total for site, share in shares.items()})
    assert counted.asked["west"].count(("train", 1)) == 1, "asked once, whatever rounds went by"


def test_the_discount_of_staleness() -> None:
    own = asynchronous.Asynchronous(buffer_size=1)
    assert own.discount(0) == 1.0
    assert "every site can read another one's update off two adapters" in own.said
    assert "read another" not in asynchronous.Asynchronous(buffer_size=2).said
    assert own.discount(3) == pytest.approx(0.5)
    assert asynchronous.Asynchronous(buffer_size=1, staleness_power=0.0).discount(9) == 1.0


def test_an_update_that_is_not_late_is_folded_as_it_is() -> None:
    start, sent = (numpy_sites.draw(numpy_sites.manifest(), seed) for seed in (1, 2))
    update = state.SiteUpdate("east", numpy_sites.draw(numpy_sites.manifest(), 3), 1, 0, sent.fingerprint)
    moved = buffer.moved(update, sent, start)
    for name, array in moved.state.items():
        np.testing.assert_allclose(array - start[name], update.state[name] - sent[name], atol=1e-6)
    assert buffer.moved(dataclasses.replace(update, state=sent), sent, start).state == start, "no change, no step"
    assert buffer.shortened(sent, start, 0.0) == start
    assert buffer.shortened(sent, start, 1.0) == sent


def test_a_site_that_is_too_slow_is_refused_counted_and_asked_again(counted: Counted) -> None:
    lines = counted.run(recipe(7, staleness_limit=2), west=50.0)
    stale = [line["round"] for line in lines if line["refused"]]
    assert stale == [4]
    assert lines[3]["refused"]["west"]["reason"] == "too-stale"
    assert "trains since round 1; an update may be 2 rounds late" in lines[3]["refused"]["west"]["detail"]
    assert "west" not in lines[3]["cohort"]
    assert "west" in lines[4]["cohort"]
    assert lines[-1]["staleness"] == {"west": 2}, "the last round waits for it"
    assert counted.files <= 2 + 2, "the last two checkpoints, and those that somebody is out with"


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_stopped_after_any_round_and_resumed_it_ends_with_the_same_bits(tmp_path: Path, codec: str) -> None:
    chosen = recipe(4, codec=codec)
    whole = lasting(Counted(tmp_path / "whole").run(chosen))
    for stop in (1, 2, 3):
        stopped = Counted(tmp_path / f"stopped-{stop}")
        stopped.run(chosen, stop=stop)
        assert lasting(stopped.run(chosen)) == whole


class Eager(numpy_sites.LoopGrid):
    """Sites train as soon as they are asked, whether their answers are taken or not."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        keys = list(super().push_messages(messages))
        self.came = {**getattr(self, "came", {}), **{key: super(Eager, self).pull_messages([key]) for key in keys}}
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [reply for key in message_ids for reply in self.came.pop(key, [])]


def test_what_coding_an_update_lost_that_was_given_up_is_the_same_whenever_it_is_trained(tmp_path: Path) -> None:
    chosen = recipe(7, staleness_limit=2, codec="int4")
    lazy = lasting(Counted(tmp_path / "lazy").run(chosen, west=50.0))
    eager = Counted(tmp_path / "eager")
    grid = Eager(numpy_sites.client_app(eager.members), len(eager.members))
    assert lasting(eager.run(chosen, west=50.0, grid=grid)) == lazy
    stopped = Counted(tmp_path / "stopped")
    stopped.run(chosen, west=50.0, stop=3)
    assert lasting(stopped.run(chosen, west=50.0)) == lazy


def test_an_adapter_that_a_site_is_out_with_is_checked_when_it_is_read(counted: Counted) -> None:
    chosen = recipe(7)
    counted.run(chosen, stop=5)
    line = hash_chain.read(counted.folder / "run" / "journal.jsonl")[-1]
    since = min(row["round"] for row in line["out"].values())
    assert since < 5, "somebody is out with an adapter of an earlier round"
    path = checkpoint.path_of(counted.folder / "run" / "checkpoints", since - 1)
    checkpoint.save(path.parent, since - 1, counted.made[0], {}, chosen.hash)
    with pytest.raises(errors.CheckpointError, match="with which a site still trains"):
        counted.run(chosen)


# -- a coordinator that is killed, and real clocks ---------------------------------------------------------------------


class SlowWest(numpy_sites.LoopGrid):
    """West's answers to training are held back until they are let go."""

    def __init__(self, members: list[numpy_sites.NumpySite]) -> None:
        super().__init__(numpy_sites.client_app(members), len(members))
        self.west = f"-{10 + [site.name for site in members].index('west')}"
        self.held = True

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        def free(key: str) -> bool:
            message = self._waiting.get(key)
            late = message is not None and message.metadata.message_type == "train" and key.endswith(self.west)
            return not (self.held and late)

        return super().pull_messages([key for key in message_ids if free(key)])


def deployed(folder: Path, chosen: schema.Recipe, release: int, kill: Any = None) -> list[Any]:
    """A coordinator's run; west is let go as this round begins. What each site was asked."""
    members = [numpy_sites.NumpySite(site, count) for site, count in SIZES.items()]
    grid = SlowWest(members)

    def note(event: str, fields: Mapping[str, Any]) -> None:
        if event == "round" and fields["round"] >= release:
            grid.held = False

    job = numpy_sites.make_job(folder, members, chosen, durable=True)
    numpy_sites.run(job, members, stop=kill, note=note, grid=grid)
    return [site.asked for site in members]


def killed_with_the_late_update(event: str, fields: Mapping[str, Any]) -> bool:
    return event == "reply" and fields["phase"] == "train" and fields["site"] == "west"


def test_killed_between_a_late_arrival_and_the_end_of_its_round_nothing_is_lost(tmp_path: Path) -> None:
    chosen = recipe(4)
    deployed(tmp_path / "whole", chosen, release=3)
    whole = hash_chain.read(tmp_path / "whole" / "journal.jsonl")
    assert [line["staleness"] for line in whole] == [{}, {}, {"west": 2}, {}]
    assert "west" not in whole[0]["validation"], "a site that trains is not asked for scores"
    assert "west" in whole[2]["validation"]
    assert "clock" not in whole[0]
    deployed(tmp_path / "killed", chosen, release=3, kill=killed_with_the_late_update)
    assert len(hash_chain.read(tmp_path / "killed" / "journal.jsonl")) == 2
    *_, west = deployed(tmp_path / "killed", chosen, release=3)
    lines = hash_chain.read(tmp_path / "killed" / "journal.jsonl")
    assert [line["fingerprint"] for line in lines] == [line["fingerprint"] for line in whole]
    assert [line["staleness"] for line in lines] == [{}, {}, {"west": 2}, {}]
    assert ("train", 1) not in west, "its update is on disk: it is not asked again"


def test_killed_while_a_site_trains_it_is_asked_for_the_same_round_again(tmp_path: Path) -> None:
    chosen = recipe(4)
    deployed(tmp_path / "run", chosen, release=9, kill=numpy_sites.after(2))
    *_, west = deployed(tmp_path / "run", chosen, release=3)
    assert ("train", 1) in west
    lines = hash_chain.read(tmp_path / "run" / "journal.jsonl")
    assert [line["staleness"] for line in lines] == [{}, {}, {"west": 2}, {}]


class Away(SlowWest):
    """In place of west's first answers to training comes that it is away."""

    words = 2

    def __init__(self, members: list[numpy_sites.NumpySite]) -> None:
        super().__init__(members)
        self.held, self.number, self.said = False, 0, list[int]()

    def note(self, event: str, fields: Mapping[str, Any]) -> None:
        if event == "round":
            self.number = fields["round"]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        keys = [key for key in message_ids if key.endswith(self.west) and len(self.said) < self.words]
        asked = {key: self._waiting.pop(key) for key in keys if self._waiting[key].metadata.message_type == "train"}
        self.said += [self.number] * len(asked)
        words = [protocol.in_place_of_answer("away", message) for message in asked.values()]
        for word, key in zip(words, asked, strict=True):
            internals.set_reply_to(word, key)
        return [*words, *super().pull_messages([key for key in message_ids if key not in asked])]


@pytest.mark.parametrize(("pause", "said"), [(0.0, [1, 2]), (60.0, [1, 5])])
def test_a_site_that_is_away_for_long_is_asked_for_the_same_round_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: float, said: list[int]
) -> None:
    """After a pause, and by the last round."""
    monkeypatch.setattr(buffer, "PAUSE_S", pause)
    members = [numpy_sites.NumpySite(site, count) for site, count in SIZES.items()]
    grid = Away(members)
    job = numpy_sites.make_job(tmp_path, members, recipe(5), durable=True)
    numpy_sites.run(job, members, grid=grid, note=grid.note)
    lines = hash_chain.read(tmp_path / "journal.jsonl")
    assert grid.said == said
    assert [line["staleness"] for line in lines] == [{}, {}, {} if pause else {"west": 2}, {}, {}]
    assert all(line["refused"] == {} for line in lines)
    assert members[2].asked.count(("train", 1)) == (0 if pause else 1)


def test_who_was_away_rests_while_those_that_begin_can_fill_the_round() -> None:
    own = buffer.Buffer(asynchronous.Asynchronous(buffer_size=2), None)
    own.ask(1, SIZES)
    own.was_away("west", 100.0)
    soon = 100.0 + buffer.PAUSE_S - 1.0
    assert own.resting(SIZES, 1, 2, soon) == {"west"}
    assert own.resting(SIZES, 1, 3, soon) == set(), "a round that needs it asks it"
    assert own.resting(SIZES, 1, 2, 100.0 + buffer.PAUSE_S) == set()
    own.ask(2, ["east"])
    assert own.resting(SIZES, 2, 2, soon) == set(), "north trains since round 1, and nobody knows for how long"


def test_the_status_says_who_is_out_and_when_that_is_stale() -> None:
    def says(chosen: schema.Recipe, number: int, **answered: int) -> dict[str, Any]:
        rows = {site: {"answered_round": answered.get(site, 0), "out": None, "says": "takes part"} for site in SIZES}
        line = {"round": 4, "out": {"north": {"round": 3}, "west": {"round": 2}, "gone": {"round": 1}}}
        status.add_out(rows, chosen, [line], number)
        assert rows["east"] == {"answered_round": 0, "out": None, "says": "takes part"}
        return {site: (row["out"], row["says"]) for site, row in rows.items() if row["out"]}

    chosen = recipe(9, staleness_limit=4)
    assert says(chosen, 5, north=3) == {
        "west": ({"since": 2, "stale_in": 2}, "takes part; out since round 2, stale in 2 rounds")
    }
    late = says(chosen, 7)
    assert late["west"] == ({"since": 2, "stale_in": 0}, "takes part; out since round 2, stale")
    assert late["north"][1].endswith("stale in 1 round")
    assert says(recipe(9, None), 5) == {}
    again = chosen.model_copy(update={"rerun": schema.Rerun(of="ab" * 32, after=2)})
    assert set(says(again, 5)) == {"north"}, "of the recipe that it goes on from nobody is waited for"


def test_a_quorum_that_is_missed_names_who_is_away(tmp_path: Path) -> None:
    class AllButEast(numpy_sites.LoopGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            messages = {key: self._waiting[key] for key in message_ids}
            gone = {key: one for key, one in messages.items() if one.metadata.message_type == "train"}
            gone = {key: self._waiting.pop(key) for key in gone if not key.endswith("-10")}
            words = {key: protocol.in_place_of_answer("away", message) for key, message in gone.items()}
            for key, word in words.items():
                internals.set_reply_to(word, key)
            return [*words.values(), *super().pull_messages([key for key in messages if key not in gone])]

    members = [numpy_sites.NumpySite(site, count) for site, count in SIZES.items()]
    grid = AllButEast(numpy_sites.client_app(members), len(members))
    job = numpy_sites.make_job(tmp_path, members, recipe(2), durable=True)
    with pytest.raises(errors.QuorumMissed, match=r"1 of 3 sites were admitted.*\(north: away, west: away\)"):
        numpy_sites.run(job, members, grid=grid)


def test_who_is_out_in_rounds_of_an_earlier_recipe_is_waited_for_by_nobody() -> None:
    line = {"out": {"east": {"round": 2}, "west": {"round": 4}}}
    own = buffer.Buffer(asynchronous.Asynchronous(buffer_size=1), None, line, first_round=3)
    assert own.out == {"west": buffer.Version(4)}


def test_a_round_that_is_full_on_disk_asks_nobody(tmp_path: Path) -> None:
    def after_two(event: str, fields: Mapping[str, Any]) -> bool:
        return event == "reply" and fields["phase"] == "train" and fields["site"] == "north"

    chosen = recipe(3)
    deployed(tmp_path / "run", chosen, release=9, kill=after_two)
    east, *_ = deployed(tmp_path / "run", chosen, release=2)
    assert ("train", 1) not in east
    lines = hash_chain.read(tmp_path / "run" / "journal.jsonl")
    assert [line["staleness"] for line in lines] == [{}, {"west": 1}, {}]


def test_a_site_that_does_not_answer_in_time_is_missed_and_a_quorum_goes_on(tmp_path: Path) -> None:
    members = [numpy_sites.NumpySite(site, count) for site, count in SIZES.items()]
    server = schema.ServerConfig(quorum=2, round_timeout_s=1.0)
    job = numpy_sites.make_job(tmp_path, members, recipe(2), durable=True, server=server, least_tests=2)
    numpy_sites.run(job, members, grid=SlowWest(members))
    lines = hash_chain.read(tmp_path / "journal.jsonl")
    assert lines[-1]["refused"]["west"] == {"reason": "no-answer", "detail": "no reply within 1 s"}


def test_a_site_that_is_given_up_still_trains_and_is_not_waited_for_with_its_scores(tmp_path: Path) -> None:
    deployed(tmp_path / "run", recipe(4, staleness_limit=1), release=4)
    lines = hash_chain.read(tmp_path / "run" / "journal.jsonl")
    assert [sorted(line["refused"]) for line in lines] == [[], [], ["west"], []]
    assert ["west" in line["validation"] for line in lines] == [False, False, False, True]


def test_a_round_is_of_as_many_sites_as_were_promised_where_one_is_given_up_and_another_left(tmp_path: Path) -> None:
    """West is given up in the round that south is away from: the two others alone would break ``min_sites``."""
    chosen = recipe(4, 3, min_sites=3, staleness_limit=1)

    def coordinate(names: tuple[str, ...], stop: int, *, held: bool) -> list[tuple[str, int]]:
        members = [numpy_sites.NumpySite(name) for name in names]
        grid = SlowWest(members)
        grid.held = held
        job = numpy_sites.make_job(tmp_path, members, chosen, durable=True)
        numpy_sites.run(job, members, stop=numpy_sites.after(stop), grid=grid)
        return members[-1].asked

    coordinate(("east", "north", "south", "west"), 2, held=True)
    asked = coordinate(("east", "north", "west"), 3, held=False)
    third = hash_chain.read(tmp_path / "journal.jsonl")[2]
    assert third["refused"]["west"]["reason"] == "too-stale", "its update of round 1"
    assert sorted(third["examples"]) == ["east", "north", "west"]
    assert third["staleness"] == {}
    assert ("train", 3) in asked
    assert ("train", 1) not in asked


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"aggregation": {"rule": "svd"}}, "rule = 'svd'.*from one adapter"),
        ({"aggregation": {"rule": "median", "weighting": "uniform"}}, "rule = 'median'.*from one adapter"),
        ({"aggregation": {"weighting": "loss"}}, "weighting = 'loss'.*count more for being late"),
        ({"adapter": {"rank": 3, "factors": "alternate"}}, "factors = 'alternate'"),
        ({"personal": {"kind": "head-local"}}, r"personal\.kind = 'head-local'"),
        (
            {
                "optimiser": {"name": "sgd", "control_variates": True},
                "aggregation": {"weighting": "uniform"},
            },
            "a correction is of the round",
        ),
        ({"unlabelled": {}, "data": {"class_names": ["a", "b"], "augment": ["flip"]}}, "sites without labels alone"),
        (
            {
                "privacy": {"mechanism": "site-level", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5},
                "aggregation": {"weighting": "uniform"},
            },
            "its noise is for one sum of all sites",
        ),
        ({"secure_aggregation": {}, "min_sites": 2}, "the masks of a round"),
        ({"min_sites": 3}, "buffer_size = 2, and the sites were promised more"),
    ],
)
def test_what_needs_updates_of_one_adapter_is_refused(values: dict[str, Any], match: str) -> None:
    faults = rules.faults(recipe(**values))
    own = [fault for fault in faults if fault.startswith("recipe.asynchronous: ")]
    assert len(own) == 1
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(own[0])


def test_the_servers_settings_that_exclude_it(tmp_path: Path) -> None:
    members = [numpy_sites.NumpySite(site) for site in SIZES]
    server = schema.ServerConfig(quorum=3, cohort=3, grace_s=1.0, patience=2.0)
    job = numpy_sites.make_job(tmp_path, members, recipe(), server=server)
    with pytest.raises(errors.ConfigError) as caught:
        numpy_sites.run(job, members)
    for fault in ("server.cohort = 3: ", "server.quorum = 3: ", "server.grace_s = 1: ", "server.patience = 2: "):
        assert fault in str(caught.value)


def test_a_recipe_without_it_has_the_bytes_and_the_hash_it_had() -> None:
    plain = recipe(3, None)
    assert "asynchronous" not in plain.model_dump(mode="json")
    assert plain.hash != recipe(3, 3).hash
    assert rules.faults(recipe(privacy={"mechanism": "record-level", "clip": 1.0, "epsilon": 8.0, "delta": 1e-5})) == []
