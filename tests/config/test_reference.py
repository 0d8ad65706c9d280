"""The reference: every key is explained, everything that is made of it is up to date, and names are found."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
import urllib.parse
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.cli import values
from fedvfm.config import reference, schema
from fedvfm.data import transforms
from fedvfm.data.sources import folder
from fedvfm.simulation import experiment
from fedvfm.survey import draft as survey_draft
from fedvfm.templates import drafts

ROOT = Path(__file__).parents[2]
TABLES = [table for root in reference.ROOTS for table in reference.tables(root)]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def schema_of(root: str) -> Any:
    return json.loads(drafts.text(f"{root}.schema.json"))


# -- every key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for table in TABLES for key in table.keys], ids=lambda key: key.path)
def test_every_key_says_what_it_means_and_when_to_change_it(key: reference.Key) -> None:
    assert key.meaning.endswith("."), "write below the field: (unit) Meaning. Change: when."
    assert key.change.endswith("."), "write below the field: (unit) Meaning. Change: when."
    assert key.type


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.path)
def test_every_table_says_what_it_is_for(table: reference.Table) -> None:
    assert table.meaning.endswith(".")


def test_pydantic_has_them_too() -> None:
    for model in reference.ROOTS.values():
        assert all(field.description for field in model.model_fields.values())


def test_they_are_there_without_docstrings() -> None:
    """``-OO`` removes docstrings; these are read from the source."""
    code = "from fedvfm.config import schema; print(schema.Recipe.model_fields['rounds'].description)"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "(rounds)" in done.stdout


def test_what_is_made_of_them_is_up_to_date(maker: ModuleType) -> None:
    old = [str(path.relative_to(ROOT)) for path, content in maker.files() if path.read_text("utf-8") != content]
    assert old == [], "run: python docs/make_reference.py"


def test_types_limits_and_defaults_are_the_models() -> None:
    rate, window, workers = (reference.find(path)[0] for path in (
        "recipe.optimiser.learning_rate", "recipe.data.window", "experiment.workers"
    ))  # fmt: skip
    assert isinstance(rate, reference.Key)
    assert rate.form == "number; above 0; default 0.001"
    assert isinstance(window, reference.Key)
    assert window.form == "text or list of two numbers (Hounsfield units); default none"
    assert isinstance(workers, reference.Key)
    assert workers.form.startswith("whole number or text (processes); at least 1, at most 1024 or ")


# -- finding -----------------------------------------------------------------------------------------------------------


def paths(word: str) -> list[str]:
    return [entry.path for entry in reference.find(word)]


def test_a_key_is_found_by_its_end() -> None:
    assert paths("recipe.optimiser") == paths("optimiser") == paths("[recipe.optimiser]") == ["recipe.optimiser"]
    assert paths("site.toml") == ["site"]
    assert paths("max_epsilon") == ["site.policy.privacy.max_epsilon"]
    assert "site.personal.learning_rate" in paths("learning_rate")
    assert paths("experiment.recipe.adapter.rank") == ["experiment.recipe.adapter.rank"]
    assert paths("recipe.task.options.sampling") == ["recipe.task.options"], "options are told where they stand"


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("recipe.optimizer", "recipe.optimiser"),
        ("recipe.optimiser.learnig_rate", "recipe.optimiser.learning_rate"),
        ("quorom", "server.quorum"),
        ("", "files:"),
        (".", "files:"),
    ],
)
def test_a_typo_is_told_the_nearest(word: str, near: str) -> None:
    with pytest.raises(errors.UnknownName, match=near) as caught:
        reference.find(word)
    assert caught.value.code == "unknown-name"


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", values.LISTS)
def test_every_name_of_a_list_is_explained(name: str) -> None:
    rows = values.LISTS[name][1]()
    assert rows
    assert all(rows.values()), [word for word, text in rows.items() if not text]


def test_lists_are_those_of_the_code() -> None:
    assert list(values.AUGMENTATIONS) == transforms.AUGMENTATIONS.names()
    assert set(values.LISTS["folder-options"][1]()) == set(folder.OPTIONS)
    assert set(values.LISTS["windows"][1]()) == set(schema.WINDOWS)
    codes = {str(kind.exit_code) for kind in errors.tree()} | {str(errors.NOT_READY)}
    assert set(values.LISTS["exit-codes"][1]()) == codes


# -- JSON schemas ------------------------------------------------------------------------------------------------------


def test_the_schemas_take_what_the_models_take_and_no_typo() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    files = {root: drafts.text(f"{root}.toml") for root in ("recipe", "site", "server")}
    files |= {"survey": survey_draft.text("segmentation", ["background", "lesion"], "CT")}
    files |= {"experiment": experiment.bundled()["brain-mri"].read_text()}
    for root, text in files.items():
        made = schema_of(root)
        jsonschema.Draft4Validator.check_schema(made)
        validator = jsonschema.Draft4Validator(made)
        assert list(validator.iter_errors(tomllib.loads(text))) == []
        assert list(validator.iter_errors(tomllib.loads(f"typo = 1\n{text}")))
    recipe = tomllib.loads(files["recipe"])
    validator = jsonschema.Draft4Validator(schema_of("recipe"))
    for table, key, wrong in (("optimiser", "learning_rate", 0), ("data", "fit", "x"), ("adapter", "dropout", 1.0)):
        assert list(validator.iter_errors(recipe | {table: recipe[table] | {key: wrong}})), key


def test_a_draft_names_its_schema() -> None:
    survey = survey_draft.text("classification", ["a", "b"])
    for root, text in (("server", drafts.server()), ("site", drafts.site("north")), ("survey", survey)):
        line = text.splitlines()[0]
        place = Path(urllib.parse.unquote(urllib.parse.urlparse(line.removeprefix("#:schema ")).path))
        assert place.name == f"{root}.schema.json"
        assert json.loads(place.read_text())["$schema"] == reference.DRAFT


# -- the verbs ---------------------------------------------------------------------------------------------------------


def test_explain(cli: Any) -> None:
    assert "recipe.optimiser.learning_rate: number; above 0; default 0.001" in cli("explain", "learning_rate").out
    answer = cli("explain", "mean", "--json")
    found = json.loads(answer.out)
    assert [entry["path"] for entry in found["entries"]] == ["recipe.data.mean"]
    assert [row["list"] for row in found["names"]] == ["rules"]
    assert "policy-refused" in cli("explain", "13").out
    assert "folder-options" in cli("explain", "site.data.options.layout").out
    assert set(json.loads(cli("explain", "--json").out)["lists"]) == set(values.LISTS)
    wrong = cli("explain", "windos")
    assert (wrong.code, "nearest list: 'windows'" in wrong.err) == (errors.UnknownName.exit_code, True)


def test_experiments_show(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(cli("experiments", "show", "cells").out)
    assert experiment.load(str(path)) == experiment.load("cells")
    resolved = json.loads(cli("experiments", "show", "cells", "--json").out)
    assert resolved["recipe"]["optimiser"]["warmup"] == schema.OptimiserConfig().warmup
    wrong = cli("experiments", "show", "cell")
    assert (wrong.code, "nearest: 'cells'" in wrong.err) == (errors.UnknownName.exit_code, True)
    assert set(json.loads(cli("experiments", "--json").out)) == set(experiment.bundled())
