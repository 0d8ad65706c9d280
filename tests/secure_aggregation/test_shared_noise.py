"""Noise that sites share: how much, drawn once, the same where asked again; a coordinator that wants less of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.client.gate import masking, secure_answers
from fedvfm.config import schema
from fedvfm.privacy import accountant, base, events, planner
from fedvfm.privacy import table as mechanisms
from fedvfm.protocol import protocol, secure_messages
from fedvfm.secure_aggregation import fixed_point, participant, shared_noise
from fedvfm.secure_aggregation import session as sessions
from fedvfm.server.rounds import secure_sum
from fedvfm.state import state
from fedvfm.storage import storage
from fedvfm.trust import keys, roster_document
from tests.secure_aggregation.study import COUNTS, Killed, Study
from tests.server import numpy_sites

PRIVACY = {"mechanism": "site-level-shared", "clip": 2.0, "noise_multiplier": 1.5, "delta": 1e-5}
PLAIN = {"name": "sgd", "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}
STEP = {**PLAIN, "batch_size": 4, "learning_rate": 0.1}


def values(unit: str = "site", **more: Any) -> dict[str, Any]:
    given = {
        "min_sites": 3,
        "aggregation": {"weighting": "uniform"},
        "secure_aggregation": {"clip_norm": 50.0},
        "privacy": {**PRIVACY, "mechanism": f"{unit}-level-shared"},
        "optimiser": {} if unit == "site" else STEP,
    }
    return {**given, **more}


def recipe(unit: str = "site", **more: Any) -> schema.Recipe:
    return numpy_sites.make_recipe(**values(unit, **more))


# -- how much ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("min_sites", "threshold", "colluders", "honest"), [(3, 0, 1, 2), (6, 0, 1, 5), (6, 0, 2, 4), (4, 6, 1, 5)]
)
def test_who_is_certain_to_be_honest_follows_from_the_recipe_alone(
    min_sites: int, threshold: int, colluders: int, honest: int
) -> None:
    own = {"clip_norm": 50.0, "colluders": colluders, "threshold": threshold}
    made_from = recipe(min_sites=min_sites, secure_aggregation=own)
    noise = shared_noise.of(made_from)
    assert noise is not None
    assert noise.honest == honest
    assert noise.part == pytest.approx(1.5 * 2.0 / math.sqrt(honest))
    event = events.event_of(made_from, 1)
    assert event == base.PrivacyEvent("site-level-shared", "site", 1.5, 1.0, 1, 2.0, honest)
    told_more = recipe(min_sites=min_sites + 1, secure_aggregation=own)
    assert told_more.hash != made_from.hash, "whoever counts on more of them asks for another approval"


@pytest.mark.parametrize("unit", ["site", "record"])
@pytest.mark.parametrize("colluders", [1, 4])
def test_a_recipe_that_counts_on_nobody_is_refused_and_can_be_planned(unit: str, colluders: int) -> None:
    """A recipe's draft without min_sites, say: planning it is no crash."""
    draft = recipe(unit, min_sites=1, secure_aggregation={"clip_norm": 50.0, "colluders": colluders})
    assert any("is certain to be in a sum" in fault for fault in mechanisms.faults(draft))
    assert math.isfinite(planner.plan(planner.question(draft, 40, numbers={"both": 10})).signals[0].step)


def test_what_one_unit_changes_is_a_step_of_its_clipped_gradient() -> None:
    for unit in ("record", "patient"):
        noise = shared_noise.of(recipe(unit))
        assert noise is not None
        assert (noise.bound, noise.rounded) == (pytest.approx(0.1 * 2.0 / 4), True)
        event = events.event_of(recipe(unit), 40)
        assert event == base.PrivacyEvent(f"{unit}-level-shared", unit, 1.5, 0.1, 1, 2.0, 2)
    faster = recipe("record", optimiser={**STEP, "head_learning_rate": 0.3})
    noise = shared_noise.of(faster)
    assert noise is not None
    assert noise.bound == pytest.approx(0.3 * 2.0 / 4), "by the larger of the rates"


@pytest.mark.parametrize("unit", ["site", "record"])
def test_the_parameter_covers_rounding_too(unit: str) -> None:
    point, start = fixed_point.of(recipe(unit)), numpy_sites.draw(numpy_sites.manifest(), 0)
    assert point.noise is not None
    sigma = point.noise.sigma(point.places, start, list(start))
    numbers = sum(array.size for array in start.values())
    least = point.noise.part * 2.0**point.places
    if unit == "site":
        assert least < sigma < least * (1 + 1e-6)
    else:
        length = math.sqrt(sum(float(np.square(array.astype(float)).sum()) for array in start.values()))
        slack = shared_noise.FLOAT32 * (length + 50.0) / point.noise.bound
        assert sigma == pytest.approx(least * (1 + slack), rel=1e-6)
    assert sigma * math.sqrt(2) >= 1.5 * (point.noise.bound * 2.0**point.places + math.sqrt(numbers))


