"""In a notebook's kernel a run shows bars that are changed in place, and a line a round."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from fedvfm.report import progress
from fedvfm.simulation.engines import live


class Cell:
    """What a notebook shows under a cell, as IPython.display has it."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def display(self, content: dict[str, str], *, raw: bool, display_id: bool) -> Cell:
        assert raw
        assert display_id
        self.shown.append(content)
        return self

    def update(self, content: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.shown.append(content)


def test_a_notebook_shows_bars_and_strangers_names_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = Cell()
    module: Any = types.ModuleType("IPython.display")
    module.display = cell.display
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    record = {"train": {"<b>": {"loss": 0.5, "num_examples": 4}}, "validation": {}}
    with live.watch(quiet=False) as tell:
        assert isinstance(tell, live.Live)
        tell("arm", name="federated", index=0, count=1, rounds=2, sites=1)
        tell("round", arm="federated", round=1, rounds=2, sites=["<b>"])
        tell("reply", arm="federated", round=1, phase="train", site="<b>", loss=0.5)
        tell("round-end", arm="federated", round=1, record=record)
    last = cell.shown[-1]
    assert '<progress value="1" max="2">' in last["text/html"]
    assert "federated round 1 &lt;b&gt; loss 0.500" in last["text/html"]
    assert "<b>" not in last["text/html"]
    assert "federated round 1 <b> loss 0.500 1 of 2" in last["text/plain"]
    assert "federated round 1: loss 0.500" in capsys.readouterr().err


def test_a_script_shows_no_bars() -> None:
    assert not progress.in_notebook()
