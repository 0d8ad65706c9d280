"""Layers that tie the images of a batch together, under a mechanism that bounds each: said before anybody trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fedvfm import errors
from fedvfm.client import privacy_report, site_file
from fedvfm.config import schema
from fedvfm.model import adapted_model, locking
from fedvfm.simulation import experiment
from fedvfm.tasks import segmentation
from fedvfm.tasks import table as tasks
from fedvfm.trust import locked_recipe, signed_documents

PRIVACY = {"mechanism": "record-level", "clip": 1.0, "noise_multiplier": 1.1, "delta": 1e-5}
SAID = "BatchNorm2d layers, which mix the images of a batch"


class Mixing(segmentation.Segmentation):
    """A third party's head."""

    def head(self, backbone: Any) -> nn.Module:
        return nn.Sequential(super().head(backbone), nn.BatchNorm2d(2))


@pytest.fixture(autouse=True)
def mixing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "segmentation" in tasks.TABLE
    monkeypatch.setitem(tasks.TABLE._entries, "segmentation", Mixing)


def values(folder: Path, **privacy: Any) -> dict[str, Any]:
    return {
        "rounds": 2,
        "backbone": {"name": str(folder)},
        "adapter": {"rank": 2},
        "data": {"class_names": ["rest", "box"], "input_size": [56, 56]},
        "aggregation": {"weighting": "uniform"},
        "privacy": {**PRIVACY, **privacy},
    }


def recipe(folder: Path, **privacy: Any) -> schema.Recipe:
    return schema.parse(schema.Recipe, values(folder, **privacy), "recipe")


def toml(folder: Path, path: Path) -> Path:
    tables = {"": {"rounds": 2}, **{key: one for key, one in values(folder).items() if key != "rounds"}}
    lines = []
    for table, rows in tables.items():
        lines += [f"[{table}]"] if table else []
        lines += [f"{key} = {value!r}".replace("'", '"') for key, value in rows.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("mechanism", ["record-level", "patient-level"])
def test_the_model_is_refused_where_it_is_built(tiny_dino: Path, mechanism: str) -> None:
    asked = recipe(tiny_dino, mechanism=mechanism)
    with pytest.raises(errors.ConfigError, match=SAID):
        adapted_model.AdaptedModel(asked, with_weights=False)
    (fault,) = adapted_model.examine(asked)[1]
    assert SAID in fault


def test_without_a_bound_on_each_image_it_is_as_good_as_any(tiny_dino: Path) -> None:
    assert adapted_model.examine(recipe(tiny_dino, mechanism="site-level"))[1] == []
    plain = schema.parse(schema.Recipe, {**values(tiny_dino), "privacy": {}}, "recipe")
    assert adapted_model.examine(plain)[1] == []


def site(folder: Path) -> Path:
    path = folder / "site.toml"
    path.write_text('name = "north"\n[data]\nsource = "nuclei"\n')
    return path


def test_whoever_locks_plans_reviews_or_simulates_is_told(tiny_dino: Path, tmp_path: Path, cli: Any) -> None:
    file = toml(tiny_dino, tmp_path / "recipe.toml")
    with pytest.raises(errors.ConfigError, match=SAID):
        locking.make(recipe(tiny_dino))
    for arguments in (
        ("recipe", "lock", file, "--output", tmp_path / "locked.json"),
        ("client", "review", file),
        ("privacy", "plan", file, "--samples", "200"),
    ):
        code, out, err = cli(*arguments)
        assert (code, SAID in err) == (errors.ConfigError.exit_code, True), (arguments, out, err)
    with pytest.raises(errors.ConfigError, match=SAID):
        site_file.read(site(tmp_path), file)  # as doctor and the check of the data read it
    simulated = {
        "name": "trial",
        "data": {"source": "nuclei"},
        "partition": {"kind": "iid", "sites": 2},
        "recipe": values(tiny_dino),
    }
    with pytest.raises(errors.ConfigError, match=SAID):
        experiment.examine(experiment.parse(simulated, "experiment"))


def test_a_recipe_that_another_release_locked_is_refused_in_review(
    tiny_dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setitem(tasks.TABLE._entries, "segmentation", segmentation.Segmentation)
        locked = locking.make(recipe(tiny_dino))
    (tmp_path / "recipe.json").write_text(signed_documents.to_text(locked))
    arrived = signed_documents.read(tmp_path / "recipe.json", locked_recipe.LockedRecipe, "recipe")
    with pytest.raises(errors.ConfigError, match=SAID):
        privacy_report.judge(arrived, site_file.read_site(site(tmp_path)))
    code, _, err = cli("client", "review", tmp_path / "recipe.json", "--policy", tmp_path / "site.toml")
    assert (code, SAID in err) == (errors.ConfigError.exit_code, True)


def test_a_recipe_of_which_no_model_can_be_made_is_told_in_its_own_words(
    tiny_dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    """A stranger may have locked whatever it likes: review builds a model only of what is sound."""
    monkeypatch.setitem(tasks.TABLE._entries, "segmentation", segmentation.Segmentation)
    locked = locking.make(recipe(tiny_dino))
    adapter = locked.recipe.adapter.model_copy(update={"parts": ("nose",)})
    unsound = locked.recipe.model_copy(update={"adapter": adapter})
    asked = locked.model_copy(update={"recipe": unsound, "hash": unsound.hash})
    (tmp_path / "recipe.json").write_text(signed_documents.to_text(asked))
    with pytest.raises(errors.ConfigError, match=r"recipe\.adapter\.parts.*nose"):
        privacy_report.judge(asked, site_file.read_site(site(tmp_path)))
    code, _, err = cli("client", "review", tmp_path / "recipe.json", "--policy", tmp_path / "site.toml")
    assert (code, "nose" in err) == (errors.ConfigError.exit_code, True)
