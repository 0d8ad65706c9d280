"""Lazy name tables: nothing is imported before it is asked for, and a wrong name says the nearest."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest

from fedvfm import errors, registry

FACES = [
    "fedvfm.backbones.table",
    "fedvfm.adapters.table",
    "fedvfm.tasks.table",
    "fedvfm.tasks.heads",
    "fedvfm.aggregators.table",
    "fedvfm.data.sources.table",
]


def table() -> registry.Table:
    return registry.Table(
        "test thing", {"json": "json:dumps", "broken": "no.such.module:thing", "join": "os.path:join"}
    )


def test_an_entry_is_resolved_on_first_use() -> None:
    import json

    made = table()
    assert made.names() == ["broken", "join", "json"]
    assert list(made) == made.names()
    assert made.get("json") is json.dumps
    assert made.get("json") is json.dumps


def test_nothing_is_imported_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_entry_of_a_test.py").write_text("thing = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = registry.Table("test thing", {"lazy": "lazy_entry_of_a_test:thing"})
    assert "lazy" in made
    assert "lazy_entry_of_a_test" not in sys.modules
    assert made.get("lazy") == 7
    assert "lazy_entry_of_a_test" in sys.modules


def test_a_wrong_name_says_the_known_and_the_nearest() -> None:
    with pytest.raises(
        errors.UnknownName, match=r"unknown test thing 'jsom'; known: broken, join, json; nearest: 'json'"
    ):
        table().get("jsom")
    assert table().fault("zzzzzz") == "unknown test thing 'zzzzzz'; known: broken, join, json"


def test_adding_and_replacing() -> None:
    made = table()
    made.add("mine", 3)
    assert made.get("mine") == 3
    with pytest.raises(errors.ConfigError, match="'mine' is already registered; pass replace=True"):
        made.add("mine", 4)
    made.add("mine", 4, replace=True)
    assert made.get("mine") == 4
    made.add("text", "os.path:basename")
    assert made.get("text")("/a/b") == "b"


def test_installed_packages_join_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real distribution folder on the path, as pip would leave it."""
    (tmp_path / "foreign_thing.py").write_text("value = 'foreign'\n")
    info = tmp_path / "foreign_thing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-thing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fedvfm.test_thing]\nforeign = foreign_thing:value\njson = foreign_thing:value\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    made = table()
    assert made.group == "fedvfm.test_thing"
    assert made.get("foreign") == "foreign"
    assert made.get("json") is not None
    assert made.get("json") != "foreign", "an installed package cannot take a name of ours"


@pytest.mark.parametrize("module", FACES)
def test_every_entry_of_our_tables_resolves(module: str) -> None:
    found = importlib.import_module(module).TABLE
    for name in found.names():
        assert callable(found.get(name)), name


def test_faces_lead_scripts_outside_to_what_they_use_most() -> None:
    from fedvfm import config
    from fedvfm.data import geometry, volumes
    from fedvfm.data.volumes import geometry as own
    from fedvfm.data.volumes import volumes as readers

    assert config.Recipe.__name__ == "Recipe"
    assert volumes.read_volume is readers.read_volume
    assert geometry is own
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = config.Nothing
