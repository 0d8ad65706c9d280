"""What breaks at a site: a typed refusal for the coordinator, the site's own words for the researcher."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

import fedvfm
from fedvfm import errors
from fedvfm.client import app as client_app
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import sample as data
from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.simulation import run
from fedvfm.simulation.engines import in_process, ray
from fedvfm.simulation.results import site_errors


class Fragile:
    """Boxes at two sites; one training picture of the second breaks its reader in a way nobody foresaw."""

    info = data.SourceInfo("fragile", "segmentation", ("background", "box"), "none")

    def __init__(self, settings: schema.SourceConfig) -> None: ...

    def samples(self) -> list[data.Sample]:
        parts = ("train", "val", "test", "train")
        return [
            data.Sample(f"{site}-{number}", site=site, split=part)
            for site in ("east", "west")
            for number, part in enumerate(parts)
        ]

    def read(self, sample: data.Sample) -> data.Pixels:
        if sample.id == "west-3":
            raise ZeroDivisionError("Jane Doe")
        mask = np.zeros((28, 28), dtype=np.int64)
        mask[8:20, 8:20] = 1
        return data.Pixels((0.2 + 0.6 * mask[None]).astype(np.float32), mask)


def values(dino: Path) -> dict[str, Any]:
    return {
        "name": "fragile",
        "baselines": [],
        "data": {"source": "fragile"},
        "recipe": {
            "rounds": 1,
            "threads": 1,
            "backbone": {"name": str(dino)},
            "adapter": {"rank": 1, "layers": [3]},
            "data": {"class_names": ["background", "box"], "input_size": [28, 28]},
        },
    }


def test_an_unforeseen_error_at_a_site_is_one_clear_error(tiny_dino: Path, tmp_path: Path) -> None:
    fedvfm.register_source("fragile", Fragile, replace=True)
    with pytest.raises(errors.EngineError) as caught:
        run.simulate(values(tiny_dino), output=tmp_path / "run")
    said = str(caught.value)
    assert said.startswith("site 'west': ZeroDivisionError: Jane Doe. ")
    assert "FEDVFM_DEBUG=1" in said
    assert "--resume" in said
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not (tmp_path / "run" / "journal.jsonl").exists()


def test_with_a_quorum_the_run_goes_on_and_the_journal_holds_a_word(tiny_dino: Path, tmp_path: Path) -> None:
    fedvfm.register_source("fragile", Fragile, replace=True)
    own = {**values(tiny_dino), "server": {"quorum": 1}}
    run.simulate(own, output=tmp_path / "run")
    text = (tmp_path / "run" / "journal.jsonl").read_text()
    assert json.loads(text)["refused"] == {
        "west": {"reason": "site-error", "detail": "the site answered with an error"}
    }
    assert "Jane" not in text


def test_an_unforeseen_error_of_an_engine(tiny: Any, tmp_path: Path) -> None:
    from fedvfm.simulation import tables

    def broken(*_: Any) -> None:
        raise RuntimeError("no carrier")

    tables.ENGINES.add("test-broken", broken, replace=True)
    with pytest.raises(errors.EngineError, match=r"^engine 'test-broken': RuntimeError: no carrier\. .*--resume"):
        run.simulate({**tiny.values, "engine": "test-broken"}, output=tmp_path / "run")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, errors.Interrupted])
def test_who_stops_a_run_stops_it(stop: type[BaseException]) -> None:
    def site_of(context: Any) -> sites.Site:
        raise stop("now")

    seen = in_process.Errors()
    grid = in_process.InProcessGrid(client_app.make_client_app(site_of, report=seen), 1)
    with pytest.raises(stop):
        grid.send_and_receive([grid.create_message(message("query").content, "query.handshake", 100, "0")])
    assert seen.last is None


def message(kind: str) -> Message:
    recipe = schema.parse(schema.Recipe, {"backbone": {"name": "none"}, "data": {"class_names": ["a", "b"]}}, "recipe")
    return Message(protocol.encode_task(protocol.Task(recipe)), 100, kind)


def test_only_a_word_travels() -> None:
    def site_of(context: Any) -> sites.Site:
        raise ValueError("/data/Jane Doe")

    seen = in_process.Errors()
    grid = in_process.InProcessGrid(client_app.make_client_app(site_of, report=seen), 1)
    (reply,) = grid.send_and_receive([grid.create_message(message("query").content, "query.handshake", 100, "0")])
    assert protocol.error_word(reply) == "error"
    assert b"Jane" not in internals.serialise(reply)
    assert str(seen.last).startswith("node 100: ValueError: /data/Jane Doe. ")


def test_a_full_disk_keeps_its_own_remedy() -> None:
    full = site_errors.explain("site 'x'", OSError(errno.ENOSPC, "No space left on device", "/x/file"))
    assert isinstance(full, errors.StorageError)
    assert "cannot write /x/file: No space left on device. Free space" in str(full)
    ours = errors.DataError("mine")
    assert site_errors.explain("anywhere", ours) is ours


def test_actors_leave_errors_for_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = ray.VirtualNodes("{}", "", str(tmp_path), 1.0)
    assert site_errors.last(tmp_path) is None
    nodes.report("site 'east'", errors.DataError("first"))
    nodes.report("site 'west'", KeyError("second"))
    last = site_errors.last(tmp_path)
    assert type(last) is errors.EngineError
    assert str(last).startswith("site 'west': KeyError: 'second'. ")
    assert "Traceback" not in str(last)
    nodes.report("site 'east'", errors.DataError("third"))
    last = site_errors.last(tmp_path)
    assert type(last) is errors.DataError
    assert str(last) == "third"
    monkeypatch.setenv("FEDVFM_DEBUG", "1")
    try:
        raise KeyError("fourth")
    except KeyError as error:
        nodes.report("site 'east'", error)
    assert "Traceback" in str(site_errors.last(tmp_path))
