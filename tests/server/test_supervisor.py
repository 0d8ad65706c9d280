"""What the supervisor does between two recipes; without processes."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.server import steering, supervisor


def test_a_full_disk_between_two_recipes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows is written down when there is room; the server and its sites stay up, and it is told once."""
    roster = tmp_path / "roster.jsonl"
    roster.touch()
    where: Any = SimpleNamespace(
        roster_path=roster, sites=dict, about=SimpleNamespace(recipe="a" * 64), finished=lambda recipe: True
    )
    control: Any = SimpleNamespace(nodes=list)
    left, notes = [2], []

    def settle(given: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise errors.StorageError("cannot write steering.json: No space left on device")
        return given

    monkeypatch.setattr(steering, "settle", settle)
    monkeypatch.setattr(supervisor, "_evaluation", lambda given: {"round": 3})
    run: Any = SimpleNamespace(process=object(), code=0)
    assert supervisor._until_done(where, run, control, threading.Event(), notes.append, False) == {"round": 3}
    assert notes == ["what follows cannot be written down yet: cannot write steering.json: No space left on device"]
