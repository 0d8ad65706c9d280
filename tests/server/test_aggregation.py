"""A round's intake: what comes out does not depend on which site answers first."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.server.rounds import aggregation, handshake
from fedvfm.state import factors, state

OUT, IN = 6, 9
LOSSES = {"east": 3.0e-7, "north": 0.7, "south": 1.0e9, "west": 0.1}


def manifest(rank: int, residual: int = 0) -> state.Manifest:
    rows = [state.ArraySpec("head.bias", (3,), "head")]
    for pair in ("block.00.q", "block.01.v"):
        rows.append(state.ArraySpec(f"{pair}.A", (rank, IN), "lora", "A", pair, 8.0 / rank))
        rows.append(state.ArraySpec(f"{pair}.B", (OUT, rank), "lora", "B", pair, 8.0 / rank))
        beside = zip(factors.residual_names(pair), ((residual, IN), (OUT, residual)), strict=True)
        rows.extend(state.ArraySpec(name, shape, factors.RESIDUAL) for name, shape in beside if residual)
    return state.Manifest.of(rows)


def residual(rule: str) -> int:
    """The rank of the residual that a rule needs; 0: none."""
    return 2 if rules.keeps_residual(rules.TABLE.get(rule)()) else 0


def updates(ranks: tuple[int, ...], spread: float, beside: int = 0) -> list[state.SiteUpdate]:
    """One a site; ``spread``: how far they differ from one another; ``beside``: rank of a zero residual."""
    found = []
    for number, (site, rank) in enumerate(zip(LOSSES, ranks, strict=True)):
        arrays = {}
        for spec in manifest(rank, beside):
            if spec.group == factors.RESIDUAL:
                arrays[spec.name] = np.zeros(spec.shape, np.float32)
                continue
            common = np.random.default_rng(7).standard_normal(spec.shape)
            own = np.random.default_rng(number).standard_normal(spec.shape)
            arrays[spec.name] = (common + spread * own).astype(np.float32)
        metrics = {"loss": LOSSES[site]}
        found.append(state.SiteUpdate(site, state.AdapterState(arrays), 10 + 7 * number, 1, "", metrics=metrics))
    return found


def joined(order: tuple[state.SiteUpdate, ...], rule: str, ranks: tuple[int, ...], weighting: str) -> tuple[str, str]:
    """Fingerprint of the aggregate, and the journal's line as it is written."""
    members = {
        site: handshake.Member(site, number, manifest(rank, residual(rule)), {})
        for number, (site, rank) in enumerate(zip(LOSSES, ranks, strict=True))
    }
    rows = manifest(max(ranks), residual(rule))
    start = state.AdapterState({spec.name: np.zeros(spec.shape, np.float32) for spec in rows})
    fold = aggregation.Fold(rules.TABLE.get(rule)(), list(members), members, weighting, rows, {}, start=start)
    for update in order:
        fold.take(update)
    made = fold.finish({"cohort": fold.sites})
    return made.adapter.fingerprint, json.dumps(made.record)


@pytest.mark.parametrize("weighting", ["examples", "uniform", "loss"])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize(
    ("rule", "ranks"), [*((rule, (4, 4, 4, 4)) for rule in rules.TABLE.names()), ("svd", (1, 4, 2, 3))]
)
def test_the_order_in_which_sites_answer_changes_no_bit(
    rule: str, ranks: tuple[int, ...], spread: float, weighting: str
) -> None:
    found = {
        joined(order, rule, ranks, weighting)
        for order in itertools.permutations(updates(ranks, spread, residual(rule)))
    }
    assert len(found) == 1


@pytest.mark.parametrize("rule", ["mean", "svd"])
def test_a_site_that_does_not_answer_holds_nobody_up(rule: str) -> None:
    ranks = (4, 4, 4, 4)
    made = updates(ranks, 1.0)
    results = set()
    for order in itertools.permutations(made[1:]):
        results.add(joined(order, rule, ranks, "loss"))
    ((_, line),) = results
    record: dict[str, Any] = json.loads(line)
    assert list(record["weights"]) == ["north", "south", "west"]
    assert sum(record["weights"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize("rule", ["mean", "svd"])
def test_nobody_answered(rule: str) -> None:
    with pytest.raises(errors.EmptyCohort):
        joined((), rule, (4, 4, 4, 4), "examples")
