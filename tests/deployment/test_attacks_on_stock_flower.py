"""The same attacks on Flower as it comes: they are real, for there they do something."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from attacks import strangers, table, updates

pytestmark = pytest.mark.slow


def test_the_attacks_work_where_nothing_stops_them(tmp_path: Path) -> None:
    found = table.attack_stock(tmp_path)
    assert {*strangers.STRANGERS, *updates.LIES, *table.INSIDERS, "copied-invite"} == set(found)
    # If one of these changes, Flower closed a hole: the table in docs/security/attacks.md needs to say so.
    for name in ("control-list", "control-register", "runtime", "docs"):
        assert found[name] == "200: accepted"
    assert found["foreign-bundle"] == "200: accepted; its code ran at the site (canary)"
    assert found["instruction"].startswith("accepted")
    assert found["other-node-inside"].startswith("accepted")
    assert found["nan"] == "accepted: the global model is NaN"
    assert found["nan-metric"] == "accepted: the mean of the metric is NaN"
    assert found["many-examples"].startswith("accepted: the model moved by 1 ")
    for name in ("extra-arrays", "path-in-name", "pickled-array", "pickled-reply", "hundredfold"):
        assert found[name].startswith("the run ends for all")
    assert found["silent"] == f"{strangers.SILENT} still open"
    assert found["no-key"] == "401: refused"
    assert found["revoked-key"].startswith("412: refused")
    assert found["wrong-authority"] == "TLS: certificate refused"
