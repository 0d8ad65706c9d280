"""kill -9 at every line of the ledger: what left is always charged, and a round that is asked for again only once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).parent / "kill_driver.py"

POINTS = (
    "ledger-held",
    "ledger-set-kept",
    "ledger-reserved",
    "ledger-checked",
    "ledger-charged",
    *(f"line-half-written:{number}" for number in (1, 2)),
    *(f"line-written:{number}" for number in (1, 2)),
    *(f"file-{name}:{number}" for name in ("opened", "written", "synced", "renamed") for number in (1, 2)),
)


def drive(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FEDVFM_")}
    command = [sys.executable, str(DRIVER), arguments[0], str(tmp_path / "work"), *arguments[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_killed_at_every_fault_point(tmp_path: Path) -> None:
    assert drive(tmp_path, "points", "1", *POINTS) == {"killed": len(POINTS), "wrong": {}}


@pytest.mark.parametrize("what", ["lines", "mend"])
def test_killed_at_every_so_many_lines(tmp_path: Path, what: str) -> None:
    found = drive(tmp_path, what, "17")
    assert found["killed"] > 15
    assert found["wrong"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lines", "mend"])
def test_killed_at_every_line(tmp_path: Path, what: str) -> None:
    found = drive(tmp_path, what, "1")
    assert found["killed"] == found["lines"] > 200
    assert found["wrong"] == {}
