"""The bundled SAM experiments and the script that makes the SAM-shaped weights, as far as seconds allow."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedvfm import errors
from fedvfm.backbones import convert, stored, weights
from fedvfm.backbones import table as backbones
from fedvfm.cli import main
from fedvfm.config import schema
from fedvfm.model import adapted_model
from fedvfm.simulation import experiment, plan, run

ROOT = Path(__file__).parents[2]
NUCLEI = Path(os.environ.get("FEDVFM_DATA") or ROOT.parent / "shared" / "data") / "nuclei"
needs_nuclei = pytest.mark.skipif(not NUCLEI.is_dir(), reason="the nuclei data are not here (FEDVFM_DATA)")


def script(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def shapes() -> Any:
    return script("drawn_shapes")


@pytest.fixture(scope="module")
def shaped(shapes: Any) -> Any:
    script("block")
    return script("sam_shaped")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_drawn_images_are_keyed_by_their_number(shapes: Any) -> None:
    drawn, again = shapes.Drawn(0, brains=False), shapes.Drawn(0, brains=False)
    found = [drawn.image(number) for number in range(8)]
    image, labels = again.image(5)
    np.testing.assert_array_equal(image, found[5][0])
    np.testing.assert_array_equal(labels, found[5][1])
    for image, labels in found:
        assert image.shape == (3, 256, 256)
        assert labels.shape == (256, 256)
        assert image.dtype == np.float32
        assert 0 <= image.min() < image.max() <= 1
        assert all((labels == number).sum() >= shapes.LEAST_PIXELS for number in shapes.objects(labels))
    assert sum(bool(shapes.objects(labels)) for _, labels in found) >= 6
    contrast = [
        np.sign(image.mean(axis=0)[labels > 0].mean() - image.mean(axis=0)[labels == 0].mean())
        for image, labels in found
    ]
    assert {-1.0, 1.0} <= set(contrast), "bright on dark and dark on bright"


def test_brain_slices_are_among_them(shapes: Any) -> None:
    pytest.importorskip("nilearn")
    drawn = shapes.Drawn(0)
    image, labels = drawn._slice(np.random.default_rng(0))
    assert image.shape == (3, 256, 256)
    assert set(np.unique(labels)) == {0, 1, 2}


@pytest.fixture(scope="module")
def dino() -> Any:
    """A random DINOv2 of the width and more blocks than the model takes."""
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 7, "num_attention_heads": 6, "patch_size": 16, "image_size": 256}
    made: Any = transformers.Dinov2Model(transformers.Dinov2Config(**shape))
    for name, value in made.named_parameters():
        torch.nn.init.normal_(value, 1.0 if name.endswith(("norm1.weight", "norm2.weight", "lambda1")) else 0.0, 0.05)
    return made.eval()


@torch.no_grad()
def test_the_encoder_computes_what_dinov2_does_without_its_class_token(shaped: Any, dino: Any) -> None:
    learner = shaped.Learner(1, 1, "cpu", dino, brains=False)
    pixels = torch.randn(2, 3, 256, 256)
    hidden = dino.embeddings(pixels)[:, 1:]
    for layer in dino.encoder.layer[:6]:
        hidden = layer(hidden)
    ours = learner.model.prefix(pixels, 6, ()).hidden
    torch.testing.assert_close(ours.flatten(1, 2), hidden, rtol=1e-3, atol=1e-3)
    assert float(ours.std()) > 0.1


def test_pretraining_goes_on_where_it_was_stopped(
    shaped: Any, dino: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shaped, "KEEP_EVERY", 1)
    at_once = shaped.Learner(2, 1, "cpu", dino, brains=False)
    losses = [at_once.step(), at_once.step()]
    assert np.isfinite(losses).all()
    first = shaped.Learner(2, 1, "cpu", dino, brains=False)
    first.step()
    first.save(tmp_path / "state.safetensors")
    second = shaped.Learner(2, 1, "cpu", dino, brains=False)
    second.load(tmp_path / "state.safetensors")
    assert second.step() == pytest.approx(losses[1], rel=1e-5)
    moved = 0
    for name, value in at_once.named.items():
        np.testing.assert_allclose(second.named[name].detach(), value.detach(), rtol=1e-4, atol=1e-6, err_msg=name)
        moved += int(not np.array_equal(first.named[name].detach(), value.detach()))
    assert moved > 0.7 * len(at_once.named)
    with pytest.raises(errors.CheckpointError, match="is of 2 steps of 1; remove it"):
        shaped.Learner(3, 1, "cpu", dino, brains=False).load(tmp_path / "state.safetensors")


def test_the_weights_are_known_to_verify_and_to_the_experiment(
    shaped: Any, dino: Any, tmp_path: Path, empty_cache: Path
) -> None:
    learner = shaped.Learner(1, 1, "cpu", dino, brains=False)
    learner.stock.save_pretrained(tmp_path / "made")
    located = convert.bring(tmp_path / "made", "sam-shaped")
    (found,) = stored.verify("sam-shaped")
    assert (found.state, found.detail) == ("good", f"sha256 {located.sha256}")
    chosen = schema.BackboneConfig(name="sam-shaped")
    here, known = (backbones.loader(chosen)(chosen, with_weights=given) for given in (True, False))
    assert here.sha256 == located.sha256
    assert here.parameters_total() == known.parameters_total()
    assert 11e6 < here.parameters_total() < 13e6
    assert (here.depth, here.width, here.wide) == (6, 384, (0, 1, 2, 3, 4, 5))
    assert here.check_size([256, 256]) == []


def test_without_weights_the_error_names_the_command(empty_cache: Path) -> None:
    chosen = schema.BackboneConfig(name="sam-shaped")
    for work in (weights.locate, stored.fetch):
        with pytest.raises(errors.WeightsError, match=r"Run: python benchmarks/sam_shaped\.py pretrain") as found:
            work(chosen)
        assert "weights fetch" not in str(found.value)


@needs_nuclei
def test_sam_nuclei_without_weights(empty_cache: Path, tmp_path: Path) -> None:
    what = experiment.load("sam-nuclei", [f'data.path="{NUCLEI}"'])
    assert "SAM-shaped, not SAM" in what.note
    with pytest.raises(errors.WeightsError, match=r"benchmarks/sam_shaped\.py pretrain"):
        run.simulate(what, output=tmp_path / "run")
    found = plan.plan(what, experiment.hospitals(what))
    assert found["backbone"]["name"] == "sam-shaped"
    assert found["trainable_parameters"] < 0.1 * found["backbone"]["parameters"]


@needs_nuclei
def test_sam_vit_b_can_be_planned_without_weights_or_gpu(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(empty_cache))
    main.app(["simulate", "sam-vit-b", "--dry-run", "--json", "--set", f'data.path="{NUCLEI}"'], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["trainable_parameters"] == 147_456 + 634_208
    assert found["backbone"]["parameters"] == 93_735_728
    assert found["share"] == pytest.approx(0.0083, abs=1e-4)
    a_site = found["bytes"]["per_round"]["up"] / len(found["sites"])
    assert a_site == pytest.approx(3.13e6, rel=0.01)


def test_the_four_arms_are_valid_recipes(shaped: Any) -> None:
    sizes = {}
    for arm, (_, sets) in shaped.ARMS.items():
        what = experiment.load("sam-nuclei", list(sets))
        made = adapted_model.AdaptedModel(what.recipe, with_weights=False)
        sizes[arm] = made.manifest.parameters
    assert sizes["default"] == sizes["lora-only"] + sizes["parts-only"]
    assert sizes["parts-only"] < sizes["decoder"]
    assert sizes["lora-only"] == 6 * 4 * 4 * 384


def test_the_table_says_what_came_out(shaped: Any) -> None:
    def row(macro: float, gap: float | None) -> dict[str, Any]:
        score = {"macro": macro, "low": macro - 0.02, "high": macro + 0.02}
        between = None if gap is None else {"mean": gap, "low": gap - 0.05, "high": gap + 0.05}
        return {"seeds": [0], "arms": {"federated": score}, "difference": between}

    worst = {"site": "fluo256", "value": 0.4}
    made = {
        "rounds": 8,
        "trainable_parameters": 10_000,
        "backbone": {"parameters": 4_000_000},
        "bytes": {"up": 1_000_000, "down": 2_000_000},
        "arms": {"federated": {"worst": worst}},
    }
    figures = {
        "arms": {"default": row(0.7, None), "lora-only": row(0.5, -0.2)},
        "runs": {"default": made, "lora-only": made},
        "pretraining": {"steps": 600, "batch": 6, "iou": {"box": 0.8, "one point": 0.6}},
    }
    text = "\n".join(shaped.lines(figures, "SAM-shaped, not SAM"))
    assert "SAM-shaped, not SAM" in text
    assert "| LoRA on q, v alone | 10,000 | 0.25% | 3.0 | 0.500 | 0.480 to 0.520 | -0.200 (-0.250 to -0.150) |" in text
    assert "falls 0.200 short of the default here" in text
    assert "0.80 after box, 0.60 after one point" in text
    figures["arms"]["lora-only"] = row(0.69, -0.01)
    assert "LoRA alone does not fall short of the default on this model (-0.010)" in "\n".join(
        shaped.lines(figures, "SAM-shaped, not SAM")
    )
