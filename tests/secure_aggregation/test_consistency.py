"""A coordinator that tells each site a list of its own gets no text that enough survivors signed, and no mask key."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.client.gate import masking
from fedvfm.protocol import secure_messages
from fedvfm.secure_aggregation import consistency, masks, opening, participant
from fedvfm.secure_aggregation import session as sessions
from fedvfm.trust import keys

RECIPE, BASE, ROSTER = "a" * 64, "b" * 64, "c" * 64
Lists = Mapping[str, list[str]]


class Lying:
    """Sites with their own files; a coordinator that says to each what it likes; and what colluders sign for it."""

    def __init__(self, folder: Path, names: list[str], colluders: int, inboxes: Lists | None = None) -> None:
        self.names, inboxes = sorted(names), inboxes or {}
        self.keys = {name: keys.make() for name in self.names}
        self.own = {name: masking.Sessions(folder / name, name, lambda key=key: key) for name, key in self.keys.items()}
        members = tuple(self.own[name].advertised(RECIPE) for name in self.names)
        threshold = sessions.least_threshold(len(names), colluders)
        self.session = sessions.Session(RECIPE, 1, BASE, ROSTER, threshold, members)
        sessions.require(self.session, 3, colluders, names)
        self.dealt = {name: self.own[name].deal(self.session) for name in self.names}
        self.dealers = {name: sorted({*inboxes.get(name, self.names), name}) for name in self.names}
        rng = np.random.default_rng(0)
        self.plain = {name: rng.integers(0, 2**63, 9).astype(np.uint64) for name in self.names}
        self.sent = {name: self.mask(name) for name in self.names}

    def mask(self, name: str) -> masks.Numbers:
        inbox = {peer: self.dealt[peer].outbox[name] for peer in self.dealers[name] if peer != name}
        return self.own[name].mask(RECIPE, 1, BASE, self.session.id, inbox, self.plain[name], 3)

    def sum(self, survivors: list[str], dealers: list[str] | None = None) -> consistency.Sum:
        return consistency.of(self.session.id, dealers or self.names, survivors)

    def agree(self, name: str, asked: consistency.Sum) -> str:
        return self.own[name].agree(RECIPE, 1, asked, 3).signature

    def open(self, name: str, asked: consistency.Sum, signatures: Mapping[str, str]) -> participant.Revealed:
        return self.own[name].open(RECIPE, 1, asked, signatures, 3, lambda session: self.verified).revealed

    def verified(self, site: str, signature: str, text: bytes) -> bool:
        return site in self.keys and keys.verified(self.keys[site].public_key(), signature, text)

    def opened(self, asked: consistency.Sum, answers: Mapping[str, participant.Revealed]) -> masks.Numbers:
        total = np.add.reduce([self.sent[name] for name in asked.survivors])
        seals = {name: self.dealt[name].commitment for name in asked.dealers}
        return opening.opened(self.session, asked.dealers, asked.survivors, total, answers, seals)


def reason(error: pytest.ExceptionInfo[errors.SecureAggregationError]) -> str:
    return error.value.reason


SIX = ["u", "v1", "v2", "w1", "w2", "x"]
EIGHT = ["u", "v1", "v2", "v3", "v4", "w1", "w2", "w3"]
GONE = {f"v{own}": [f"v{peer}" for peer in range(1, 5) if peer != own] for own in range(1, 5)}
GONE |= {"w1": ["v1", "v2", "v3"], "w2": ["v2", "v3", "v4"], "w3": ["v1", "v4"]}
PLANS: dict[str, tuple[list[str], str, Lists, Lists]] = {
    "one of six, with one that helps": (
        SIX,
        "x",
        {"u": ["u", "x", "v1", "v2"]},
        {
            "w1": ["u", "w1", "w2", "x"],
            "w2": ["u", "w1", "w2", "x"],
            "v1": ["u", "v1", "w1", "w2", "x"],
            "v2": ["u", "v2", "w1", "w2", "x"],
        },
    ),
    "one of eight, and nobody helps": (
        EIGHT,
        "",
        {"u": ["u", "v1", "v2", "v3", "v4"]},
        {name: [peer for peer in EIGHT if peer not in gone] for name, gone in GONE.items()},
    ),
    "two of six, with one that helps and full inboxes": (
        ["a", "b", "c", "d", "e", "x"],
        "x",
        {},
        {
            "a": ["a", "b", "e", "x"],
            "b": ["a", "b", "c", "x"],
            "c": ["a", "b", "c", "x"],
            "d": ["a", "b", "d", "x"],
            "e": ["a", "b", "e", "x"],
        },
    ),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("signed", [True, False], ids=["signatures asked for", "at once"])
def test_unlike_lists_open_nothing(tmp_path: Path, plan: str, signed: bool) -> None:
    names, helper, inboxes, lists = PLANS[plan]
    lying = Lying(tmp_path, names, 1, inboxes)
    sums = {name: lying.sum(survivors) for name, survivors in lists.items()}
    texts: dict[consistency.Sum, dict[str, str]] = {asked: {} for asked in sums.values()}
    for name, asked in sums.items() if signed else ():
        texts[asked][name] = lying.agree(name, asked)
    for asked, signatures in texts.items():
        if helper:
            signatures[helper] = keys.sign(lying.keys[helper], asked.signed_bytes())
        # What it has of another text, and what the helper signs under another name, count for nothing.
        for site in asked.survivors:
            others = [own[site] for other, own in texts.items() if other != asked and site in own]
            signatures.setdefault(site, (others or list(signatures.values()) or ["AAAA"])[0])
    for name, asked in sums.items():
        with pytest.raises(errors.SecureAggregationError) as caught:
            lying.open(name, asked, texts[asked])
        assert reason(caught) == "secure-agreement"
    assert not list(tmp_path.rglob("*.opened"))


def test_a_site_signs_once_and_for_dealers_that_it_masked_with(tmp_path: Path) -> None:
    lying = Lying(tmp_path, SIX, 1, {"u": ["x", "v1", "v2"]})
    for asked in (lying.sum(["u", "v1", "v2", "x"]), lying.sum(["u", "v1", "w1", "x"], ["u", "v1", "v2", "w1", "x"])):
        with pytest.raises(errors.SecureAggregationError) as caught:
            lying.agree("u", asked)
        assert reason(caught) == "secure-survivors"
    first = lying.sum(["u", "v1", "w1", "w2", "x"])
    assert lying.agree("w1", first) == lying.agree("w1", first), "asked again, the same"
    for other in (["u", "v2", "w1", "w2", "x"], ["v1", "w1", "w2", "x"], SIX):
        with pytest.raises(errors.SecureAggregationError) as caught:
            lying.agree("w1", lying.sum(other))
        assert reason(caught) == "secure-opened"
        with pytest.raises(errors.SecureAggregationError) as caught:
            lying.open("w1", lying.sum(other), {})
        assert reason(caught) == "secure-opened"
    with pytest.raises(errors.SecureAggregationError) as caught:
        lying.own["w1"].deal(dataclasses.replace(lying.session, base="d" * 64))
    assert reason(caught) == "secure-opened", "nor another session of the round"


def test_without_a_dropout_no_signature_is_needed_and_the_one_sum_is_used_up(tmp_path: Path) -> None:
    lying = Lying(tmp_path, SIX, 1)
    whole = lying.sum(SIX)
    answers = {name: lying.open(name, whole, {}) for name in SIX}
    assert all(not own.masks for own in answers.values())
    assert np.array_equal(lying.opened(whole, answers), np.add.reduce(list(lying.plain.values())))
    with pytest.raises(errors.SecureAggregationError) as caught:
        lying.agree("w1", lying.sum(SIX[1:]))
    assert reason(caught) == "secure-opened"
    assert lying.verified("w1", lying.agree("w1", whole), whole.signed_bytes()), "for the same one it still signs"


def test_survivors_that_agreed_open_their_sum_and_too_few_do_not(tmp_path: Path) -> None:
    lying = Lying(tmp_path, SIX, 1)
    asked = lying.sum(SIX[1:])
    signatures = {name: lying.agree(name, asked) for name in asked.survivors}
    few = dict(list(signatures.items())[: lying.session.threshold - 1])
    stranger = keys.sign(keys.make(), asked.signed_bytes())
    gone = keys.sign(lying.keys["u"], asked.signed_bytes())  # u dropped out: it signs for nothing
    for more in ({}, {"w2": stranger}, {"u": gone}, {"nobody": stranger}, {"w2": "%é"}, {"w2": ""}):
        with pytest.raises(errors.SecureAggregationError) as caught:
            lying.open("v1", asked, {**more, **few})
        assert reason(caught) == "secure-agreement"
    answers = {name: lying.open(name, asked, signatures) for name in asked.survivors}
    plain = np.add.reduce([lying.plain[name] for name in asked.survivors])
    assert np.array_equal(lying.opened(asked, answers), plain)


def test_masks_of_sites_with_unlike_inboxes_do_not_cancel(tmp_path: Path) -> None:
    lying = Lying(tmp_path, SIX, 1, {"u": ["x", "v1", "v2", "w1"]})
    rest = lying.sum([name for name in SIX if name != "u"])
    signatures = {name: lying.agree(name, rest) for name in rest.survivors}
    answers = {name: lying.open(name, rest, signatures) for name in rest.survivors}
    plain = np.add.reduce([lying.plain[name] for name in rest.survivors])
    assert np.array_equal(lying.opened(rest, answers), plain), "those with one story have their sum"
    with_u = consistency.of(lying.session.id, SIX, SIX)
    seeds = {name: dataclasses.replace(own, seeds={**own.seeds, "u": b""}) for name, own in answers.items()}
    with pytest.raises(errors.SecureAggregationError) as caught:
        lying.opened(with_u, seeds)
    assert reason(caught) == "secure-opening"


def test_a_damaged_note_of_the_one_sum_lets_no_other_be_signed(tmp_path: Path) -> None:
    lying = Lying(tmp_path, SIX, 1)
    asked = lying.sum(SIX[1:])
    lying.agree("w1", asked)
    (path,) = (tmp_path / "w1").glob("*.agreed")
    assert path.stat().st_mode & 0o077 == 0
    path.write_text("{")
    with pytest.raises(errors.SecureAggregationError) as caught:
        lying.agree("w1", asked)
    assert reason(caught) == "secure-opened"


def test_a_sum_and_its_signatures_travel_as_they_are_and_nothing_else_is_read() -> None:
    asked = consistency.of("d" * 64, ["b", "a", "c"], ["c", "a"])
    signatures = {"a": base64.b64encode(bytes(96)).decode()}
    assert secure_messages.read_sum(secure_messages.sum_text(asked, signatures)) == (asked, signatures)
    good = secure_messages.sum_text(asked)
    for bad in (
        good.replace('["a","c"]', '["c","a"]'),
        good.replace('["a","c"]', '["a","a"]'),
        good.replace('"signatures":{}', '"signatures":[]'),
        good.replace('"signatures":{}', '"signatures":{"a":1}'),
        good.replace("d" * 64, "d"),
        good.replace("dealers", "others"),
    ):
        assert bad != good
        with pytest.raises((ValueError, TypeError, KeyError)):
            secure_messages.read_sum(bad)
