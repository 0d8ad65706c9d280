"""Rounds over a real Flower Grid with masks: dropouts, ends of the process at every step, questions nobody may ask."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from fedvfm import errors
from fedvfm.client.gate import masking, secure_answers
from fedvfm.protocol import protocol, secure_messages
from fedvfm.secure_aggregation import consistency, round_keys
from fedvfm.server.rounds import secure_round
from fedvfm.state import state
from fedvfm.storage import storage
from fedvfm.trust import keys, roster_document
from tests.secure_aggregation.study import COUNTS, Killed, SecureSite, Study
from tests.server import numpy_sites


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


def test_the_adapter_is_that_of_a_simulation_to_the_bit_and_two_messages_more_a_round(study: Study) -> None:
    study.run()
    assert study.adapter().fingerprint == study.plain()
    asked = [kind for kind, number in study.site("east").asked if number == 2]
    assert asked == [protocol.SHARE, protocol.TRAIN, protocol.UNMASK]
    for line in study.journal():
        assert line["examples"] == dict.fromkeys(COUNTS)
        assert line["secure_aggregation"]["weight"] == sum(COUNTS.values())
        assert line["refused"] == {}


@pytest.mark.parametrize("way", ["freeze-A", "alternate"])
def test_every_way_of_factors_has_the_simulation_s_adapter(tmp_path: Path, way: str) -> None:
    study = Study(tmp_path, adapter={"rank": 3, "alpha": 6.0, "factors": way})
    study.run()
    assert study.adapter().fingerprint == study.plain()


@pytest.mark.parametrize("kind", [protocol.SHARE, protocol.TRAIN, protocol.UNMASK])
def test_a_site_that_drops_out_before_or_after_masking_changes_nothing_for_the_others(study: Study, kind: str) -> None:
    study.fails = lambda site, asked, number: (site, asked, number) == ("north", kind, 1)
    study.run()
    first = study.journal()[0]
    counts = set(COUNTS) - ({"north"} if kind != protocol.UNMASK else set())
    assert set(first["examples"]) == counts
    assert ("north" in first["refused"]) == (kind != protocol.UNMASK)
    assert study.adapter().fingerprint == study.plain({1: "north"} if kind != protocol.UNMASK else {})
    asked = [kind for kind, number in study.site("east").asked if number == 1 and kind != protocol.SHARE]
    if kind == protocol.TRAIN:  # one message more, where a mask key of the site that is gone is to be opened
        assert asked == [protocol.TRAIN, protocol.AGREE, protocol.UNMASK]
    else:
        assert asked == [protocol.TRAIN, protocol.UNMASK]


def test_a_site_that_signs_for_nothing_is_missed_by_nobody_and_under_the_threshold_the_same_sum_waits(
    tmp_path: Path,
) -> None:
    study = Study(tmp_path, secure_aggregation={"clip_norm": 50.0, "colluders": 0})
    study.fails = lambda site, asked, number: (
        (site, asked) == ("north", protocol.TRAIN) or ((site, asked, number) == ("west", protocol.AGREE, 1))
    )
    with pytest.raises(errors.QuorumMissed):
        study.run(rounds=1)
    assert not any(kind == protocol.UNMASK for site in study.sites for kind, _ in site.asked)
    study.fails = lambda site, asked, number: False
    study.run(rounds=1)
    assert [kind for kind, _ in study.site("east").asked].count(protocol.TRAIN) == 1
    assert set(study.journal()[0]["examples"]) == set(COUNTS) - {"north"}


DROPOUT_POINTS = ("secure-signatures-came", "secure-agreement-on-disk", "secure-shares-came", "secure-opening-on-disk")


@pytest.mark.parametrize("point", DROPOUT_POINTS)
@pytest.mark.parametrize("nth", [1, 2])
def test_whoever_is_killed_while_a_sum_without_one_site_is_agreed_on_the_adapter_is_the_same(
    study: Study, monkeypatch: pytest.MonkeyPatch, point: str, nth: int
) -> None:
    study.fails = lambda site, asked, number: (site, asked, number) == ("north", protocol.TRAIN, 1)
    left = [nth]

    def die(name: str) -> None:
        if name == point:
            left[0] -= 1
            if left[0] == 0:
                raise Killed(name)

    monkeypatch.setattr(storage, "fault_point", die)
    try:
        study.run()
    except Killed:
        study.run()
    assert left[0] <= 0 or nth == 2, "the point lies in the round"
    monkeypatch.undo()
    assert study.adapter().fingerprint == study.plain({1: "north"})


def test_a_sum_that_needs_every_survivor_is_opened_though_one_took_a_new_key_since(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened in its own session or never: whoever signed for it signs for no other sum of the round."""
    study.fails = lambda site, asked, number: (site, asked) == ("west", protocol.TRAIN)

    def die(name: str) -> None:
        if name == "secure-survivors-kept":
            raise Killed(name)

    monkeypatch.setattr(storage, "fault_point", die)
    with pytest.raises(Killed):
        study.run(rounds=1)
    monkeypatch.undo()
    study.keys["north"] = keys.make()
    public = {name: keys.public_text(key) for name, key in study.keys.items()}
    study.document = roster_document.make(keys.make(), "tiny", public)  # the sites hold the session's own too
    study.run(rounds=1)
    assert set(study.journal()[0]["examples"]) == set(COUNTS) - {"west"}


