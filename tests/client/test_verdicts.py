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
