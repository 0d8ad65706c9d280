"""SAM 2 as its authors publish it: the arrays of single images become the stock model, and nothing else is taken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from fedvfm import errors
from fedvfm.backbones import convert, sam2, sam2_original, weights
from fedvfm.config import schema

MEMORY = {
    "maskmem_tpos_enc": (7, 1, 1, 4),
    "no_mem_pos_enc": (1, 1, 16),
    "no_obj_ptr": (1, 16),
    "no_obj_embed_spatial": (1, 4),
    "mask_downsample.weight": (1, 1, 4, 4),
    "obj_ptr_proj.layers.0.weight": (16, 16),
    "obj_ptr_tpos_proj.weight": (4, 16),
    "memory_attention.layers.0.self_attn.q_proj.weight": (16, 16),
    "memory_encoder.mask_downsampler.encoder.0.weight": (4, 1, 3, 3),
}
"""Arrays of SAM 2.1's published checkpoints that single images do not need; shapes are made small."""
THEIRS = (
    ("vision_encoder.backbone.patch_embed.projection.", "image_encoder.trunk.patch_embed.proj."),
    (r"vision_encoder.backbone.blocks.(\d+).layer_norm([12]).", r"image_encoder.trunk.blocks.\1.norm\2."),
    (r"vision_encoder.backbone.blocks.(\d+).mlp.proj_in.", r"image_encoder.trunk.blocks.\1.mlp.layers.0."),
    (r"vision_encoder.backbone.blocks.(\d+).mlp.proj_out.", r"image_encoder.trunk.blocks.\1.mlp.layers.1."),
    ("vision_encoder.backbone.", "image_encoder.trunk."),
    (r"vision_encoder.neck.convs.(\d+).", r"image_encoder.neck.convs.\1.conv."),
    ("no_memory_embedding", "no_mem_embed"),
    ("shared_image_embedding.positional_embedding", "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    ("prompt_encoder.mask_embed.conv1.", "sam_prompt_encoder.mask_downscaling.0."),
    ("prompt_encoder.mask_embed.layer_norm1.", "sam_prompt_encoder.mask_downscaling.1."),
    ("prompt_encoder.mask_embed.conv2.", "sam_prompt_encoder.mask_downscaling.3."),
    ("prompt_encoder.mask_embed.layer_norm2.", "sam_prompt_encoder.mask_downscaling.4."),
    ("prompt_encoder.mask_embed.conv3.", "sam_prompt_encoder.mask_downscaling.6."),
    ("prompt_encoder.", "sam_prompt_encoder."),
    ("mask_decoder.upscale_conv1.", "sam_mask_decoder.output_upscaling.0."),
    ("mask_decoder.upscale_layer_norm.", "sam_mask_decoder.output_upscaling.1."),
    ("mask_decoder.upscale_conv2.", "sam_mask_decoder.output_upscaling.3."),
    (r"mask_decoder.transformer.layers.(\d+).layer_norm(\d).", r"sam_mask_decoder.transformer.layers.\1.norm\2."),
    (r"mask_decoder.transformer.layers.(\d+).mlp.proj_in.", r"sam_mask_decoder.transformer.layers.\1.mlp.layers.0."),
    (r"mask_decoder.transformer.layers.(\d+).mlp.proj_out.", r"sam_mask_decoder.transformer.layers.\1.mlp.layers.1."),
    ("mask_decoder.transformer.layer_norm_final_attn.", "sam_mask_decoder.transformer.norm_final_attn."),
    (r"mask_decoder.(.+attn.+).o_proj.", r"sam_mask_decoder.\1.out_proj."),
    (r"mask_decoder.(.+(?:mlps.\d+|head)).layers.0.", r"sam_mask_decoder.\1.layers.1."),
    (r"mask_decoder.(.+(?:mlps.\d+|head)).proj_in.", r"sam_mask_decoder.\1.layers.0."),
    (r"mask_decoder.(.+(?:mlps.\d+|head)).proj_out.", r"sam_mask_decoder.\1.layers.2."),
    ("mask_decoder.", "sam_mask_decoder."),
)
"""Name in ``Sam2Model`` -> name in the authors' modules, written a second time."""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small encoder of the test's models is a published one."""
    monkeypatch.setitem(sam2_original.SHAPES, (8, (1, 2, 2, 1)), (1, (4,), (8, 4, 14, 7)))
    monkeypatch.setattr(sam2_original, "HEADS", 2)


def original(name: str) -> str:
    for ours, theirs in THEIRS:
        if re.match(ours, name):
            return re.sub(f"^{ours}", theirs, name)
    raise AssertionError(f"{name}: has no name in the authors' layout")


def published(folder: Path) -> dict[str, Tensor]:
    """The arrays of a stock model as the authors would have saved them."""
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    points = stored.pop("prompt_encoder.point_embed.weight")
    stored.pop("prompt_encoder.shared_embedding.positional_embedding", None)
    arrays = {original(name): value for name, value in stored.items()}
    arrays |= {f"sam_prompt_encoder.point_embeddings.{k}.weight": points[k : k + 1].clone() for k in range(4)}
    return arrays | {name: torch.zeros(shape) for name, shape in MEMORY.items()}


def opened(name: str) -> sam2.SegmentAnything2:
    made = sam2.load(schema.BackboneConfig(name=name))
    made.open_masks(4, 0)
    return made


def test_it_computes_what_the_stock_model_does(sam_folders: dict[str, Path], tmp_path: Path, small: None) -> None:
    file = tmp_path / "MedSAM2_latest.pt"
    torch.save({"model": published(sam_folders["sam2"])}, file)
    located = convert.bring(file, "medsam2")
    assert located.config["model_type"] == "sam2"
    ours, theirs = opened("medsam2"), transformers.Sam2Model.from_pretrained(sam_folders["sam2"]).eval()
    # The authors' code has one table for prompts and grid.
    theirs.prompt_encoder.shared_embedding.positional_embedding = theirs.shared_image_embedding.positional_embedding
    stored = theirs.state_dict()
    assert {name for name, _ in ours.model.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    assert all(torch.equal(value, stored[name]) for name, value in ours.model.state_dict().items())
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [10.0, 2.0, 60.0, 30.0]])
    theirs.mask_decoder.dynamic_multimask_via_stability = False
    with torch.no_grad():
        expected = theirs(pixel_values=image, input_boxes=boxes[:, None], multimask_output=True)
        features = ours.prompted(image, (ours.depth,), None, [ours_boxes(boxes)] * 4)
    assert features.masks is not None
    torch.testing.assert_close(features.masks[:, 2:], expected.pred_masks[:, 0], rtol=1e-4, atol=1e-4)


