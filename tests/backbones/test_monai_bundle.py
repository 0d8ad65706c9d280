"""Networks of MONAI bundles: they compute what MONAI's do and train under the kinds that fit; no code of one runs."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedvfm import errors
from fedvfm.backbones import convert, monai_bundle, monai_network, table, weights
from fedvfm.client import site_file
from fedvfm.client.training import site as sites
from fedvfm.client.training import trainer
from fedvfm.config import schema
from fedvfm.model import adapted_model
from tests.client import private_site

UNET = {
    **{"_target_": "monai.networks.nets.UNet", "spatial_dims": 2, "in_channels": 3, "out_channels": 2},
    **{"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": ["INSTANCE", {"affine": True}]},
}
SEGRESNET = {
    **{"_target_": "SegResNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 3, "init_filters": 8},
    **{"blocks_down": [1, 2], "blocks_up": [1]},
}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))


def network(definition: dict[str, Any]) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.networks import nets

        values = {key: value for key, value in definition.items() if key != "_target_"}
        torch.manual_seed(1)
        model: torch.nn.Module = getattr(nets, definition["_target_"].rpartition(".")[2])(**values)
    return model.eval()


def bundle(folder: Path, definition: Any, arrays: dict[str, torch.Tensor] | None = None, form: str = "pt") -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "metadata.json").write_text('{"version": "0.1.0"}')
    values = {"imports": ["$import os"], "device": "$torch.device('cpu')", "network_def": definition}
    (folder / "configs" / "inference.json").write_text(json.dumps(values))
    arrays = network(definition).state_dict() if arrays is None else arrays
    if form == "pt":
        torch.save({"model": arrays}, folder / "models" / "model.pt")
    else:
        safetensors.torch.save_file(arrays, folder / "models" / "model.safetensors")
    return folder


def load(name: str, *, with_weights: bool = True) -> Any:
    chosen = schema.BackboneConfig(name=name)
    return table.loader(chosen)(chosen, with_weights=with_weights)


@pytest.mark.parametrize("definition", [UNET, SEGRESNET], ids=["UNet", "SegResNet"])
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_an_imported_network_computes_what_monai_does(tmp_path: Path, definition: dict[str, Any], form: str) -> None:
    located = convert.bring(bundle(tmp_path / "bundle", definition, form=form), "own-net")
    backbone, shapes = load("own-net"), load("own-net", with_weights=False)
    assert (backbone.sha256, backbone.config_sha256) == (located.sha256, located.config_sha256)
    assert shapes.config_sha256 == located.config_sha256
    pixels = torch.rand(2, 3, 30, 44)
    shown = pixels if definition["in_channels"] == 3 else pixels.mean(dim=1, keepdim=True)
    (grid,) = backbone.features(pixels, (0,)).grids
    assert grid.shape == (2, definition["out_channels"], 30, 44)
    sides = -30 % backbone._multiple, -44 % backbone._multiple
    padded = torch.nn.functional.pad(shown, (0, sides[1], 0, sides[0]), mode="replicate")
    with torch.no_grad():
        assert torch.equal(grid, network(definition)(padded)[..., :30, :44])
    assert convert.bring(tmp_path / "bundle", "own-net").sha256 == located.sha256, "again, from the same files"


def recipe(kind: str) -> schema.Recipe:
    values = {
        "backbone": {"name": "own-net"},
        "adapter": {"kind": kind},
        "data": {"class_names": ["background", "disc"], "input_size": [28, 28]},
        "optimiser": {"batch_size": 4, "learning_rate": 1e-2},
        "rounds": 2,
    }
    return schema.parse(schema.Recipe, values, "recipe")


@pytest.mark.parametrize("kind", ["full", "head-only"])
def test_it_trains_under_the_kinds_that_fit(tmp_path: Path, kind: str) -> None:
    convert.bring(bundle(tmp_path / "bundle", UNET), "own-net")
    private_site.write_images(tmp_path / "data", 0, 12)
    text = f'name = "north"\n[data]\nsource = "folder"\npath = "{tmp_path / "data"}"\n'
    (tmp_path / "site.toml").write_text(text)
    own = site_file.read_site(tmp_path / "site.toml")
    assert adapted_model.examine(recipe(kind))[1] == []
    model = adapted_model.AdaptedModel(recipe(kind))
    before = {name: value.clone() for name, value in load("own-net").model.state_dict().items()}
    update = trainer.train(model, sites.Site("north", site_file.hospital(own, recipe(kind))), model.initial(), 1)
    assert update.metrics["loss"] > 0
    moved = {name for name, array in update.state.items() if (array != model.initial()[name]).any()}
    assert any(name.startswith("head.") for name in moved)
    assert any(name.startswith("network.") for name in moved) == (kind == "full")
    assert model.locked().backbone_sha256 == model.backbone.sha256
    if kind == "head-only":
        assert all(torch.equal(value, before[name]) for name, value in model.backbone.model.state_dict().items())


@pytest.mark.parametrize("kind", ["lora", "norm", "bias", "prompt-tokens", "adaptformer"])
def test_kinds_that_do_not_fit_are_told(tmp_path: Path, kind: str) -> None:
    convert.bring(bundle(tmp_path / "bundle", UNET), "own-net")
    assert adapted_model.examine(recipe(kind))[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_target_": "os.system"}, "no other code is run"),
        ({"_target_": "monai.networks.nets.evil.UNet"}, "no other code is run"),
        ({"_target_": "monai.networks.nets.AttentionUnet"}, "no other code is run"),
        ({"_target_": "$__import__('os').system('touch hacked')"}, "no other code is run"),
        ({"channels": "$[4, 8]"}, "channels: expressions and references are not evaluated"),
        ({"channels": ["@channels", 8]}, "channels: expressions and references"),
        ({"act": {"_target_": "os.system"}}, "act: '_target_' is not evaluated"),
        ({"_requires_": "$print(1)"}, "_requires_: unknown argument"),
        ({"channels": [4, 10**9]}, "channels: a number over"),
        ({"channels": [4] * 65}, "channels: too long"),
        ({"channels": [[[[[[4]]]]]]}, "channels: nested deeper than 4"),
        ({"num_res_units": 65}, "num_res_units: a number over 64"),
        ({"out_channels": 0}, "out_channels: a whole number from 1"),
        ({"spatial_dims": 3}, "spatial_dims = 2"),
        ({"in_channels": 4}, "in_channels: 1 or 3"),
        ({"norm": "BATCH"}, "batch norm"),
        ({"strides": [2, 2, 2, 2]}, "takes no such arguments|arrays are not"),
        ({"strides": [0]}, "computes nothing of a picture"),
        (SEGRESNET | {"use_conv_final": False}, r"makes \(1, 8, 8, 8\) of a picture, not \(1, 3, 8, 8\)"),
        (SEGRESNET | {"blocks_down": [], "blocks_up": []}, "takes no such arguments|computes nothing"),
    ],
)
def test_what_is_no_plain_network_of_the_list_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = bundle(
        tmp_path / "bundle", change if "init_filters" in change else UNET | change, arrays={"a": torch.zeros(1)}
    )
    with pytest.raises(errors.WeightsError, match=said):
        convert.bring(folder, "own-net")
    assert not weights.in_cache("own-net")
    assert not (tmp_path / "hacked").exists()


def test_it_computes_the_same_in_training(tmp_path: Path) -> None:
    tracked = UNET | {"dropout": 0.5, "norm": ["INSTANCE", {"track_running_stats": True}], "strides": [[2, 3]]}
    convert.bring(bundle(tmp_path / "bundle", tracked), "own-net")
    backbone, pixels = load("own-net").train(), torch.rand(1, 3, 30, 44)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    first, second = (backbone.features(pixels, (0,)).grids[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (1, 2, 30, 44)
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("open('hacked', 'w').close()",))


def test_weights_that_are_a_program_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = bundle(tmp_path / "bundle", UNET)
    (folder / "models" / "model.pt").write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(errors.WeightsError, match="refused"):
        convert.bring(folder, "own-net")
    assert not (tmp_path / "hacked").exists()


def test_bundles_that_lack_a_part_are_told(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "bundle", UNET)
    with pytest.raises(errors.ConfigError, match="leave it out"):
        convert.bring(folder, "own-net", config=folder / "configs" / "metadata.json")
    (folder / "models" / "model.pt").unlink()
    with pytest.raises(errors.WeightsError, match="without models/model"):
        convert.bring(folder, "own-net")
    (folder / "configs" / "inference.json").unlink()
    with pytest.raises(errors.WeightsError, match="'network_def'"):
        monai_bundle.settings_of(folder)


def test_a_folder_that_was_changed_after_the_import_is_refused(tmp_path: Path) -> None:
    convert.bring(bundle(tmp_path / "bundle", UNET), "own-net")
    path = weights.own_folder("own-net") / "config.json"
    path.write_text(path.read_text().replace('"UNet"', '"os.system"'))
    with pytest.raises(errors.WeightsError, match="no other code is run"):
        load("own-net")
    assert monai_network.checked(UNET, "x")["_target_"] == "UNet"


@pytest.mark.parametrize("name", ["bundle:spleen", "bundle:/data/spleen"])
def test_a_bundle_named_by_its_folder_is_told_to_be_imported_first(name: str) -> None:
    with pytest.raises(errors.UnknownName, match=f"fedvfm weights import {name[7:]} --name NAME"):
        table.loader(schema.BackboneConfig(name=name))
