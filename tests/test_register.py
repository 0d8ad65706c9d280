"""A researcher's own parts register from a notebook in a few lines, are validated by name, and run."""

from __future__ import annotations

import ast
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedvfm
from fedvfm import errors, seeding
from fedvfm.adapters import base as adapters
from fedvfm.adapters import table as adapter_table
from fedvfm.aggregators import mean
from fedvfm.aggregators import table as rule_table
from fedvfm.backbones import base as backbones
from fedvfm.backbones import table as backbone_table
from fedvfm.config import schema
from fedvfm.data import sample as data
from fedvfm.data.sources import table as source_table
from fedvfm.model import adapted_model
from fedvfm.simulation import baselines, experiment, tables
from fedvfm.simulation.results import summary
from fedvfm.state import state
from fedvfm.tasks import classification
from fedvfm.tasks import table as task_table

TABLES = (
    backbone_table.TABLE,
    adapter_table.TABLE,
    rule_table.TABLE,
    source_table.TABLE,
    task_table.TABLE,
    tables.BASELINES,
)


@pytest.fixture(autouse=True)
def _tables_as_before() -> Iterator[None]:
    kept = [dict(table._entries) for table in TABLES]
    yield
    for table, entries in zip(TABLES, kept, strict=True):
        table._entries = entries


# What a user writes in a notebook -----------------------------------------------------------------------------------


