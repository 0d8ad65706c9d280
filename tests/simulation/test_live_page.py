"""The page of a simulation: what the run writes for it, and what is made of that and the journals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.runtime import page_server
from fedvfm.simulation import live_page
from fedvfm.storage import storage


def board(folder: Path, monkeypatch: pytest.MonkeyPatch) -> live_page.Board:
    monkeypatch.setattr(live_page, "EVERY_S", 0.0)
    told = live_page.Board(folder)
    told("note", text="2 workers of 1 thread each")
    told("note", text="Attention: few patients")
    told("arm", name="federated", index=0, count=2, rounds=2, sites=3)
    told("round", arm="federated", round=2, rounds=2, sites=["east", "north", "west"])
    told("reply", arm="federated", round=2, phase="train", site="east", loss=0.5)
    told("reply", arm="federated", round=2, phase="val", site="east", loss=None)
    told("reply", arm="unknown", round=2, phase="train", site="east", loss=None)
    return told


def test_what_the_run_says_and_what_its_journal_says(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = board(tmp_path, monkeypatch)
    content = live_page.content(tmp_path, tiny_run)
    assert content.title == "Boxes <tiny> & drawn: round 2 of 2"
    arm = content.data["arms"]["federated"]
    assert (arm["round"], arm["asked"], arm["answered"], arm["stage"]) == (2, 3, 1, "trains")
    assert "Attention: few patients" in content.parts["head"]
    assert "Boxes &lt;tiny&gt; &amp; drawn" in content.parts["head"]
    for words in ("1 of 3", "Training loss", "Validation Dice", "Every round (2)", "2 workers of 1 thread each"):
        assert words in "".join(content.parts.values())
    told("test", arm="federated", round=2, sites=[])
    told("finished", arm="federated", round=2, record={})
    assert live_page.content(tmp_path, tiny_run).data["arms"]["federated"]["stage"] == "finished"
    assert {path.name for path in tmp_path.iterdir()} == {live_page.FILE}


def test_before_the_run_has_a_folder(tmp_path: Path) -> None:
    content = live_page.content(tmp_path, tmp_path / "run")
    assert content.title == "simulation: begins"
    assert "No arm has begun yet" in content.parts["arms"]


def test_of_several_seeds_the_one_that_began_last_is_shown(tmp_path: Path) -> None:
    (tmp_path / "seeds.json").write_text("{}")
    assert live_page.current(tmp_path).path == tmp_path
    for seed in (1, 0):
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / "experiment.json").write_text("{}")
    assert live_page.current(tmp_path).path == tmp_path / "seed-0"


def test_a_disk_that_is_full_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*given: Any) -> None:
        raise errors.StorageError("no space left")

    monkeypatch.setattr(storage, "write_text", no_room)
    board(tmp_path, monkeypatch)


def test_its_process_and_folder_go_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_page.tempfile, "tempdir", str(tmp_path))
    with live_page.shown(tmp_path / "run", 0) as observer:
        (folder,) = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        observer("arm", name="federated", index=0, count=1, rounds=2, sites=3)
        assert json.loads((folder / live_page.FILE).read_text())["arms"]["federated"]["rounds"] == 2
        assert page_server.read_address(folder).port
    assert list(tmp_path.iterdir()) == []