def test_under_the_least_number_nothing_opens_and_the_round_is_asked_anew_with_other_keys(study: Study) -> None:
    study.fails = lambda site, asked, number: asked == protocol.TRAIN and site in ("north", "south")
    with pytest.raises(errors.QuorumMissed):
        study.run()
    assert not any(kind == protocol.UNMASK for site in study.sites for kind, _ in site.asked)
    assert not list((study.folder / "server").rglob("*.masked"))
    first = {content["fedvfm"]["session"] for _, kind, content in study.sent if kind == protocol.SHARE}
    study.fails = lambda site, asked, number: False
    study.sent.clear()
    study.run()
    assert study.adapter().fingerprint == study.plain()
    assert not first & {content["fedvfm"]["session"] for _, kind, content in study.sent if kind == protocol.SHARE}


SERVER_POINTS = (
    "secure-session-kept",
    "update-kept",
    "secure-survivors-kept",
    "secure-shares-came",
    "between-checkpoint-and-journal",
)
SITE_POINTS = ("secure-session-on-disk", "secure-masked-on-disk", "secure-opening-on-disk")


@pytest.mark.parametrize("point", [*SERVER_POINTS, *SITE_POINTS])
@pytest.mark.parametrize("nth", [1, 3, 6])
def test_whoever_is_killed_at_whatever_step_the_adapter_is_the_same(
    study: Study, monkeypatch: pytest.MonkeyPatch, point: str, nth: int
) -> None:
    left = [nth]

    def die(name: str) -> None:
        if name == point:
            left[0] -= 1
            if left[0] == 0:
                raise Killed(name)

    monkeypatch.setattr(storage, "fault_point", die)
    try:
        study.run()
    except Killed:
        study.run()
    monkeypatch.undo()
    assert study.adapter().fingerprint == study.plain()
    for line in study.journal():
        assert set(line["examples"]) == set(COUNTS)


def test_nothing_plain_of_a_site_is_on_the_server_s_disk_or_travels(study: Study) -> None:
    updates: dict[str, state.SiteUpdate] = {}

    def change(kind: str, number: int, reply: Any) -> Any:
        if kind == "train":
            updates.setdefault(reply.site, reply)
        return reply

    for site in study.sites:
        site.change = change
    study.fails = lambda site, asked, number: asked == protocol.UNMASK  # the round stays open: all of it is on disk
    with pytest.raises(errors.QuorumMissed):
        study.run()
    kept = [path.read_bytes() for path in (study.folder / "server").rglob("*") if path.is_file()]
    sent = [record["numbers"].data for _, kind, content in study.sent for record in content.array_records.values()]
    assert len(list((study.folder / "server").rglob("*.masked"))) == len(sent) == 4
    for update in updates.values():
        for array in update.state.values():
            for data in _forms(array):
                assert not any(data in whole for whole in (*kept, *sent))
    assert not list((study.folder / "server").rglob("received/*.safetensors"))


def _forms(array: np.ndarray[Any, Any]) -> list[bytes]:
    """Parts of an array as they would lie in a file."""
    flat = array.reshape(-1)
    size = min(4, len(flat))
    return [np.ascontiguousarray(flat[:size].astype(form)).tobytes() for form in ("<f4", "<f8")]


def _unmask(study: Study, name: str, survivors: list[str], session: str) -> RecordDict:
    text = secure_messages.sum_text(consistency.of(session, COUNTS, survivors))
    task = protocol.Task(study.recipe, 1, secure=text)
    return secure_answers.unmask(study.site(name).own, task, lambda _: study.document)[0]


def _session(study: Study, number: int) -> str:
    return next(
        str(content["fedvfm"]["session"])
        for name, kind, content in study.sent
        if kind == protocol.TRAIN and content["fedvfm"]["round"] == number
    )


def test_a_round_is_opened_once_and_for_one_list(study: Study) -> None:
    study.run(rounds=1)
    session = _session(study, 1)
    again = _unmask(study, "east", sorted(COUNTS), session)
    told = next(content for name, kind, content in study.sent if (name, kind) == ("east", protocol.UNMASK))
    assert protocol.digest(again) == protocol.digest(told)
    for survivors in (["east", "north", "south"], ["east", "south", "west"]):
        with pytest.raises(errors.SecureAggregationError) as caught:
            _unmask(study, "east", survivors, session)
        assert caught.value.reason == "secure-opened"


def test_after_an_opening_no_other_session_of_the_round_is_begun(study: Study) -> None:
    """A second sum with one site fewer would give that site's update by subtraction."""
    study.run(rounds=1)
    (study.folder / "server" / "journal.jsonl").unlink()
    study.sent.clear()
    with pytest.raises(errors.QuorumMissed):
        study.run(rounds=1)
    assert not any(kind in (protocol.TRAIN, protocol.UNMASK) for _, kind, _ in study.sent)


