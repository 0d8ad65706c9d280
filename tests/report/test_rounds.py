"""Figures of rounds say what they show."""

from __future__ import annotations

import pytest

from fedvfm.report import rounds


@pytest.mark.parametrize(
    ("factor_error", "told", "not_told"),
    [(None, "under mixed ranks", "residual"), (0.2, "cut to the residual&#x27;s rank loses", "mixed ranks")],
)
def test_what_the_rule_lost_is_told_by_why_it_lost_it(factor_error: float | None, told: str, not_told: str) -> None:
    """Sites of one rank have a factor error too; what is lost then was cut from the residual."""
    journal = [{"round": 1, "factor_error": factor_error, "aggregate_error": 0.125}]
    figure = rounds._aggregate_error(journal)
    assert told in figure
    assert "At most 0.125" in figure
    assert not_told not in figure
