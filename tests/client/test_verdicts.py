"""Where final adapters lie at a site."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fedvfm.client import state_folder
from fedvfm.client.adoption import decisions
from fedvfm.config import policy
from fedvfm.trust import signed_documents


@pytest.fixture
def where(tmp_path: Path) -> state_folder.State:
    about = state_folder.About(
        federation="trial", address="a.example:1", site="north", fingerprint="A", joined="2026-01-01T00:00:00Z"
    )
    return state_folder.State(tmp_path, about)


def verdict(recipe: str, fingerprint: str) -> decisions.Verdict:
    return decisions.Verdict(
        recipe=recipe,
        fingerprint=fingerprint,
        round=1,
        verdict=decisions.PENDING,
        reason="policy",
        metric="dice",
        score=0.5,
        own=None,
        examples=3,
        time=signed_documents.stamp(signed_documents.now()),
    )


def keep(where: state_folder.State, found: decisions.Verdict, folder: Path) -> None:
    decisions.empty(folder)
    signed_documents.write(folder / decisions.VERDICT, found)


@pytest.mark.parametrize(
    ("score", "own", "word"),
    [
        *((0.5, 0.5, "accepted"), (0.3, 0.2, "declined"), (0.5, 0.7, "declined")),
        *((math.nan, 0.5, "declined"), (0.5, math.nan, "declined")),
        *((0.5, None, "declined"), (None, 0.5, "declined")),
    ],
)
def test_a_score_must_reach_what_the_policy_asks(score: float | None, own: float | None, word: str) -> None:
    rules = policy.FinalPolicy(accept="score", min_score=0.4, max_drop=0.1)
    assert decisions.judge(rules, score, lambda: own)[0] == word


def test_adapters_whose_hashes_begin_alike_lie_apart(where: state_folder.State) -> None:
    both = [verdict("a" * 64, "b" * 63 + end) for end in "12"]
    for one in both:
        keep(where, one, decisions.place(where, one))
    assert {one.fingerprint for one, _ in decisions.kept(where)} == {one.fingerprint for one in both}


def test_one_that_an_earlier_release_kept_stays_where_it_is(where: state_folder.State) -> None:
    one = verdict("a" * 64, "b" * 64)
    old = where.folder / decisions.FOLDER / f"{'a' * 12}-{'b' * 12}"
    keep(where, one, old)
    assert decisions.place(where, one) == old
    decided = decisions.decide(where, "b" * 12, accept=True)
    assert decisions.kept(where) == [(decided, old)]


def test_one_damaged_verdict_hides_no_other(where: state_folder.State) -> None:
    """It stopped status, the list of adapters, and every final adapter that came."""
    good, bad = verdict("a" * 64, "b" * 64), verdict("a" * 64, "c" * 64)
    for one in (good, bad):
        keep(where, one, decisions.place(where, one))
    (decisions.place(where, bad) / decisions.VERDICT).write_text("{")
    assert [one for one, _ in decisions.kept(where)] == [good]
    assert [row["fingerprint"] for row in decisions.to_json(where)] == [good.fingerprint]
    (told,) = decisions.damaged(where)
    assert bad.name in told
    assert "is no strict JSON" in told
    keep(where, bad, decisions.place(where, bad))  # it came again
    assert decisions.damaged(where) == []


def test_what_was_declined_takes_no_place(where: state_folder.State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty adapters that the rules declined, and none was kept any more."""
    monkeypatch.setattr(decisions, "MAX_KEPT", 2)
    mine = verdict("a" * 64, "0" * 64).model_copy(update={"verdict": decisions.DECLINED, "reason": "person"})
    keep(where, mine, decisions.place(where, mine))
    for number in range(1, 6):
        one = verdict("a" * 64, str(number) * 64)
        late = {"verdict": decisions.DECLINED, "time": f"2030-01-01T00:00:0{number}Z"}
        keep(where, one.model_copy(update=late), decisions.place(where, one))
        decisions.forget_declined(where)
    left = [one.fingerprint[0] for one, _ in decisions.kept(where)]
    assert left == ["0", "4", "5"], "what a person declined stays, or it would be asked for again"
    assert not decisions.full(where)
    for number in (6, 7):
        keep(where, verdict("a" * 64, str(number) * 64), where.folder / decisions.FOLDER / str(number))
    assert decisions.full(where)
