"""Where final adapters lie at a site."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedvfm.client import joining, verdicts
from fedvfm.trust import documents


@pytest.fixture
def where(tmp_path: Path) -> joining.State:
    about = joining.About(
        federation="trial", address="a.example:1", site="north", fingerprint="A", joined="2026-01-01T00:00:00Z"
    )
    return joining.State(tmp_path, about)


def verdict(recipe: str, fingerprint: str) -> verdicts.Verdict:
    return verdicts.Verdict(
        recipe=recipe,
        fingerprint=fingerprint,
        round=1,
        verdict=verdicts.PENDING,
        reason="policy",
        metric="dice",
        score=0.5,
        own=None,
        examples=3,
        time=documents.stamp(documents.now()),
    )


def keep(where: joining.State, found: verdicts.Verdict, folder: Path) -> None:
    verdicts.empty(folder)
    documents.write(folder / verdicts.VERDICT, found)


def test_adapters_whose_hashes_begin_alike_lie_apart(where: joining.State) -> None:
    both = [verdict("a" * 64, "b" * 63 + end) for end in "12"]
    for one in both:
        keep(where, one, verdicts.place(where, one))
    assert {one.fingerprint for one, _ in verdicts.kept(where)} == {one.fingerprint for one in both}


def test_one_that_an_earlier_release_kept_stays_where_it_is(where: joining.State) -> None:
    one = verdict("a" * 64, "b" * 64)
    old = where.folder / verdicts.FOLDER / f"{'a' * 12}-{'b' * 12}"
    keep(where, one, old)
    assert verdicts.place(where, one) == old
    decided = verdicts.decide(where, "b" * 12, accept=True)
    assert verdicts.kept(where) == [(decided, old)]


def test_one_damaged_verdict_hides_no_other(where: joining.State) -> None:
    """It stopped status, the list of adapters, and every final adapter that came."""
    good, bad = verdict("a" * 64, "b" * 64), verdict("a" * 64, "c" * 64)
    for one in (good, bad):
        keep(where, one, verdicts.place(where, one))
    (verdicts.place(where, bad) / verdicts.VERDICT).write_text("{")
    assert [one for one, _ in verdicts.kept(where)] == [good]
    assert [row["fingerprint"] for row in verdicts.to_json(where)] == [good.fingerprint]
    (told,) = verdicts.damaged(where)
    assert bad.name in told
    assert "is no strict JSON" in told
    keep(where, bad, verdicts.place(where, bad))  # it came again
    assert verdicts.damaged(where) == []


def test_what_was_declined_takes_no_place(where: joining.State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty adapters that the rules declined, and none was kept any more."""
    monkeypatch.setattr(verdicts, "MAX_KEPT", 2)
    mine = verdict("a" * 64, "0" * 64).model_copy(update={"verdict": verdicts.DECLINED, "reason": "person"})
    keep(where, mine, verdicts.place(where, mine))
    for number in range(1, 6):
        one = verdict("a" * 64, str(number) * 64)
        late = {"verdict": verdicts.DECLINED, "time": f"2030-01-01T00:00:0{number}Z"}
        keep(where, one.model_copy(update=late), verdicts.place(where, one))
        verdicts.forget_declined(where)
    left = [one.fingerprint[0] for one, _ in verdicts.kept(where)]
    assert left == ["0", "4", "5"], "what a person declined stays, or it would be asked for again"
    assert not verdicts.full(where)
    for number in (6, 7):
        keep(where, verdict("a" * 64, str(number) * 64), where.folder / verdicts.FOLDER / str(number))
    assert verdicts.full(where)