class Patches(backbones.Backbone):
    """Two convolutions over patches of four pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.sha256, self.pretrained, self.width, self.depth, self.patch = "my-patches", "", False, 8, 0, 4
        self.model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 8, 1))

    def taps(self, count: int) -> tuple[int, ...]:
        return (0,) * count

    def check_size(self, size: Any) -> list[str]:
        return (
            [f"recipe.data.input_size = {list(size)}: sides must be multiples of 4"]
            if any(side % 4 for side in size)
            else []
        )

    def projection(self, block: int, part: str) -> None:
        return None

    def wire_name(self, parameter: str) -> str:
        return f"patches.{parameter}"

    def features(self, pixels: torch.Tensor, taps: Any, prefix: Any = None) -> backbones.Features:
        grid = self.model(pixels)
        return backbones.Features(pixels, (grid,) * len(taps), grid.mean(dim=(2, 3)))


def my_backbone(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> Patches:
    with torch.device(device if with_weights else "meta"):
        return Patches()


class LastLayer(adapters.Adapter):
    """Trains the last convolution."""

    def inject(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> adapters.Injected:
        layer: Any = backbone.model[2]  # type: ignore[index]
        parameters = {f"patches.2.{name}": parameter for name, parameter in layer.named_parameters()}
        return adapters.Injected(
            tuple(state.ArraySpec(name, tuple(p.shape), "last") for name, p in parameters.items()), parameters
        )


class Smoothed(classification.Classification):
    """Cross entropy with smoothed labels."""

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, target, label_smoothing=0.1)


class HalfMean(mean.Mean):
    """The mean, and half of it."""

    def finish(self, acc: Any) -> Any:
        adapter, kept = super().finish(acc)
        return 0.5 * adapter, kept


class Squares:
    """Bright and dark squares at three sites."""

    def __init__(self, settings: schema.SourceConfig) -> None:
        self.info = data.SourceInfo("my-squares", "classification", ("dark", "bright"), "own")

    def samples(self) -> list[data.Sample]:
        return [
            data.Sample(f"{site}-{n}", label=n % 2, site=site) for site in ("east", "north", "west") for n in range(12)
        ]

    def read(self, sample: data.Sample) -> data.Pixels:
        noise = seeding.stream(0, sample.id).random((1, 16, 16))
        return data.Pixels((0.3 * noise + 0.6 * (sample.label or 0)).astype(np.float32))


def register_all() -> None:
    fedvfm.register_backbone("my-patches", my_backbone)
    fedvfm.register_adapter("last-layer", LastLayer)
    fedvfm.register_task("smoothed", Smoothed)
    fedvfm.register_rule("half-mean", HalfMean)
    fedvfm.register_source("my-squares", Squares)
    fedvfm.register_baseline(
        "twice", lambda what, sites: [baselines.Arm("twice", "twice", what.recipe, tuple(sites), tuple(sites))]
    )


VALUES: dict[str, Any] = {
    "name": "mine",
    "baselines": ["twice"],
    "data": {"source": "my-squares"},
    "recipe": {
        "rounds": 2,
        "threads": 1,
        "backbone": {"name": "my-patches"},
        "adapter": {"kind": "last-layer"},
        "task": {"kind": "smoothed"},
        "aggregation": {"rule": "half-mean"},
        "data": {"class_names": ["dark", "bright"], "input_size": [16, 16], "intensity": "none"},
        "optimiser": {"learning_rate": 0.05},
    },
}


# --------------------------------------------------------------------------------------------------------------------


def test_unregistered_names_are_all_named_at_once() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        experiment.examine(experiment.parse(VALUES, "experiment"))
    text = str(caught.value)
    for name in ("my-patches", "last-layer", "smoothed", "half-mean", "my-squares", "twice"):
        assert f"'{name}'" in text


def test_registered_names_are_valid() -> None:
    register_all()
    assert experiment.examine(experiment.parse(VALUES, "experiment")).device == "meta"
    wrong = {**VALUES, "recipe": {**VALUES["recipe"], "data": {**VALUES["recipe"]["data"], "input_size": [18, 16]}}}
    with pytest.raises(errors.ConfigError, match="sides must be multiples of 4"):
        experiment.examine(experiment.parse(wrong, "experiment"))


def test_registering_returns_the_thing_and_guards_names() -> None:
    assert fedvfm.register_rule("half-mean", HalfMean) is HalfMean
    with pytest.raises(errors.ConfigError, match="already registered; pass replace=True"):
        fedvfm.register_rule("half-mean", HalfMean)
    with pytest.raises(errors.ConfigError, match="already registered"):
        fedvfm.register_rule("mean", HalfMean)
    fedvfm.register_rule("half-mean", mean.Mean, replace=True)
    assert rule_table.TABLE.get("half-mean") is mean.Mean


class Nothing:
    """No rule, no source."""


@pytest.mark.parametrize(
    ("register", "name", "thing", "said"),
    [
        (fedvfm.register_rule, "none", Nothing, "Nothing has no method fold()"),
        (fedvfm.register_source, "none", Nothing, "Nothing has no method read()"),
        (fedvfm.register_task, "none", Nothing, "Nothing has no method loss()"),
        (fedvfm.register_adapter, "none", Nothing, "Nothing has no method inject()"),
        (fedvfm.register_baseline, "none", 7, "7 cannot be called"),
        (fedvfm.register_backbone, "my backbone", my_backbone, "letters, digits"),
        (fedvfm.register_source, "mine:really", Squares, "letters, digits"),
    ],
)
def test_what_cannot_be_used_is_refused_when_it_is_registered(register: Any, name: str, thing: Any, said: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        register(name, thing)
    assert said in str(caught.value)
    with pytest.raises(errors.ConfigError):
        experiment.examine(experiment.parse(VALUES, "experiment"))


def test_a_script_changes_values_plans_and_reads_frames(tmp_path: Path) -> None:
    register_all()
    changes = {"recipe.optimiser.batch_size": 2, "baselines": []}
    planned = fedvfm.plan(VALUES, rounds=1, overrides=changes)
    assert (planned["rounds"], list(planned["arms"])) == (1, ["federated"])
    results = fedvfm.simulate(VALUES, rounds=1, seeds=[0, 1], overrides=changes, output=tmp_path / "runs")
    assert [result.summary["seed"] for result in results] == [0, 1]
    values, samples = results[0].metrics, results[0].samples
    assert {"arm", "round", "split", "site", "metric", "value"} <= set(
        values[0] if isinstance(values, list) else values
    )
    assert len(samples) > 0
    assert "federated" in results[0]._repr_html_()
    compared = fedvfm.compare([tmp_path / "runs"])
    assert compared
    with pytest.raises(fedvfm.errors.ConfigError) as caught:
        fedvfm.plan(VALUES, overrides={"recipe.rounds.x": 1, "": 2})
    assert len(caught.value.faults) == 2


def test_the_page_of_own_parts_runs_as_it_is_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "own-parts.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    kinds = {"adapter", "backbone", "baseline", "rule", "source", "task"}
    assert {kind for kind in kinds if f"fedvfm.register_{kind}(" in "".join(blocks)} == kinds
    monkeypatch.chdir(tmp_path)
    exec("".join(blocks), {"__name__": "pasted"})
    assert set(ast.literal_eval(capsys.readouterr().out.splitlines()[-1])) == {"federated", "twice the learning rate"}


def test_rows_without_pandas_are_those_of_the_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "metrics.csv"
    path.write_text("arm,round,split,site,metric,value\nfederated,1,val,NA,dice,0.5\nfederated,1,val,2,hd95,\n")
    table = summary.frame(path)
    assert isinstance(table, pandas.DataFrame)
    monkeypatch.setitem(sys.modules, "pandas", None)
    rows = summary.frame(path)
    assert [row["site"] for row in rows] == list(table["site"]) == ["NA", "2"]
    assert rows[0]["value"] == table["value"][0] == 0.5
    assert math.isnan(rows[1]["value"])
    assert pandas.isna(table["value"][1])
    with pytest.raises(errors.CheckpointError):
        summary.frame(tmp_path / "nothing.csv")


def test_dir_shows_what_there_is() -> None:
    assert dir(fedvfm) == sorted(fedvfm.__all__)
    assert fedvfm.Recipe is schema.Recipe
    assert fedvfm.errors is errors


def test_an_own_backbone_and_adapter_make_a_model() -> None:
    register_all()
    recipe = experiment.parse(VALUES, "experiment").recipe
    model = adapted_model.AdaptedModel(recipe)
    locked = model.locked()
    meta = adapted_model.AdaptedModel(recipe, with_weights=False).locked()
    assert locked.manifest == meta.manifest
    assert locked.adapter == meta.adapter
    assert {spec.group for spec in model.manifest} == {"last", "head"}
    model.write(locked.adapter)
    assert model.read() == locked.adapter
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 2)
    assert model.frozen_blocks == 0


class Narrow(Patches):
    """Says a width that its grids do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 9


