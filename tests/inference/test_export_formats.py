"""Each export loads where it says it does and computes the same."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from PIL import Image

import fedvfm
from fedvfm import errors
from fedvfm.config import licence
from fedvfm.inference import delivery, export, forms, graph, hub
from fedvfm.model import adapted_model
from fedvfm.state import checkpoint

Saver = Callable[..., Path]


def prepared(model: adapted_model.AdaptedModel, batch: int = 2) -> torch.Tensor:
    """Random prepared images in [0, 1]; not those the export checks itself with."""
    size = model.recipe.data.input_size
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(9))


def expected(model: adapted_model.AdaptedModel, image: torch.Tensor) -> torch.Tensor:
    """Logits, normalised by hand."""
    mean, std = (torch.tensor(one).reshape(1, 3, 1, 1) for one in (model.recipe.data.mean, model.recipe.data.std))
    with torch.no_grad():
        found: torch.Tensor = model((image - mean) / std)
    return found


@pytest.mark.parametrize("kind", ["lora", "norm", "bias", "full", "head-only"])
def test_hf_loads_with_the_stock_class(saved: Saver, tmp_path: Path, kind: str) -> None:
    adapter = saved("segmentation", kind)
    made = fedvfm.export_adapter(adapter, tmp_path / "hf")
    model, folder = fedvfm.load_adapter(adapter), tmp_path / "hf"
    assert made["class"] == "Dinov2Model"
    stock = transformers.Dinov2Model.from_pretrained(folder, local_files_only=True).eval()
    pixels = prepared(model) - 0.5
    with torch.no_grad():
        features = model.backbone.features(pixels, (model.backbone.depth,)).grids[-1].flatten(2).transpose(1, 2)
        found = stock(pixels).last_hidden_state[:, -features.shape[1] :]
    torch.testing.assert_close(found, features, rtol=1e-5, atol=1e-5)
    head = safetensors.torch.load_file(folder / "head.safetensors")
    assert {name: tuple(value.shape) for name, value in head.items()} == {
        name: tuple(value.shape) for name, value in model.head.named_parameters()
    }
    card = (folder / "README.md").read_text()
    assert 'Dinov2Model.from_pretrained("this folder")' in card
    assert "rest, cell, wall" in card
    assert set(made["files"]) == {"README.md", "config.json", "fedvfm.json", "head.safetensors", "model.safetensors"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.rglob("*"))
    assert str(tmp_path) not in (folder / "config.json").read_text()


def under(adapter: Path, folder: Path, name: str) -> Path:
    """A copy of an adapter that was saved where the licence of its backbone was known."""
    shutil.copytree(adapter, folder)
    path = folder / "fedvfm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"backbone_licence": licence.Licence.of(name).to_json()}))
    return folder


@pytest.mark.parametrize("form", ["hf", "onnx", "onnx-int8"])
def test_no_merged_model_of_weights_that_may_not_be_changed(saved: Saver, tmp_path: Path, form: str) -> None:
    adapter = under(saved(), tmp_path / "adapter", "CC-BY-NC-ND-4.0")
    with pytest.raises(errors.LicenceForbids, match=r"CC-BY-NC-ND-4.0 \(no-derivatives.*--format peft or monai"):
        fedvfm.export_adapter(adapter, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()
    with pytest.raises(errors.LicenceForbids):
        export.merge(fedvfm.load_adapter(adapter))


def test_no_peft_form_with_layers_of_weights_that_may_not_be_changed(saved: Saver, tmp_path: Path) -> None:
    adapter = under(saved("segmentation", "norm"), tmp_path / "adapter", "CC-BY-NC-ND-4.0")
    with pytest.raises(errors.LicenceForbids, match="Export --format monai, which leaves"):
        fedvfm.export_adapter(adapter, tmp_path / "out", "peft")
    again = export.save(fedvfm.load_adapter(adapter), tmp_path / "again", {})
    assert not (again / "adapter_model.safetensors").exists()
    assert "No PEFT form: it would hold changed layers" in (again / "README.md").read_text()
    lora = under(saved(), tmp_path / "lora", "CC-BY-NC-ND-4.0")
    assert fedvfm.export_adapter(lora, tmp_path / "peft", "peft")["format"] == "peft"


def test_every_export_carries_the_licence_of_the_backbone(saved: Saver, tmp_path: Path) -> None:
    model = fedvfm.load_adapter(under(saved(), tmp_path / "adapter", "CC-BY-NC-4.0"))
    text = "CC-BY-NC-4.0 (non-commercial)"
    adapter = export.save(model, tmp_path / "again", {})
    assert fedvfm.load_adapter(adapter).licence == model.licence
    for form, files in {"hf": ["model.safetensors"], "peft": ["adapter_model.safetensors"], "monai": []}.items():
        folder = tmp_path / form
        fedvfm.export_adapter(adapter, folder, form)
        assert f"backbone licence: {text}" in (folder / ("LICENSE" if form == "monai" else "README.md")).read_text()
        for name in files:
            with safetensors.safe_open(folder / name, framework="np") as file:
                assert file.metadata() == {"format": "pt", "fedvfm.backbone_licence": text}
    assert json.loads((tmp_path / "monai" / "configs" / "metadata.json").read_text())["fedvfm"]["backbone_licence"] == {
        "names": ["CC-BY-NC-4.0"], "limits": ["non-commercial"]}  # fmt: skip
    assert graph._facts(model)["fedvfm.backbone_licence"] == text


FAMILIES = {
    "vit": (transformers.ViTModel, transformers.ViTConfig),
    "dinov3": (transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig),
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
}


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("families"), {}
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    for name, (model, config) in FAMILIES.items():
        torch.manual_seed(3)
        model(config(**shape, patch_size=14, image_size=28)).save_pretrained(root / name)
        made[name] = root / name
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_hf_of_every_family(saved: Saver, families: dict[str, Path], tmp_path: Path, name: str) -> None:
    adapter = saved(backbone=families[name])
    made = fedvfm.export_adapter(adapter, tmp_path / "hf")
    assert made["class"] == FAMILIES[name][0].__name__
    card = (tmp_path / "hf" / "README.md").read_text()
    pooled = "add_pooling_layer" in inspect.signature(FAMILIES[name][0].__init__).parameters
    assert ('from_pretrained("this folder", add_pooling_layer=False)' in card) == pooled
    model = fedvfm.load_adapter(adapter)
    merged = delivery.folded(model)
    merged.backbone.model = FAMILIES[name][0].from_pretrained(tmp_path / "hf").eval()
    image = prepared(model)
    torch.testing.assert_close(expected(merged, image), expected(model, image), rtol=1e-5, atol=1e-5)


def test_folding_changes_nothing_of_the_model(saved: Saver) -> None:
    model = fedvfm.load_adapter(saved())
    image = prepared(model)
    before, fingerprint = expected(model, image), model.read().fingerprint
    merged = delivery.folded(model)
    assert not [name for name, _ in merged.backbone.named_modules() if "lora" in name]
    torch.testing.assert_close(expected(merged, image), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(expected(model, image), before)
    assert model.read().fingerprint == fingerprint


def run_onnx(path: Path, image: torch.Tensor) -> torch.Tensor:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the graph is run with onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def require_onnx() -> None:
    pytest.importorskip("onnxscript", reason="ONNX needs the extra onnx")
    pytest.importorskip("onnx", reason="ONNX needs the extra onnx")


@pytest.mark.slow
def test_onnx_computes_the_same_for_any_batch(saved: Saver, families: dict[str, Path], tmp_path: Path) -> None:
    require_onnx()
    import onnx

    adapter = saved(backbone=families["vit"])
    made = fedvfm.export_adapter(adapter, tmp_path / "onnx", "onnx")
    model, path = fedvfm.load_adapter(adapter), tmp_path / "onnx" / "model.onnx"
    assert made["batch"] == "free"
    for batch in (1, 5):
        image = prepared(model, batch)
        torch.testing.assert_close(run_onnx(path, image), expected(model, image), rtol=1e-4, atol=1e-4)
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(facts["fedvfm.class_names"]) == ["rest", "cell", "wall"]
    assert facts["fedvfm.adapter_fingerprint"] == made["fingerprint"]
    # The exporter would note every line of source it came from.
    assert b"site-packages" not in path.read_bytes()
    assert b".py" not in path.read_bytes()
    assert "float32 (B, 3, 28, 28)" in (tmp_path / "onnx" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "kind", "task"),
    [
        ("dinov2", "lora", "segmentation"),
        ("vit", "lora", "classification"),
        ("dinov3", "lora", "segmentation"),
        ("clip", "norm", "classification"),
        ("siglip", "bias", "segmentation"),
        ("vit", "adaptformer", "segmentation"),
        ("vit", "prompt-tokens", "segmentation"),
        ("unet", "full", "segmentation"),
    ],
)
def test_onnx_of_every_family_and_kind(
    saved: Saver, families: dict[str, Path], tmp_path: Path, backbone: str, kind: str, task: str
) -> None:
    require_onnx()
    adapter = saved(task, kind, {**families, "dinov2": None, "unet": "unet"}[backbone])
    made = fedvfm.export_adapter(adapter, tmp_path / "onnx", "onnx")
    model = fedvfm.load_adapter(adapter)
    image = prepared(model, 3)
    assert made["batch"] == "free"
    torch.testing.assert_close(
        run_onnx(tmp_path / "onnx" / "model.onnx", image), expected(model, image), rtol=1e-4, atol=1e-4
    )


def monai_workflow(folder: Path, **override: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai import bundle

        logging.getLogger("monai").setLevel(logging.ERROR)
        configs = folder / "configs"
        made = bundle.ConfigWorkflow(
            config_file=str(configs / "inference.json"),
            meta_file=str(configs / "metadata.json"),
            logging_file=False,
            workflow_type="inference",
            bundle_root=str(folder),
            **override,
        )
        made.initialize()
    return made


def test_monai_loads_and_runs_the_bundle(saved: Saver, tmp_path: Path) -> None:
    adapter = copied(saved(), tmp_path / "adapter")
    own = {path.name for path in adapter.iterdir()}
    for name in ("beside.safetensors", "global.safetensors", "verdict.json", "statement.json"):
        (adapter / name).write_text("a site's own, which lies beside an adapter and stays there")
    fedvfm.export_adapter(adapter, tmp_path / "bundle", "monai")
    assert {path.name for path in (tmp_path / "bundle" / "models" / "adapter").iterdir()} == own
    (tmp_path / "bundle").rename(tmp_path / "elsewhere")
    rows, columns = np.mgrid[:30, :40]
    (tmp_path / "in").mkdir()
    Image.fromarray((np.sin(rows / 3) * 100 + columns + 100).astype(np.uint8)).save(tmp_path / "in" / "a.png")
    folders = {"dataset_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "out")}
    workflow = monai_workflow(tmp_path / "elsewhere", **folders)
    model = fedvfm.load_adapter(adapter)
    image = prepared(model)
    with torch.no_grad():
        assert torch.equal(workflow.network_def(image), expected(model, image))
    assert workflow.check_properties() == []
    assert workflow.dataset == ["a"]
    workflow.run()
    fedvfm.predict(adapter, tmp_path / "in", tmp_path / "own")
    assert (tmp_path / "out" / "a.png").read_bytes() == (tmp_path / "own" / "a.png").read_bytes()


def test_a_bundle_of_channels_groups_the_files_of_a_case(saved: Saver, tmp_path: Path) -> None:
    adapter = saved(channels=["FLAIR", "T1w", "T2w"])
    fedvfm.export_adapter(adapter, tmp_path / "bundle", "monai")
    (tmp_path / "in").mkdir()
    planes = np.random.default_rng(0).integers(0, 255, (4, 30, 40), np.uint8)
    for number, plane in enumerate(planes):
        Image.fromarray(plane).save(tmp_path / "in" / f"a_{number:04d}.png")
    folders = {"dataset_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "out")}
    workflow = monai_workflow(tmp_path / "bundle", **folders, channels="3,1,2")
    assert workflow.dataset == ["a"]
    workflow.run()
    fedvfm.predict(adapter, tmp_path / "in", tmp_path / "own", channels="3,1,2")
    assert (tmp_path / "out" / "a.png").read_bytes() == (tmp_path / "own" / "a.png").read_bytes()
    about = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    named = {"0": "FLAIR", "1": "T1w", "2": "T2w"}
    assert about["network_data_format"]["inputs"]["image"]["channel_def"] == named
    assert "- channels, in this order: FLAIR, T1w, T2w" in (tmp_path / "bundle" / "docs" / "README.md").read_text()


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_monai_verifies_the_network_against_the_metadata(saved: Saver, tmp_path: Path, task: str) -> None:
    folder = tmp_path / "bundle"
    fedvfm.export_adapter(saved(task), folder, "monai")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai import bundle

        configs = folder / "configs"
        bundle.verify_net_in_out(
            net_id="network_def",
            meta_file=str(configs / "metadata.json"),
            config_file=str(configs / "inference.json"),
            device="cpu",
            bundle_root=str(folder),
        )
    about = json.loads((configs / "metadata.json").read_text())
    assert about["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "rest", "1": "cell", "2": "wall"}
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".md", ".safetensors", ""}, "nothing in it is a pickle or a program"


def test_a_bundle_refuses_a_changed_backbone(saved: Saver, tmp_path: Path) -> None:
    fedvfm.export_adapter(saved(), tmp_path / "bundle", "monai")
    weights = tmp_path / "bundle" / "models" / "backbone" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RuntimeError) as caught:
        _ = monai_workflow(tmp_path / "bundle").network_def
    assert isinstance(caught.value.__cause__, errors.WeightsError)
    assert "sha256" in str(caught.value.__cause__)


def test_a_bundle_of_the_unet_has_no_backbone_file(saved: Saver, tmp_path: Path) -> None:
    adapter = saved("segmentation", "full", "unet")
    made = fedvfm.export_adapter(adapter, tmp_path / "bundle", "monai")
    assert not [name for name in made["files"] if name.startswith("models/backbone")]
    model = fedvfm.load_adapter(adapter)
    image = prepared(model)
    with torch.no_grad():
        assert torch.equal(monai_workflow(tmp_path / "bundle").network_def(image), expected(model, image))


def test_peft_is_what_was_saved(saved: Saver, tiny_dino: Path, tmp_path: Path) -> None:
    adapter = saved()
    made = fedvfm.export_adapter(adapter, tmp_path / "peft", "peft")
    assert set(made["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "head.safetensors"}
    stock = transformers.Dinov2Model.from_pretrained(tiny_dino)
    tuned = peft.PeftModel.from_pretrained(stock, tmp_path / "peft").eval()
    model = fedvfm.load_adapter(adapter)
    pixels = prepared(model) - 0.5
    with torch.no_grad():
        features = model.backbone.features(pixels, (model.backbone.depth,)).grids[-1].flatten(2).transpose(1, 2)
        found = tuned(pixels).last_hidden_state[:, -features.shape[1] :]
    torch.testing.assert_close(found, features, rtol=1e-5, atol=1e-5)


def test_peft_is_made_of_an_adapter_that_a_coordinator_saved_without_the_backbone(saved: Saver, tmp_path: Path) -> None:
    adapter = copied(saved(), tmp_path / "adapter")
    fedvfm.export_adapter(adapter, tmp_path / "peft", "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors", "head.safetensors"):
        (adapter / name).unlink()
    fedvfm.export_adapter(adapter, tmp_path / "again", "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors", "head.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    assert "PeftModel.from_pretrained" in (tmp_path / "again" / "README.md").read_text()


# -- what an adapter's folder says beside its numbers ----------------------------------------------------------------


def copied(saved: Path, to: Path) -> Path:
    return Path(shutil.copytree(saved, to))


def test_what_lies_beside_the_adapter_is_made_again_of_its_numbers(saved: Saver, tmp_path: Path) -> None:
    adapter = copied(saved(), tmp_path / "adapter")
    head = safetensors.torch.load_file(adapter / "head.safetensors")
    safetensors.torch.save_file({name: value + 1 for name, value in head.items()}, adapter / "head.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 100 * settings["lora_alpha"]}))
    for form in ("hf", "peft"):
        fedvfm.export_adapter(adapter, tmp_path / form, form)
        found = safetensors.torch.load_file(tmp_path / form / "head.safetensors")
        assert all(torch.equal(value, head[name]) for name, value in found.items())
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text()) == settings


def test_the_recipe_hash_is_that_of_training_wherever_the_backbone_lies(
    saved: Saver, tiny_dino: Path, tmp_path: Path
) -> None:
    moved = copied(tiny_dino, tmp_path / "elsewhere")
    model = fedvfm.load_adapter(saved(), backbone=str(moved))
    trained = checkpoint.read(saved() / export.STATE)[2]["recipe"]
    again = export.save(model, tmp_path / "again", {})
    assert fedvfm.load_adapter(again).recipe_hash == trained
    assert f"recipe hash: `{trained}`" in (saved() / "README.md").read_text()
    assert model.recipe_hash == trained
    fedvfm.export_adapter(saved(), tmp_path / "hf", backbone=str(moved))
    assert f"recipe hash: `{trained}`" in (tmp_path / "hf" / "README.md").read_text()
    fedvfm.export_adapter(saved(), tmp_path / "monai", "monai", backbone=str(moved))
    about = json.loads((tmp_path / "monai" / "configs" / "metadata.json").read_text())
    assert about["fedvfm"]["recipe_hash"] == trained
    fedvfm.export_adapter(saved(), tmp_path / "peft", "peft", backbone=str(moved))
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_dino)


def test_an_adapter_trained_in_bfloat16_is_compared_in_full_precision(saved: Saver, tmp_path: Path) -> None:
    model = fedvfm.load_adapter(saved())
    model.precision = "bfloat16"
    adapter = export.save(model, tmp_path / "adapter", {})
    assert fedvfm.export_adapter(adapter, tmp_path / "hf")["difference"] < 1e-5
    assert fedvfm.export_adapter(adapter, tmp_path / "monai", "monai")["difference"] == 0.0
    image = prepared(model)
    with torch.no_grad():
        half, full = (delivery.Deliverable(one)(image) for one in (model, delivery.exact(model)))
    assert delivery.difference(half, full) > delivery.TOLERANCE
    assert model.precision == "bfloat16"


def test_a_bundle_takes_a_backbone_in_shards(saved: Saver, tiny_dino: Path, tmp_path: Path) -> None:
    stock = transformers.Dinov2Model.from_pretrained(tiny_dino)
    stock.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    adapter = saved(backbone=tmp_path / "shards")
    made = fedvfm.export_adapter(adapter, tmp_path / "bundle", "monai")
    assert "models/backbone/model.safetensors.index.json" in made["files"]
    assert made["difference"] == 0.0


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "kind", "backbone", "form", "words"),
    [
        ("segmentation", "full", "unet", "hf", "no model of transformers; use monai or onnx"),
        ("segmentation", "adaptformer", None, "hf", "adds parts"),
        ("segmentation", "bias", None, "peft", "no PEFT form"),
    ],
)
def test_a_kind_that_cannot_take_the_form(
    saved: Saver, tmp_path: Path, task: str, kind: str, backbone: str | None, form: str, words: str
) -> None:
    with pytest.raises(errors.ConfigError, match=words):
        fedvfm.export_adapter(saved(task, kind, backbone), tmp_path / "out", form)
    assert not list(tmp_path.iterdir()), "nothing half done stays"


def test_unknown_form_used_output_and_no_adapter(saved: Saver, tmp_path: Path) -> None:
    with pytest.raises(errors.UnknownName, match="nearest: 'onnx'"):
        fedvfm.export_adapter(saved(), tmp_path / "out", "onx")
    with pytest.raises(errors.CheckpointError, match="no adapter of this fedvfm"):
        fedvfm.export_adapter(tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(errors.OutputInUse, match="not empty"):
        fedvfm.export_adapter(saved(), tmp_path / "out")


def test_onnx_without_its_packages(saved: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedvfm.inference import graph

    monkeypatch.setattr(graph, "NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(errors.MissingExtra, match=r"needs no_such_package.*fedvfm\[onnx\]"):
        fedvfm.export_adapter(saved(), tmp_path / "out", "onnx")


def test_what_computes_something_else_is_not_delivered(
    saved: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: adapted_model.AdaptedModel) -> torch.nn.Module:
        merged: Any = merge(model)
        merged.layernorm.weight.data.add_(0.5)
        return merged  # type: ignore[no-any-return]

    merge = export.merge
    monkeypatch.setattr(export, "merge", wrong)
    with pytest.raises(errors.CheckpointError, match="does not compute what the adapter does"):
        fedvfm.export_adapter(saved(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_peft_form_of_other_numbers_is_refused(saved: Saver, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(saved(), mixed)
    name = hub.PEFT_FILES[1]
    stored = safetensors.torch.load_file(mixed / name)
    safetensors.torch.save_file({key: value + 1 for key, value in stored.items()}, mixed / name)
    with pytest.raises(errors.CheckpointError, match="does not hold this adapter's numbers"):
        fedvfm.export_adapter(mixed, tmp_path / "out", "peft")


def test_every_form_is_in_the_table() -> None:
    assert forms.TABLE.names() == ["hf", "monai", "onnx", "onnx-int8", "peft"]
