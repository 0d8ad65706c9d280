"""What coding an update lost, in a folder that several processes share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedvfm.client.gate import held_adapters
from fedvfm.state import state

RECIPE, BASE = "ab" * 32, "cd" * 32


def lost(number: float) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    return {"head.weight": np.full((2, 2), number, dtype=np.float32)}


def test_a_worker_settles_its_own_site_s_residual_and_no_other_s(tmp_path: Path) -> None:
    """Another worker stands between proposing and settling: what it proposed is its own to settle."""
    ours, theirs = held_adapters.Residuals(tmp_path, at_once=True), held_adapters.Residuals(tmp_path)
    theirs.propose(RECIPE, "north", 1, BASE, lost(2.0))
    ours.propose(RECIPE, "east", 1, BASE, lost(1.0))
    assert ours.before(RECIPE, "east", 2)["head.weight"][0, 0] == 1.0
    assert ours.before(RECIPE, "north", 2) == {}
    theirs.settle(RECIPE, 1, BASE)
    assert ours.before(RECIPE, "north", 2)["head.weight"][0, 0] == 2.0
    assert not list(tmp_path.glob("*.proposed"))


def test_a_worker_finds_what_another_was_sent_of_every_rank(tmp_path: Path) -> None:
    """An adapter that was validated a moment ago is sent by its name alone, maybe to another worker."""
    theirs, ours = (
        held_adapters.Adapters(tmp_path, held_adapters.ADAPTERS),
        held_adapters.Adapters(tmp_path, held_adapters.ADAPTERS),
    )
    came = [
        state.AdapterState({"x.A": np.ones((rank, 2), dtype=np.float32)})
        for rank in range(1, held_adapters.ADAPTERS + 1)
    ]
    for adapter in came:
        theirs.keep(RECIPE, adapter)
    assert [ours.find(adapter.fingerprint) for adapter in came] == came
    theirs.keep(RECIPE, state.AdapterState({"x.A": np.zeros((1, 2), dtype=np.float32)}))
    assert len(list(tmp_path.glob("*.adapter"))) == held_adapters.ADAPTERS