def test_a_session_masks_one_vector(study: Study) -> None:
    study.fails = lambda site, asked, number: asked == protocol.UNMASK
    with pytest.raises(errors.QuorumMissed):
        study.run()
    site = study.site("east")
    agreed = secure_round.SecureRounds(numpy_sites.lock(study.recipe), study.document, study.folder / "server")
    start = numpy_sites.lock(study.recipe).adapter
    session = agreed._restore(1, start)
    assert session is not None
    text = secure_messages.inbox_text(session.session.id, session.inbox("east"))
    task = protocol.Task(study.recipe, 1, start, secure=text)
    update = protocol.decode_update(site.train(task))
    same = secure_answers.mask(site.own, "east", task, update)
    sent = next(content for name, kind, content in study.sent if (name, kind) == ("east", protocol.TRAIN))
    assert protocol.digest(same) == protocol.digest(sent)
    other = dataclasses.replace(update, num_examples=update.num_examples + 1)
    with pytest.raises(errors.SecureAggregationError) as caught:
        secure_answers.mask(site.own, "east", task, other)
    assert caught.value.reason == "secure-session"


def test_a_site_that_sent_nothing_opens_nothing(study: Study) -> None:
    study.fails = lambda site, asked, number: asked == protocol.TRAIN
    with pytest.raises(errors.QuorumMissed):
        study.run()
    session = next(str(content["fedvfm"]["session"]) for _, kind, content in study.sent if kind == protocol.SHARE)
    with pytest.raises(errors.SecureAggregationError) as caught:
        _unmask(study, "east", sorted(COUNTS), session)
    assert caught.value.reason == "secure-survivors"


def test_nothing_is_opened_of_sites_without_labels_alone_and_the_round_is_asked_anew(tmp_path: Path) -> None:
    """Opened, it would be the one sum of its round, which counts for nothing: no round would follow it."""
    study = Study(
        tmp_path,
        start="ab" * 32,
        data={"class_names": ["rest", "cell"], "augment": ["flip"]},
        unlabelled={"warmup_rounds": 0},
    )
    for site in study.sites:
        if site.name != "east":
            site.change = _without_labels
    study.fails = lambda site, kind, number: (site, kind) == ("east", protocol.TRAIN)
    with pytest.raises(errors.QuorumMissed, match="all without labels"):
        study.run(rounds=1)
    assert not any(kind in (protocol.AGREE, protocol.UNMASK) for kind, _ in study.site("north").asked)
    study.fails = lambda site, kind, number: False
    study.run(rounds=1)
    assert set(study.journal()[0]["examples"]) == set(COUNTS)


def _without_labels(kind: str, number: int, reply: Any) -> Any:
    return dataclasses.replace(reply, without_labels=True) if kind == "hello" else reply


def test_an_invented_peer_is_refused_by_every_site(study: Study) -> None:
    """A coordinator that lists sites of its own making has no sum: their names are in no approved document."""
    study.run(rounds=1)
    other = keys.make()
    public = {**study.document.keys, "zoo": keys.public_text(other)}
    forged = roster_document.make(keys.make(), "tiny", public)
    study.document = forged  # the coordinator's; the sites keep the one that was approved
    own = masking.Sessions(study.folder / "zoo", "zoo", lambda: other)
    site = SecureSite("zoo", examples=5)
    site.own, site.document, site.fails = own, forged, lambda *words: False
    study.sites.append(site)
    with pytest.raises(errors.QuorumMissed):
        study.run()
    assert not any(number == 2 and kind == protocol.TRAIN for kind, number in study.site("east").asked)


@pytest.mark.parametrize("wrong", ["low order", "not signed"])
def test_a_site_with_keys_that_nobody_takes_stops_no_round(study: Study, wrong: str) -> None:
    """With them in the session every other site would refuse it."""
    north = study.site("north")
    honest = north.own.advertised

    def bad(recipe: str) -> round_keys.Advertised:
        own = honest(recipe)
        if wrong == "not signed":
            return dataclasses.replace(own, signature="AAAA")
        bare = dataclasses.replace(own, mask=bytes(32))
        return dataclasses.replace(
            bare, signature=keys.sign(study.keys["north"], round_keys.signed_bytes(bare, recipe))
        )

    north.own.advertised = bad  # type: ignore[method-assign]
    study.run(rounds=1)
    assert set(study.journal()[0]["examples"]) == set(COUNTS) - {"north"}
    assert [kind for kind, _ in study.site("east").asked].count(protocol.SHARE) == 1


def test_keys_of_another_round_are_spent(study: Study) -> None:
    study.run(rounds=1)
    old = study.site("east").own.advertised(study.recipe.hash)
    study.run(rounds=2)
    assert study.site("east").own.advertised(study.recipe.hash) != old
    files = sorted(path.name for path in (study.folder / "east").iterdir())
    assert len([name for name in files if name.endswith(".session")]) == 1
    assert len([name for name in files if name.endswith(".opened")]) == 2
    assert all((study.folder / "east" / name).stat().st_mode & 0o077 == 0 for name in files)