@pytest.mark.parametrize(
    ("unit", "more", "word"),
    [
        ("site", {"secure_aggregation": None}, "hides nothing alone"),
        ("site", {"aggregation": {"weighting": "examples"}}, "uniform"),
        ("record", {"aggregation": {"weighting": "examples"}}, "uniform"),
        ("site", {"privacy": {**PRIVACY, "noise_multiplier": None, "epsilon": 8.0}}, "give noise_multiplier"),
        ("site", {"privacy": {**PRIVACY, "clip": 60.0}}, "clip_norm = 50"),
        ("site", {"privacy": {**PRIVACY, "microbatch": 2}}, "microbatch"),
        ("record", {"optimiser": {**STEP, "name": "adamw"}}, "one plain step"),
        ("record", {"optimiser": {**STEP, "local_epochs": 2}}, "one plain step"),
        ("record", {"optimiser": {**STEP, "schedule": "cosine"}}, "one plain step"),
        ("record", {"optimiser": {**STEP, "warmup": 0.1}}, "one plain step"),
        ("record", {"optimiser": {**STEP, "weight_decay": 0.1}}, "one plain step"),
        ("record", {"optimiser": {**STEP, "learning_rate": 1e-15}}, "lost in the fixed point"),
    ],
)
def test_what_no_proof_covers_is_refused_with_the_reason(unit: str, more: dict[str, Any], word: str) -> None:
    (fault,) = mechanisms.faults(recipe(unit, **more))
    assert word in fault


@pytest.mark.parametrize(
    "more",
    [{"codec": "int8"}, {"aggregation": {"rule": "svd", "weighting": "uniform"}}],
    ids=["codec", "rule"],
)
def test_what_is_no_sum_stays_refused(more: dict[str, Any]) -> None:
    assert rules.faults(recipe(**more))


@pytest.mark.parametrize("unit", ["site", "record", "patient"])
def test_a_recipe_that_is_covered_has_no_fault(unit: str) -> None:
    made_from = recipe(unit)
    assert (mechanisms.faults(made_from), rules.faults(made_from)) == ([], [])


# -- on the numbers ----------------------------------------------------------------------------------------------------


def zeros(size: int) -> state.AdapterState:
    return state.AdapterState({"w": np.zeros(size, np.float32)})


def test_six_sites_sum_has_the_stated_noise_and_their_mean_a_part_of_what_each_alone_would_bring() -> None:
    sites, size = 6, 20_000
    made_from = recipe(min_sites=sites)
    point, start = fixed_point.of(made_from), zeros(size)
    plain = point.encode(start, start, ["w"], 1, None)
    total = np.zeros(size + fixed_point.TAIL, np.uint64)
    for site in range(sites):
        total += point.noised(plain, start, ["w"], secure_sum.simulated_key(0, 1, str(site)))
    mean = point.decode(total, start, ["w"], sites)
    noise = np.asarray(mean.state["w"], np.float64)
    stated = 1.5 * 2.0 * math.sqrt(sites / 5) / sites  # five of them are counted on
    assert stats.kstest(noise / stated, "norm").pvalue > 1e-4
    assert noise.std() == pytest.approx(stated, rel=0.02)
    alone = 1.5 * 2.0 / math.sqrt(sites)
    assert alone / noise.std() == pytest.approx(math.sqrt(5), rel=0.02)
    assert (mean.weight, mean.loss) == (sites, None)
    parts = [point.noised(plain, start, ["w"], secure_sum.simulated_key(0, 1, str(site))) for site in range(5)]
    honest = np.sum(parts, axis=0, dtype=np.uint64)[:-3].view(np.int64)
    assert stats.kstest(honest / 2.0**point.places / 3.0, "norm").pvalue > 1e-4, "of five it is the stated one"


