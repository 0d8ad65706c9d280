"""A licence of weights is stated once and known wherever they are used, and what nobody states changes no hash."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.backbones import convert, licences, record, table, weights
from fedvfm.cli import main
from fedvfm.config import licence, schema
from fedvfm.model import locking

NO_CHANGES = licence.Licence.of("CC-BY-NC-ND-4.0")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))


def make_recipe(name: str, **backbone: Any) -> schema.Recipe:
    values = {"backbone": {"name": name, **backbone}, "data": {"class_names": ["rest", "cell"], "input_size": [28, 28]}}
    return schema.parse(schema.Recipe, values, "recipe")


@pytest.mark.parametrize(
    ("name", "limits", "expected"),
    [
        ("CC-BY-NC-ND-4.0", (), ("no-derivatives", "non-commercial")),
        ("cc-by-nc-4.0", (), ("non-commercial",)),
        ("CC-BY-4.0", (), ()),
        ("LicenseRef-ND", (), ()),
        ("LicenseRef-MSRLA", ("research-only",), ("research-only",)),
        ("", (), ()),
    ],
)
def test_a_creative_commons_name_says_what_it_forbids(name: str, limits: tuple[str, ...], expected: Any) -> None:
    terms = licence.Licence.of(name, limits)
    assert terms.limits == expected
    assert bool(terms) is bool(name)
    assert licence.Licence.read(terms.to_json()) == terms


def test_two_sources_that_differ_both_count() -> None:
    both = licence.Licence.of("MIT") + licence.Licence.of("mit") + NO_CHANGES
    assert both.names == ("MIT", "CC-BY-NC-ND-4.0")
    assert str(both) == "MIT and CC-BY-NC-ND-4.0 (no-derivatives, non-commercial)"
    assert not both.taken_by(("MIT",))
    assert both.taken_by(("CC-BY-NC-ND-4.0", "mit"))
    assert not licence.Licence().taken_by(("MIT",))


@pytest.mark.parametrize(
    "values",
    [[], {"names": ["a b"], "limits": []}, {"names": [], "limits": ["all"]}, {"names": "MIT", "limits": []}, {}],
)
def test_other_values_are_no_licence(values: object) -> None:
    with pytest.raises(ValueError, match="no licence"):
        licence.Licence.read(values)


def test_the_table_knows_the_packages_and_hub_names() -> None:
    assert licences.known("litemedsam").names == ("Apache-2.0",)
    assert licences.known("dinov2-small-imgfocus").names == ("MIT",)
    assert licences.known("facebook/dinov2-small") == licences.known("dinov2-small")
    assert licences.known("hospital/other") == licence.Licence()
    assert all(not licence.faults(row.licence, row.limits) for row in weights.KNOWN.values())
    assert set(weights.KNOWN) <= set(table.TABLE)


def test_what_is_not_stated_changes_no_hash() -> None:
    plain = make_recipe("some/backbone")
    assert "licence" not in json.dumps(plain.model_dump(mode="json"))
    assert plain.hash != make_recipe("some/backbone", licence="MIT").hash
    with pytest.raises(errors.ConfigError, match="licence_limits"):
        make_recipe("some/backbone", licence_limits=["everything"])
    with pytest.raises(errors.ConfigError, match="licence"):
        make_recipe("some/backbone", licence="MIT\x1b[2J")


def test_an_import_states_it_for_recipes_locked_here(tiny_dino: Path) -> None:
    convert.bring(tiny_dino, "own", terms=NO_CHANGES)
    locked = locking.make(make_recipe("own"))
    assert locked.recipe.backbone.licence == "CC-BY-NC-ND-4.0"
    assert locked.recipe.backbone.licence_limits == ("no-derivatives", "non-commercial")
    # A recipe that says something itself is left as it is; what is known here counts beside it.
    other = locking.make(make_recipe("own", licence="MIT")).recipe.backbone
    assert (other.licence, other.licence_limits) == ("MIT", ())
    assert licences.of(other).names == ("MIT", "CC-BY-NC-ND-4.0")


def test_another_licence_for_the_same_file_needs_replace(tiny_dino: Path) -> None:
    convert.bring(tiny_dino, "own", terms=NO_CHANGES)
    convert.bring(tiny_dino, "own")
    convert.bring(tiny_dino, "own", terms=NO_CHANGES)
    with pytest.raises(errors.OutputInUse, match=r"with licence CC-BY-NC-ND-4.0 .*, not MIT. .*--replace"):
        convert.bring(tiny_dino, "own", terms=licence.Licence.of("MIT"))
    convert.bring(tiny_dino, "own", terms=licence.Licence.of("MIT"), replace=True)
    assert licences.known("own").names == ("MIT",)


def test_a_record_of_another_form_is_damage(tiny_dino: Path) -> None:
    convert.bring(tiny_dino, "own", terms=NO_CHANGES)
    path = weights.own_folder("own") / record.FILE
    path.write_text(path.read_text().replace("CC-BY-NC-ND-4.0", "one two"))
    with pytest.raises(errors.WeightsError, match="cannot be read"):
        record.read(path.parent)
    with pytest.raises(errors.WeightsError, match="cannot be read"):
        weights.locate(schema.BackboneConfig(name="own"))


def test_the_command_line_states_and_lists_it(
    tiny_dino: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedvfm", "weights", *words])
        with pytest.raises(SystemExit) as stop:
            main.main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    bring = ("import", str(tiny_dino), "--name", "own", "--licence")
    assert call(*bring, "LicenseRef-MSRLA", "--limit", "research-only")[0] == 0
    rows = {row["name"]: row["licence"] for row in json.loads(call("list", "--json")[1])}
    assert rows == {"own": "LicenseRef-MSRLA (research-only)"}
    code, _, said = call(*bring, "no licence", "--limit", "nothing")
    assert code == errors.ConfigError.exit_code
    assert "2 faults" in said