class Drawing(Patches):
    """Draws noise whenever it computes."""

    def features(self, pixels: torch.Tensor, taps: Any, prefix: Any = None) -> backbones.Features:
        return super().features(pixels + torch.rand_like(pixels), taps, prefix)


class Gridless(Patches):
    """Gives no grid, and no Features in the end."""

    def features(self, pixels: torch.Tensor, taps: Any, prefix: Any = None) -> Any:
        return pixels


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Narrow, "pooled of one image has shape (1, 8); (1, 9) is needed, since width = 9"),
        (Drawing, "the same image gave two different answers"),
        (Gridless, "features() returned Tensor"),
    ],
)
def test_an_own_backbone_is_held_to_its_word_before_it_trains(kind: type[Patches], said: str) -> None:
    register_all()
    fedvfm.register_backbone("my-patches", lambda *_, **__: kind(), replace=True)
    with pytest.raises(errors.ConfigError) as caught:
        adapted_model.AdaptedModel(experiment.parse(VALUES, "experiment").recipe)
    assert "my-patches" in str(caught.value)
    assert said in str(caught.value)


def test_a_function_that_returns_no_backbone_is_told_so_with_the_other_faults() -> None:
    register_all()
    fedvfm.register_backbone("my-patches", lambda *_, **__: 3, replace=True)
    with pytest.raises(errors.ConfigError) as caught:
        experiment.examine(experiment.parse(VALUES, "experiment"))
    assert "recipe.backbone: 'my-patches' was loaded as int" in str(caught.value)


def test_all_of_them_run_in_one_simulation(tmp_path: Path) -> None:
    register_all()
    result = fedvfm.simulate(VALUES, output=tmp_path / "run")
    arms = result.summary["arms"]
    assert set(arms) == {"federated", "twice"}
    assert set(arms["federated"]["sites"]) == {"east", "north", "west"}
    assert arms["federated"]["macro"] == arms["twice"]["macro"]
    again = fedvfm.simulate(VALUES, output=tmp_path / "again")
    assert again.summary["fingerprint"] == result.summary["fingerprint"]
    loaded = fedvfm.load_adapter(result.path / "adapter")
    assert loaded.read().fingerprint == result.summary["fingerprint"]
