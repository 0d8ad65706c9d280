"""A hospital whose GPU does not compute, on real processes: the coordinator gets one word, and a spare device helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedvfm.client.gate import policy
from fedvfm.server import status
from tests.deployment import two_hospitals

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]
GONE = "cuda:63"
"""No machine has so many."""
LONG_S = 900.0


def test_a_gpu_that_does_not_compute_is_one_word_until_a_spare_device_is_named(
    tiny: Any, tmp_path: Path, until: Callable[..., bool]
) -> None:
    with two_hospitals.enrolled(tiny, tmp_path, tiny.recipe.replace("rounds = 3", "rounds = 1")) as two:
        allowed = policy.accepting(policy.Facts.of(two.locked)).replace("units = 10", "units = 1")
        for site in two.names:
            two.settings(site).write_text(tiny.site(site) + allowed)
        well = two.settings("east").read_text()
        two.settings("east").write_text(f'device = "{GONE}"\n{well}')
        clients, server = two.start_clients(), two.start_server()

        def east() -> dict[str, Any]:
            row: dict[str, Any] = status.of(two.server)["sites"]["east"]
            return row

        assert until(lambda: east()["state"] == "device", LONG_S), two.said()
        assert east()["says"] == "has a GPU that does not compute"
        assert until(lambda: ": device, the GPU does not compute" in two.said(), LONG_S), "its people read why"
        words = {(row["peer"], row["reason"]) for row in two.server.audit.entries if row.get("kind") == "refusal"}
        assert words == {("east", "device")}
        assert until(lambda: GONE in log_of(two, "east"), LONG_S), "the site's own log names the device"
        kept = [path for path in two.server.folder.rglob("*") if path.is_file() and GONE.encode() in path.read_bytes()]
        assert kept == [], "the coordinator is told the word alone"
        assert not two.run.exists()

        # The executor ends with its device and the next one reads the file anew: nothing is started by hand.
        two.settings("east").write_text(f'device = "{GONE}"\nspare_devices = ["cpu"]\n{well}')
        assert until(lambda: server.poll() is not None, LONG_S), two.said()
        assert server.returncode == 0, two.said()
        assert [line["cohort"] for line in two.journal()] == [list(two.names)]
        assert all(client.poll() is None for client in clients.values())


def log_of(two: two_hospitals.Two, site: str) -> str:
    """What the executor of a site noted."""
    path = two.folder / site / "run" / "executor.log"
    return path.read_text() if path.exists() else ""