def test_what_the_journal_says_of_the_noise_has_the_roundings_in_it() -> None:
    """A short step of a long adapter: what float32 loses is more than what one image changes."""
    short = recipe("record", optimiser={**STEP, "learning_rate": 1e-4})
    point, start = fixed_point.of(short), state.AdapterState({"w": np.full(900, 2.0, np.float32)})
    assert point.noise is not None
    total = np.zeros(903, np.uint64)
    for site in range(3):
        plain = point.encode(start, start, ["w"], 1, None)
        total += point.noised(plain, start, ["w"], secure_sum.simulated_key(0, 1, str(site)))
    mean = point.decode(total, start, ["w"], 3)
    assert mean.noise > 1.5 * point.noise.part * math.sqrt(3) / 3
    line = secure_sum.joined(mean, ["a", "b", "c"], {}, short).record[secure_sum.ENTRY]
    assert line["noise_on_mean"] == pytest.approx(mean.noise)
    parts = total[:-3].view(np.int64) / (3 * 2.0**point.places)
    assert parts.std() == pytest.approx(mean.noise, rel=0.1)


def test_no_noise_is_on_what_stands_behind_and_no_loss_is_told() -> None:
    point, start = fixed_point.of(recipe()), zeros(10)
    plain = point.encode(start, start, ["w"], 1, 0.25)
    noisy = point.noised(plain, start, ["w"], bytes(32))
    assert noisy[-3:].tolist() == plain[-3:].tolist() == [1, 0, 0]
    assert (noisy[:-3] != plain[:-3]).all()


def test_a_sum_that_no_sites_with_noise_could_have_sent_is_refused() -> None:
    point, start = fixed_point.of(recipe()), zeros(100)
    plain = point.encode(start, start, ["w"], 1, None)
    noisy = [point.noised(plain, start, ["w"], bytes([site]) * 32) for site in range(4)]
    total = np.sum(noisy, axis=0, dtype=np.uint64)
    point.decode(total, start, ["w"], 4)
    total[0] += np.uint64(1 << 61)
    with pytest.raises(errors.SecureAggregationError) as caught:
        point.decode(total, start, ["w"], 4)
    assert caught.value.reason == "secure-sum"


def test_the_largest_noise_and_updates_of_all_sites_have_room() -> None:
    for multiplier in (0.01, 4.5, 1000.0):
        point = fixed_point.of(recipe(privacy={**PRIVACY, "noise_multiplier": multiplier}))
        assert point.noise is not None
        most = sessions.MOST_SITES * (2.0 + shared_noise.TAIL * point.noise.part)
        assert most * 2.0**point.places <= 2.0**62


# -- drawn once --------------------------------------------------------------------------------------------------------