def ours_boxes(boxes: Tensor) -> Any:
    from fedvfm.backbones import base

    return base.Prompts(boxes=boxes)


def test_settings_of_the_published_encoders_are_the_tables() -> None:
    """Of every published encoder the shapes give the configuration that the table states."""
    for name in ("sam2-hiera-tiny", "sam2-hiera-small", "sam2-hiera-base-plus", "sam2-hiera-large"):
        with torch.device("meta"):
            _, config = sam2.shape(weights.KNOWN[name].config)
            stock = transformers.Sam2Model(config)
        shapes = {}
        for parameter, value in stock.state_dict().items():
            if parameter == "prompt_encoder.point_embed.weight":
                row = (1, value.shape[1])
                shapes |= {f"sam_prompt_encoder.point_embeddings.{index}.weight": row for index in range(4)}
            elif parameter != "prompt_encoder.shared_embedding.positional_embedding":
                shapes[original(parameter)] = tuple(value.shape)
        assert sam2_original.recognise(shapes)
        made = sam2.shape(sam2_original.settings(shapes))[1]
        wanted, given = config.to_dict(), made.to_dict()
        for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
            assert given[part] == wanted[part], (name, part)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_encoder.trunk.blocks.0.adapter.weight": (2, 2)}, r"no place for \(first: .*blocks.0.adapter.weight"),
        ({"sam_mask_decoder.extra.weight": (2, 2)}, "no place for"),
        ({"image_encoder.trunk.blocks.6.norm1.weight": (64,)}, "lacks"),
    ],
)
def test_a_part_that_is_not_known_is_refused(
    sam_folders: dict[str, Path], tmp_path: Path, small: None, change: dict[str, Any], said: str
) -> None:
    file = tmp_path / "other.pt"
    arrays = published(sam_folders["sam2"]) | {name: torch.zeros(shape) for name, shape in change.items()}
    torch.save({"model": arrays}, file)
    with pytest.raises(errors.WeightsError, match=said):
        convert.bring(file, "other")


def test_an_encoder_that_is_not_published_needs_its_config(sam_folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "other.pt"
    torch.save({"model": published(sam_folders["sam2"])}, file)
    with pytest.raises(errors.WeightsError, match=r"none of the published ones.*--config"):
        convert.bring(file, "other")
    convert.bring(file, "other", config=sam_folders["sam2"] / "config.json")
    assert opened("other").depth == 6


def test_the_encoder_of_an_original_sam_with_other_parts_is_refused(
    sam_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Adapters of other authors in a SAM were passed over without a word once, and it computed something else."""
    stored = {"image_encoder.blocks.0.attn.qkv.weight": torch.zeros(96, 32)}
    stored |= {"image_encoder.blocks.0.MLP_Adapter.D_fc1.weight": torch.zeros(8, 32)}
    names = convert.sam_original.convert(stored)
    assert "vision_encoder.layers.0.MLP_Adapter.D_fc1.weight" in names
    assert convert.sam_original.EXACT
