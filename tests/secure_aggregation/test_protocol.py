"""The protocol without a network: whoever drops out and when, the sum is the plain one to the bit, or nothing opens."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import errors
from fedvfm.secure_aggregation import masks, opening, participant, round_keys, shamir
from fedvfm.secure_aggregation import session as sessions
from fedvfm.trust import keys

NUMBERS = 37


@dataclass
class Site:
    """One site as it goes through a session."""

    name: str
    secrets: round_keys.Secrets
    numbers: masks.Numbers
    dealt: participant.Dealt | None = None
    held: Mapping[str, participant.Shares] = dataclasses.field(default_factory=dict)


@dataclass
class Play:
    """A whole session."""

    session: sessions.Session
    sites: dict[str, Site]

    @staticmethod
    def of(number: int, threshold: int, seed: int = 0) -> Play:
        rng = np.random.default_rng(seed)
        names = sorted(f"site {index}" for index in range(number))
        secrets = {name: round_keys.fresh() for name in names}
        members = tuple(round_keys.advertise(secrets[name], name, "a" * 64, lambda _: "") for name in names)
        session = sessions.Session("a" * 64, 1, "b" * 64, "c" * 64, threshold, members)
        numbers = {name: rng.integers(0, 2**64, NUMBERS, dtype=np.uint64) for name in names}
        return Play(session, {name: Site(name, secrets[name], numbers[name]) for name in names})

    def deal(self, dealers: Collection[str]) -> None:
        for name in dealers:
            site = self.sites[name]
            site.dealt = participant.deal(self.session, name, site.secrets)

    def pass_on(self, dealers: Collection[str], to: Collection[str]) -> None:
        for name in to:
            site = self.sites[name]
            assert site.dealt is not None
            inbox = {peer: self._dealt(peer).outbox[name] for peer in dealers if peer != name}
            site.held = participant.received(self.session, name, site.secrets, site.dealt, inbox)

    def masked(self, name: str, least: int = 3) -> masks.Numbers:
        site = self.sites[name]
        return participant.masked(
            self.session, name, site.secrets, self._dealt(name), set(site.held), site.numbers, least
        )

    def revealed(self, name: str, survivors: Collection[str], least: int = 3) -> participant.Revealed:
        return participant.revealed(self.session, name, self.sites[name].held, survivors, least)

    def plain(self, names: Collection[str]) -> masks.Numbers:
        return np.add.reduce([self.sites[name].numbers for name in names])

    def _dealt(self, name: str) -> participant.Dealt:
        dealt = self.sites[name].dealt
        assert dealt is not None
        return dealt

    def open(
        self, dealers: Collection[str], survivors: Collection[str], helpers: Collection[str]
    ) -> tuple[masks.Numbers, masks.Numbers]:
        """The opened sum, and the sum of masked numbers that it was opened from."""
        total = np.add.reduce([self.masked(name) for name in survivors])
        answers = {name: self.revealed(name, survivors) for name in helpers}
        seals = {name: self._dealt(name).commitment for name in dealers}
        return opening.opened(self.session, dealers, survivors, total, answers, seals), total


@st.composite
def dropouts(draw: st.DrawFn) -> tuple[int, int, list[str], list[str], list[str]]:
    number = draw(st.integers(3, 8))
    threshold = draw(st.integers(sessions.least_threshold(number, 0), number))
    names = [f"site {index}" for index in range(number)]
    dealers = sorted(draw(st.sets(st.sampled_from(names), min_size=max(3, threshold))))
    survivors = sorted(draw(st.sets(st.sampled_from(dealers), min_size=max(3, threshold))))
    helpers = sorted(draw(st.sets(st.sampled_from(survivors), min_size=threshold)))
    return number, threshold, dealers, survivors, helpers


@settings(deadline=None, max_examples=60)
@given(dropouts(), st.integers(0, 2**32))
def test_the_sum_is_the_plain_one_whoever_drops_out(
    case: tuple[int, int, list[str], list[str], list[str]], seed: int
) -> None:
    number, threshold, dealers, survivors, helpers = case
    play = Play.of(number, threshold, seed)
    play.deal(dealers)
    play.pass_on(dealers, dealers)
    found, total = play.open(dealers, survivors, helpers)
    assert np.array_equal(found, play.plain(survivors))
    assert not np.array_equal(total, found)
    with pytest.raises(errors.SecureAggregationError) as caught:
        play.open(dealers, survivors, helpers[: threshold - 1])
    assert caught.value.reason == "secure-opening"


def test_a_masked_vector_has_no_number_of_the_plain_one_and_masks_differ_each_time() -> None:
    play, again = Play.of(4, 3), Play.of(4, 3)
    for own in (play, again):
        own.deal(own.sites)
        own.pass_on(own.sites, own.sites)
    first, second = play.masked("site 0"), again.masked("site 0")
    assert not np.any(first == play.sites["site 0"].numbers)
    assert not np.any(first == second), "the same numbers in another session"


def test_one_of_the_two_shares_of_a_peer_and_never_both() -> None:
    play = Play.of(5, 3)
    play.deal(play.sites)
    play.pass_on(play.sites, play.sites)
    shares = play.revealed("site 0", ["site 0", "site 1", "site 3"])
    assert set(shares.seeds) == {"site 0", "site 1", "site 3"}
    assert set(shares.masks) == {"site 2", "site 4"}


@pytest.mark.parametrize(
    ("survivors", "least"),
    [
        (["site 0", "site 1"], 3),
        (["site 0", "site 1", "site 2"], 4),
        (["site 1", "site 2", "site 3"], 3),
        (["site 0", "site 0", "site 1", "site 2"], 3),
        (["site 0", "site 1", "nobody"], 3),
        ([], 3),
    ],
)
def test_nothing_is_revealed_for_a_list_that_is_none(survivors: list[str], least: int) -> None:
    play = Play.of(4, 3)
    play.deal(play.sites)
    play.pass_on(play.sites, play.sites)
    with pytest.raises(errors.SecureAggregationError) as caught:
        play.revealed("site 0", survivors, least)
    assert caught.value.reason == "secure-survivors"


def test_two_stories_about_a_dropout_open_no_single_site() -> None:
    """Half of the sites are told that site 0 sent, half that it did not: neither secret gets enough shares."""
    play = Play.of(6, sessions.least_threshold(6, 0))
    names = sorted(play.sites)
    play.deal(names)
    play.pass_on(names, names)
    without = [name for name in names if name != "site 0"]
    seeds = {name: play.revealed(name, names).seeds["site 0"] for name in names[:3]}
    opened = {name: play.revealed(name, without).masks["site 0"] for name in names[3:]}
    for shares in (seeds, opened):
        with pytest.raises(ValueError, match="needed"):
            shamir.combine({play.session.points[name]: share for name, share in shares.items()}, play.session.threshold)


def test_shares_of_another_session_are_refused() -> None:
    play = Play.of(4, 3)
    play.deal(play.sites)
    other = Play(dataclasses.replace(play.session, round=2), play.sites)
    site = play.sites["site 1"]
    assert site.dealt is not None
    inbox = {"site 0": play._dealt("site 0").outbox["site 1"]}
    with pytest.raises(errors.SecureAggregationError) as caught:
        participant.received(other.session, "site 1", site.secrets, site.dealt, inbox)
    assert caught.value.reason == "secure-shares"
    assert set(participant.received(play.session, "site 1", site.secrets, site.dealt, inbox)) == {"site 0", "site 1"}


@pytest.mark.parametrize("change", ["flipped", "short", "stranger", "own"])
def test_shares_that_were_changed_on_the_way_are_refused(change: str) -> None:
    play = Play.of(3, 2)
    play.deal(play.sites)
    data, sender = play._dealt("site 0").outbox["site 1"], "site 0"
    if change == "flipped":
        data = bytes([*data[:-1], data[-1] ^ 1])
    data = data[:-1] if change == "short" else data
    sender = {"stranger": "nobody", "own": "site 1"}.get(change, sender)
    site = play.sites["site 1"]
    assert site.dealt is not None
    with pytest.raises(errors.SecureAggregationError) as caught:
        participant.received(play.session, "site 1", site.secrets, site.dealt, {sender: data})
    assert caught.value.reason == "secure-shares"


def test_no_site_masks_for_fewer_peers_than_a_sum_needs() -> None:
    play = Play.of(4, 3)
    play.deal(play.sites)
    play.pass_on(["site 0", "site 1"], ["site 0"])
    with pytest.raises(errors.SecureAggregationError) as caught:
        play.masked("site 0")
    assert caught.value.reason == "secure-shares"


def _with_false_shares(
    play: Play, survivors: list[str], kind: str, liars: Collection[str]
) -> dict[str, participant.Revealed]:
    answers = {name: play.revealed(name, survivors) for name in survivors}
    for liar in liars:
        shares = dict(getattr(answers[liar], kind))
        for victim in shares:  # errors of one size could cancel, and X25519 sees no change of some bits
            shares[victim] = bytes([0, *np.random.default_rng(len(liar) + ord(liar[-1])).bytes(32)])
        answers[liar] = dataclasses.replace(answers[liar], **{kind: shares})
    return answers


@pytest.mark.parametrize("kind", ["seeds", "masks"])
@pytest.mark.parametrize("liars", [("site 0",), ("site 1", "site 3"), ("site 0", "site 1", "site 2")])
def test_false_shares_are_left_out_where_enough_are_true_and_else_give_no_sum(
    kind: str, liars: tuple[str, ...]
) -> None:
    play = Play.of(7, 4)
    names = sorted(play.sites)
    play.deal(names)
    play.pass_on(names, names)
    survivors = names[:6]
    answers = _with_false_shares(play, survivors, kind, liars)
    total = np.add.reduce([play.masked(name) for name in survivors])
    seals = {name: play._dealt(name).commitment for name in names}
    if len(liars) < 3:
        found = opening.opened(play.session, names, survivors, total, answers, seals)
        assert np.array_equal(found, play.plain(survivors))
        return
    with pytest.raises(errors.SecureAggregationError) as caught:
        opening.opened(play.session, names, survivors, total, answers, seals)
    assert caught.value.reason == "secure-opening"


def _session(number: int, threshold: int) -> sessions.Session:
    return Play.of(number, threshold).session


@pytest.mark.parametrize(
    ("number", "threshold", "least", "colluders"),
    [
        (2, 2, 3, 0),  # too few for any sum
        (4, 3, 5, 0),  # fewer than the recipe promises
        (4, 2, 3, 0),  # both secrets of a site could be asked for
        (6, 4, 3, 2),  # ... with two sites that help
        (4, 5, 3, 0),  # more than there are
    ],
)
def test_a_session_that_keeps_no_promise_is_refused(number: int, threshold: int, least: int, colluders: int) -> None:
    roster = [f"site {index}" for index in range(number)]
    session = dataclasses.replace(_session(number, min(threshold, number)), threshold=threshold)
    with pytest.raises(errors.SecureAggregationError) as caught:
        sessions.require(session, least, colluders, roster)
    assert caught.value.reason == "secure-session"


def test_a_session_with_a_stranger_a_twin_or_a_key_used_twice_is_refused() -> None:
    session = _session(4, 3)
    roster = {keys.site for keys in session.members}
    sessions.require(session, 3, 0, roster)
    twin = dataclasses.replace(session, members=(session.members[0], *session.members[:3]))
    copied = dataclasses.replace(session.members[1], mask=session.members[0].mask)
    same = dataclasses.replace(session, members=(session.members[0], copied, *session.members[2:]))
    for wrong, names in ((session, roster - {"site 2"}), (twin, roster), (same, roster)):
        with pytest.raises(errors.SecureAggregationError) as caught:
            sessions.require(wrong, 3, 0, names)
        assert caught.value.reason == "secure-session"


@pytest.mark.parametrize("half", ["channel", "mask"])
@pytest.mark.parametrize("low", [bytes(32), bytes([1, *bytes(31)]), b"\xec" + b"\xff" * 30 + b"\x7f"])
def test_a_key_that_agrees_on_one_secret_with_all_is_refused(half: str, low: bytes) -> None:
    session = _session(4, 3)
    weak = dataclasses.replace(session.members[1], **{half: low})
    wrong = dataclasses.replace(session, members=(session.members[0], weak, *session.members[2:]))
    with pytest.raises(errors.SecureAggregationError) as caught:
        sessions.require(wrong, 3, 0, [keys.site for keys in session.members])
    assert caught.value.reason == "secure-session"


def test_keys_that_the_site_did_not_sign_are_refused() -> None:
    own = {name: keys.make() for name in ("north", "south", "west")}

    def advertised(name: str, recipe: str, signer: str) -> round_keys.Advertised:
        return round_keys.advertise(round_keys.fresh(), name, recipe, lambda text: keys.sign(own[signer], text))

    def verified(site: str, signature: str, message: bytes) -> bool:
        return keys.verified(own[site].public_key(), signature, message)

    good = tuple(advertised(name, "a" * 64, name) for name in own)
    session = sessions.Session("a" * 64, 1, "b" * 64, "c" * 64, 2, good)
    sessions.require_signed(session, verified)
    for wrong in (advertised("west", "a" * 64, "north"), advertised("west", "f" * 64, "west")):
        with pytest.raises(errors.SecureAggregationError) as caught:
            sessions.require_signed(dataclasses.replace(session, members=(*good[:2], wrong)), verified)
        assert caught.value.reason == "secure-session"


def test_secrets_are_in_no_text() -> None:
    play = Play.of(3, 2)
    play.deal(play.sites)
    site = play.sites["site 0"]
    assert site.dealt is not None
    text = repr(site.secrets) + repr(site.dealt)
    for secret in (site.secrets.mask, site.dealt.seed, site.dealt.own.mask):
        assert secret.hex() not in text
        assert repr(secret) not in text


@settings(deadline=None, max_examples=50)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.data())
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, threshold: int, data: st.DataObject) -> None:
    points = list(range(1, data.draw(st.integers(threshold, 12)) + 1))
    shares = shamir.split(secret, threshold, points)
    chosen = data.draw(st.permutations(points))[:threshold]
    assert shamir.combine({point: shares[point] for point in chosen}, threshold) == secret
    if threshold > 1:
        with pytest.raises(ValueError, match="needed"):
            shamir.combine({point: shares[point] for point in chosen[1:]}, threshold)


def test_the_field_is_a_prime_one() -> None:
    assert all(pow(base, shamir.PRIME - 1, shamir.PRIME) == 1 for base in (2, 3, 5, 7, 11, 13))
    assert shamir.PRIME.bit_length() == 257
    assert shamir.split(b"\xff" * 32, 1, [1])[1][-32:] == b"\xff" * 32


@pytest.mark.parametrize("points", [[1, 1], [0, 1], [2**257, 1]])
def test_points_that_are_none_are_refused(points: list[int]) -> None:
    with pytest.raises(ValueError, match="points"):
        shamir.split(bytes(32), 2, points)


def test_a_mask_is_the_stream_of_the_standard() -> None:
    """RFC 7539, appendix A.1, test vector 1: the stream of a key and a nonce of zeros begins so."""
    numbers = np.zeros(8, dtype=np.uint64)
    masks.apply(numbers, bytes(32), 1)
    assert numbers.astype("<u8").tobytes().hex().startswith("76b8e0ada0f13d90405d6ae55386bd28")
    masks.apply(numbers, bytes(32), -1)
    assert not numbers.any()


@pytest.mark.parametrize("size", [0, 1, masks.CHUNK - 1, masks.CHUNK, 2 * masks.CHUNK + 3])
def test_a_mask_is_one_stream_over_all_chunks(size: int) -> None:
    key = bytes(range(32))
    whole, part = np.zeros(2 * masks.CHUNK + 3, dtype=np.uint64), np.zeros(size, dtype=np.uint64)
    masks.apply(whole, key, 1)
    masks.apply(part, key, 1)
    assert np.array_equal(whole[:size], part)