def seeded(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Real sites draw what virtual ones do, so that both can be held against each other."""

    def key(self: masking.Sessions, session: sessions.Session, plain: Any) -> bytes:
        return secure_sum.simulated_key(seed, session.round, self._site)

    monkeypatch.setattr(masking.Sessions, "_noise_key", key)


@pytest.mark.parametrize("unit", ["site", "record"])
def test_of_the_same_noise_sites_with_masks_and_a_simulation_come_to_one_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    study = Study(tmp_path, **values(unit))
    seeded(monkeypatch, study.recipe.seed)
    study.run()
    assert study.adapter().fingerprint == study.plain()
    for line in study.journal():
        about = line["secure_aggregation"]
        assert (about["honest"], about["noise_multiplier"], about["loss"]) == (2, 1.5, None)
        stated = 1.5 * shared_noise.of(study.recipe).bound / math.sqrt(2) / 2
        assert stated <= about["noise_on_mean"] <= 1.001 * stated


def test_of_a_site_that_drops_out_no_noise_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(tmp_path, **values())
    seeded(monkeypatch, study.recipe.seed)
    study.fails = lambda site, asked, number: (site, asked, number) == ("north", protocol.TRAIN, 1)
    study.run()
    assert study.adapter().fingerprint == study.plain({1: "north"})


def test_two_runs_of_real_sites_have_noise_of_their_own(tmp_path: Path) -> None:
    first, second = Study(tmp_path / "a", **values()), Study(tmp_path / "b", **values())
    first.run(rounds=1)
    second.run(rounds=1)
    assert first.adapter().fingerprint != second.adapter().fingerprint != first.plain()


class Spied:
    """What sites masked: their numbers before the masks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.numbers: list[tuple[str, bytes]] = []
        real = participant.masked

        def masked(session: Any, site: str, secrets: Any, dealt: Any, held: Any, numbers: Any, least: int) -> Any:
            self.numbers.append((site, numbers.tobytes()))
            return real(session, site, secrets, dealt, held, numbers, least)

        monkeypatch.setattr(participant, "masked", masked)

    def of(self, site: str) -> list[bytes]:
        return [numbers for name, numbers in self.numbers if name == site]


def test_a_round_that_is_asked_anew_brings_no_second_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Averaging answers of several sessions would let the noise fall away."""
    spied = Spied(monkeypatch)
    study = Study(tmp_path, **values())
    study.fails = lambda site, asked, number: asked == protocol.TRAIN and site in ("north", "south")
    for _ in range(2):
        with pytest.raises(errors.QuorumMissed):
            study.run(rounds=1)
    study.fails = lambda site, asked, number: False
    study.run(rounds=1)
    assert len(spied.of("east")) == 3
    assert len(set(spied.of("east"))) == 1, "in every session the same noise on the same update"


@pytest.mark.parametrize("point", ["secure-noise-on-disk", "secure-masked-on-disk"])
@pytest.mark.parametrize("nth", [1, 3])
def test_whoever_is_killed_between_drawing_and_sending_sends_the_noise_that_was_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, nth: int
) -> None:
    spied, left = Spied(monkeypatch), [nth]
    study = Study(tmp_path, **values())
    seeds: list[str] = []

    def die(name: str) -> None:
        if name == point:
            left[0] -= 1
            if left[0] == 0:
                seeds.extend(path.read_text() for path in sorted(tmp_path.glob("*/*.noise")))
                raise Killed(name)

    monkeypatch.setattr(storage, "fault_point", die)
    with pytest.raises(Killed):
        study.run(rounds=1)
    assert len(seeds) == len(set(seeds)) == nth, "each site its own, on disk before its numbers leave"
    study.run(rounds=1)
    for site in COUNTS:
        assert len(set(spied.of(site))) == 1
    assert len(study.journal()) == 1


def test_another_update_of_the_round_has_another_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference of two updates under one noise would be the difference of two updates."""
    spied = Spied(monkeypatch)
    study = Study(tmp_path, **values())
    study.fails = lambda site, asked, number: asked == protocol.TRAIN and site in ("north", "south")
    with pytest.raises(errors.QuorumMissed):
        study.run(rounds=1)

    def further(kind: str, number: int, reply: Any) -> Any:
        if kind != "train":
            return reply
        arrays = {name: array + np.float32(1e-3) for name, array in reply.state.items()}
        return state.SiteUpdate(reply.site, state.AdapterState(arrays), 5, 0, reply.base_fingerprint)

    study.site("east").change = further
    study.fails = lambda site, asked, number: False
    study.run(rounds=1)
    first, second = (np.frombuffer(numbers, np.int64)[:-3] for numbers in spied.of("east"))
    point, start = fixed_point.of(study.recipe), numpy_sites.lock(study.recipe).adapter
    assert point.noise is not None
    apart = (first - second) / (math.sqrt(2) * point.noise.sigma(point.places, start, list(start)))
    assert 0.6 < apart.std() < 1.6


def test_the_seed_goes_with_the_opening(tmp_path: Path) -> None:
    study = Study(tmp_path, **values())
    study.fails = lambda site, asked, number: asked == protocol.UNMASK
    with pytest.raises(errors.QuorumMissed):
        study.run(rounds=1)
    kept = sorted(tmp_path.glob("*/*.noise"))
    assert len(kept) == len(COUNTS)
    assert all(path.stat().st_mode & 0o777 == 0o600 and '"seed":""' not in path.read_text() for path in kept)
    study.fails = lambda site, asked, number: False
    study.run(rounds=1)
    assert all('"seed":""' in path.read_text() for path in kept)
    study.site("east").own.forget(study.recipe.hash)
    assert not [path for path in (tmp_path / "east").iterdir() if path.suffix in (".session", ".keys")]


# -- a coordinator that wants less of it -------------------------------------------------------------------------------


class Asked:
    """One site and its peers, with a coordinator by hand: keys, sessions and shares as it likes."""

    def __init__(self, folder: Path, made_from: schema.Recipe, names: Sequence[str]) -> None:
        self.recipe, self.folder = made_from, folder
        self.keys = {name: keys.make() for name in names}
        self.own = {name: masking.Sessions(folder / name, name, self._key(name)) for name in names}
        self.document = self.roster(names)
        self.start = numpy_sites.lock(made_from).adapter

    def _key(self, name: str) -> Any:
        return lambda: self.keys[name]

    def roster(self, names: Sequence[str]) -> roster_document.RosterDocument:
        public = {name: keys.public_text(self.keys[name]) for name in names}
        return roster_document.make(keys.make(), "tiny", public)

    def session(
        self, names: Sequence[str], threshold: int, document: roster_document.RosterDocument, number: int = 1
    ) -> sessions.Session:
        members = tuple(self.own[name].advertised(self.recipe.hash) for name in sorted(names))
        base_ = self.start.fingerprint
        return sessions.Session(self.recipe.hash, number, base_, document.hash, threshold, members)

    def share(self, site: str, session: sessions.Session, document: roster_document.RosterDocument) -> Any:
        task = protocol.Task(self.recipe, session.round, secure=secure_messages.session_text(session))
        content = secure_answers.share(self.own[site], task, document)
        return protocol.decode_dealing(content)

    def train(self, site: str, session: sessions.Session, document: roster_document.RosterDocument) -> Any:
        dealt = {name: self.share(name, session, document) for name in session.points}
        inbox = {name: dealing.outbox[site] for name, dealing in dealt.items() if name != site}
        text = secure_messages.inbox_text(session.id, inbox)
        task = protocol.Task(self.recipe, session.round, self.start, secure=text)
        update = state.SiteUpdate(site, self.start, 1, session.round - 1, self.start.fingerprint)
        return secure_answers.mask(self.own[site], site, task, update)


SIX = ("a", "b", "c", "d", "e", "f")


def test_a_session_of_a_few_of_the_roster_whose_sum_might_be_opened_beside_another_one_is_refused(
    tmp_path: Path,
) -> None:
    """Sums of two sessions with one site in both would share less noise than one sum has."""
    plain = Asked(tmp_path / "plain", recipe(privacy={}), SIX)
    session = plain.session(("a", "b", "c"), 3, plain.document)
    assert plain.share("a", session, plain.document).session == session.id
    noisy = Asked(tmp_path / "noisy", recipe(), SIX)
    session = noisy.session(("a", "b", "c"), 3, noisy.document)
    with pytest.raises(errors.SecureAggregationError) as caught:
        noisy.share("a", session, noisy.document)
    assert caught.value.reason == "secure-session"
    session = noisy.session(("a", "b", "c", "d"), 4, noisy.document)
    assert noisy.share("a", session, noisy.document).session == session.id
    assert 2 * (4 - 1) > 6 - 1, "two sums need more honest sites than there are"


def test_under_another_roster_document_a_round_s_noise_is_not_sent_again(tmp_path: Path) -> None:
    """Sites of two documents could open two sums of one round."""
    asked = Asked(tmp_path, recipe(), SIX)
    first = asked.roster(SIX[:3])
    asked.train("a", asked.session(SIX[:3], 3, first), first)
    second = asked.roster(("a", "d", "e"))
    with pytest.raises(errors.SecureAggregationError) as caught:
        asked.train("a", asked.session(("a", "d", "e"), 3, second), second)
    assert caught.value.reason == "secure-session"
    asked.train("a", asked.session(("a", "d", "e"), 3, second, number=2), second)


def test_the_seed_goes_with_the_recipe_s_end_and_a_false_end_brings_no_second_noise(tmp_path: Path) -> None:
    """That a recipe ended is the coordinator's word: it could end it, and go on under another roster document."""
    asked = Asked(tmp_path, recipe(), SIX)
    first, second = asked.roster(SIX[:3]), asked.roster(("a", "d", "e"))
    asked.train("a", asked.session(SIX[:3], 3, first), first)
    asked.own["a"].forget(asked.recipe.hash)
    (kept,) = (tmp_path / "a").glob("*.noise")
    assert '"seed":""' in kept.read_text()
    for document, names in ((first, SIX[:3]), (second, ("a", "d", "e"))):
        with pytest.raises(errors.SecureAggregationError) as caught:
            asked.train("a", asked.session(names, 3, document), document)
        assert caught.value.reason == "secure-session"


def test_a_round_that_a_later_one_followed_is_over(tmp_path: Path) -> None:
    asked = Asked(tmp_path, recipe(), SIX[:3])
    for number in (1, 2):
        asked.train("a", asked.session(SIX[:3], 3, asked.document, number), asked.document)
    with pytest.raises(errors.SecureAggregationError) as caught:
        asked.train("a", asked.session(SIX[:3], 3, asked.document, 1), asked.document)
    assert caught.value.reason == "secure-session"


def test_a_damaged_seed_draws_no_other_one(tmp_path: Path) -> None:
    asked = Asked(tmp_path, recipe(), SIX[:3])
    asked.train("a", asked.session(SIX[:3], 3, asked.document), asked.document)
    (path,) = (tmp_path / "a").glob("*.noise")
    path.write_text(path.read_text()[:-5])
    with pytest.raises(errors.SecureAggregationError):
        asked.train("a", asked.session(SIX[:3], 3, asked.document), asked.document)


def test_of_one_recipe_a_shared_and_an_own_noise_are_told_apart_by_the_account() -> None:
    event = events.event_of(recipe("record"), 40)
    assert event is not None
    (row,) = accountant.curve([event])
    assert row == (0.1, 1.5, 1, True)
