"""Every promptable model equals the stock one it walks: masks of every token, prompts, other input sizes, sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from fedvfm import errors
from fedvfm.backbones import base, promptable, sam, stock, table, weights
from fedvfm.config import schema

CLASSES = {"sam": "SamModel", "sam_hq": "SamHQModel", "sam2": "Sam2Model", "sam3": "Sam3TrackerModel"}
SIZE = {"sam": 64, "sam_hq": 64, "sam2": 64, "sam3": 56}
FAMILIES = tuple(CLASSES)
FAITHFUL = ("sam", "sam2", "sam3")
every = pytest.mark.parametrize("family", FAMILIES)
faithful = pytest.mark.parametrize("family", FAITHFUL)


def load(folder: Path | str, *, with_weights: bool = True, **options: Any) -> Any:
    chosen = schema.BackboneConfig(name=str(folder), options=options)
    return table.loader(chosen)(chosen, with_weights=with_weights)


def opened(folder: Path | str, count: int = 4, **options: Any) -> Any:
    made = load(folder, **options)
    made.open_masks(count, 0)
    return made


def stock_model(folder: Path, family: str, **changes: Any) -> Any:
    made = getattr(transformers, CLASSES[family]).from_pretrained(folder, **changes).eval()
    if family in ("sam2", "sam3"):  # with one mask asked for, they may give another token's
        made.mask_decoder.dynamic_multimask_via_stability = False
    return made


def pixels(height: int, width: int | None = None) -> torch.Tensor:
    return torch.randn(2, 3, height, width or height, generator=torch.Generator().manual_seed(5))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.abs().mean() > 1e-3, "an all but empty result proves nothing"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# -- equal to the stock model ------------------------------------------------------------------------------------------


@faithful
@torch.no_grad()
def test_masks_of_every_token_are_the_stock_models(sam_folders: dict[str, Path], family: str) -> None:
    model, image = stock_model(sam_folders[family], family), pixels(SIZE[family])
    masks = opened(sam_folders[family]).features(image, (4,)).masks
    assert masks.shape == (2, 4, 16, 16)
    close(masks[:, 1:], model(image).pred_masks[:, 0])
    close(masks[:, :1], model(image, multimask_output=False).pred_masks[:, 0])


@faithful
@torch.no_grad()
def test_the_image_embedding_is_the_stock_models(sam_folders: dict[str, Path], family: str) -> None:
    backbone, image = load(sam_folders[family]), pixels(SIZE[family])
    expected = stock_model(sam_folders[family], family).get_image_embeddings(image)
    features = backbone.features(image, backbone.taps(2))
    assert features.masks is None, "the decoder is closed"
    if family == "sam":
        close(backbone.neck(backbone.prefix(image, backbone.depth, ()).hidden), expected)
        assert [grid.shape for grid in features.grids] == [(2, 32, 4, 4)] * 2
    else:
        close(features.grids[-1], expected[-1])
        assert [grid.shape for grid in features.grids] == [(2, 16, 4, 4)] * 2
    torch.testing.assert_close(features.pooled, features.grids[-1].mean(dim=(2, 3)))


@faithful
@torch.no_grad()
def test_prompts_are_the_stock_models(sam_folders: dict[str, Path], family: str) -> None:
    model, backbone, image = stock_model(sam_folders[family], family), opened(sam_folders[family]), pixels(SIZE[family])
    points = torch.tensor([[[3.0, 40.0], [50.5, 12.0], [7.0, 8.0]], [[30.0, 30.0], [20.0, 1.0], [0.0, 0.0]]])
    labels, boxes = (
        torch.tensor([[1, 0, 1], [1, 1, -10]]),
        torch.tensor([[3.0, 4.0, 30.0, 40.0], [5.0, 5.0, 50.0, 50.0]]),
    )
    asked: list[tuple[base.Prompts, dict[str, torch.Tensor]]] = [
        (base.Prompts(points, labels), {"input_points": points[:, None], "input_labels": labels[:, None]}),
        (base.Prompts(boxes=boxes), {"input_boxes": boxes[:, None]}),
        (
            base.Prompts(points, labels, boxes),
            {"input_points": points[:, None], "input_labels": labels[:, None], "input_boxes": boxes[:, None]},
        ),
    ]
    plain = backbone.features(image, backbone.taps(1)).masks
    for ours, theirs in asked:
        masks = backbone.features(image, backbone.taps(1), prompts=ours).masks
        close(masks[:, 1:], model(image, **theirs).pred_masks[:, 0])
        assert not torch.allclose(masks, plain, atol=1e-3)


@torch.no_grad()
def test_prompts_scale_with_the_input(sam_folders: dict[str, Path]) -> None:
    """The same place of the picture gives the same prompt token at any input size."""
    backbone = opened(sam_folders["sam"])
    point = torch.tensor([[[15.5, 31.5]]])
    boxes = torch.tensor([[3.5, 7.5, 31.5, 47.5]])
    small = backbone._sparse(base.Prompts(point, torch.tensor([[1]]), boxes), (64, 64))
    twice = base.Prompts(2 * point + 0.5, torch.tensor([[1]]), 2 * boxes + 0.5)
    torch.testing.assert_close(backbone._sparse(twice, (128, 128)), small)


@torch.no_grad()
def test_sam_hq_is_the_authors_decoder_and_not_the_one_of_transformers(sam_folders: dict[str, Path]) -> None:
    """SAM's decoder is the witness: the high-quality token is one more token to it."""
    backbone, image = opened(sam_folders["sam_hq"]), pixels(64)
    hq = stock_model(sam_folders["sam_hq"], "sam_hq")
    witness = stock_model(sam_folders["sam"], "sam").mask_decoder
    witness.load_state_dict(hq.mask_decoder.state_dict(), strict=False)
    embedding, _ = hq.get_image_embeddings(image)
    close(backbone.neck(backbone.prefix(image, 4, ()).hidden), embedding)
    position = hq.get_image_wide_positional_embeddings().repeat(2, 1, 1, 1)
    token = hq.mask_decoder.hq_token.weight[None, None].expand(2, 1, -1, -1)
    dense = hq.prompt_encoder(None, None, None, None)[1]
    masks = backbone.features(image, (4,)).masks
    close(masks[:, :1], witness(embedding, position, token, dense, multimask_output=False)[0][:, 0])
    sharp = masks[:, 1:] - witness(embedding, position, token, dense, multimask_output=True)[0][:, 0]
    for index in (1, 2):
        torch.testing.assert_close(sharp[:, index], sharp[:, 0], rtol=1e-4, atol=1e-4)
    assert sharp.abs().mean() > 1e-3, "every class but the background gets the high-quality mask"
    theirs = hq(image, multimask_output=False).pred_masks[:, 0] - hq(image, hq_token_only=True).pred_masks[:, 0]
    assert not torch.allclose(theirs, masks[:, :1], atol=1e-2), "transformers' decoder was mended: use it as the proof"
    assert "rows and columns exchanged" in backbone.stock_differs


@torch.no_grad()
def test_sam_hqs_sharp_mask_is_that_of_transformers_but_for_its_fault(
    sam_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same fault put into ours, both give the same numbers: all else is equal."""
    backbone, image = opened(sam_folders["sam_hq"]), pixels(64)
    hq = stock_model(sam_folders["sam_hq"], "sam_hq")
    attend = backbone._attend

    def faulty(embedding: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, _ = attend(embedding, *others)
        return tokens, (embedding + backbone._dense()).transpose(2, 3)

    monkeypatch.setattr(backbone, "_attend", faulty)
    masks = backbone.features(image, (4,)).masks
    sharp = hq(image, hq_token_only=True).pred_masks[:, 0]
    close(masks[:, :1] + sharp, hq(image, multimask_output=False).pred_masks[:, 0])
    theirs = hq(image).pred_masks[:, 0]  # sorted by the predicted IoU
    for mask in theirs[0]:
        assert min(float((mask - own).abs().max()) for own in masks[0, 1:]) < 1e-5


# -- other input sizes -------------------------------------------------------------------------------------------------


def resized_sam(folder: Path, side: int) -> Any:
    """A stock SAM of another input size, its tables resized beforehand by the same rule."""
    old = stock_model(folder, "sam")
    config = transformers.SamConfig.from_pretrained(folder)
    config.vision_config.image_size = config.prompt_encoder_config.image_size = side
    config.prompt_encoder_config.image_embedding_size = side // 16
    made = transformers.SamModel(config).eval()
    state = dict(old.state_dict())
    for name, value in made.state_dict().items():
        if state[name].shape == value.shape:
            continue
        if name.endswith("pos_embed"):
            state[name] = base.resize(state[name].permute(0, 3, 1, 2), value.shape[1:3]).permute(0, 2, 3, 1)
        else:
            rows = state[name].T.unsqueeze(0)
            state[name] = nn.functional.interpolate(rows, size=len(value), mode="linear")[0].T
    made.load_state_dict(state)
    return made


def resized_later(folder: Path, family: str, side: int) -> Any:
    """A stock SAM 2 or 3 told of another input size: they resize their tables by themselves."""
    config = getattr(transformers, CLASSES[family]).config_class.from_pretrained(folder)
    cells = side // (14 if family == "sam3" else 16)
    config.vision_config.backbone_feature_sizes = [[cells * factor] * 2 for factor in (4, 2, 1)]
    config.prompt_encoder_config.image_size = side
    if family == "sam3":
        config.vision_config.backbone_config.image_size = side
    return stock_model(folder, family, config=config)


@faithful
@torch.no_grad()
def test_another_input_size_is_a_stock_model_of_that_size(sam_folders: dict[str, Path], family: str) -> None:
    folder, side = sam_folders[family], 2 * SIZE[family]
    model = resized_sam(folder, side) if family == "sam" else resized_later(folder, family, side)
    backbone, image = opened(folder), pixels(side)
    close(backbone.features(image, backbone.taps(1)).masks[:, 1:], model(image).pred_masks[:, 0])
    boxes = torch.tensor([[3.0, 4.0, 90.0, 40.0], [5.0, 5.0, 50.0, 70.0]])
    masks = backbone.features(image, backbone.taps(1), prompts=base.Prompts(boxes=boxes)).masks
    close(masks[:, 1:], model(image, input_boxes=boxes[:, None]).pred_masks[:, 0])


@every
@torch.no_grad()
def test_inputs_need_not_be_square(sam_folders: dict[str, Path], family: str) -> None:
    backbone, side = opened(sam_folders[family]), SIZE[family]
    for height, width in ((side, 2 * side), (3 * side // 2, side // 2), (side, side)):
        features = backbone.features(pixels(height, width), backbone.taps(2))
        cell = 14 if family == "sam3" else 16
        assert features.grids[0].shape[2:] == (height // cell, width // cell)
        assert features.masks.shape[2:] == (4 * height // cell, 4 * width // cell)
        assert features.masks.isfinite().all()
    assert torch.equal(features.masks, opened(sam_folders[family]).features(pixels(side), backbone.taps(1)).masks)
    assert backbone.check_size((height, width)) == []
    if family == "sam3":
        with pytest.raises(RuntimeError, match="Output size is too small"):
            backbone.features(pixels(14, 28), backbone.taps(1))
        (fault,) = backbone.check_size((14, 28))
        assert "input_size = [14, 28]: sides must be 28 at least" in fault
    assert f"multiples of the patch size {backbone.patch}" in backbone.check_size((side, side + 5))[0]


# -- the walk ----------------------------------------------------------------------------------------------------------


@every
@torch.no_grad()
def test_prefix_and_suffix_are_the_whole(sam_folders: dict[str, Path], family: str) -> None:
    backbone, image = opened(sam_folders[family]), pixels(SIZE[family])
    taps = backbone.taps(2)
    whole = backbone.features(image, taps)
    for stop in range(backbone.depth + 1):
        parts = backbone.features(image, taps, backbone.prefix(image, stop, taps))
        for ours, theirs in zip((*parts.grids, parts.masks), (*whole.grids, whole.masks), strict=True):
            assert torch.equal(ours, theirs), stop


@every
def test_two_loads_share_every_tensor_and_added_tokens_are_a_models_own(
    sam_folders: dict[str, Path], family: str
) -> None:
    first, second = load(sam_folders[family]), load(sam_folders[family])
    for (name, one), (_, other) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr(), name
        assert not one.requires_grad
    first.open_masks(6, 0)
    assert (first.mask_tokens, first.stock_mask_tokens, second.mask_tokens) == (6, 4, 4)
    assert len(second.model.mask_decoder.output_hypernetworks_mlps) == 4


@every
@torch.no_grad()
def test_added_tokens_are_seeded_and_leave_no_global_trace(sam_folders: dict[str, Path], family: str) -> None:
    image, folder = pixels(SIZE[family]), sam_folders[family]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, other, third = load(folder), load(folder), load(folder)
    one.open_masks(6, 3), other.open_masks(6, 3), third.open_masks(6, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    masks = [made.features(image, made.taps(1)).masks for made in (one, other, third)]
    assert masks[0].shape[1] == 6
    assert torch.equal(masks[0], masks[1])
    assert not torch.allclose(masks[0][:, 4:], masks[2][:, 4:], atol=1e-2)
    assert not torch.allclose(masks[0][:, 4], masks[0][:, 5], atol=1e-2)


@every
def test_checkpointing_computes_the_same(sam_folders: dict[str, Path], family: str) -> None:
    found = []
    for checkpointing in (False, True):
        backbone = opened(sam_folders[family], gradient_checkpointing=checkpointing)
        calls: list[int] = []
        module = backbone._blocks[2]
        module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        image = pixels(SIZE[family]).requires_grad_(True)
        backbone.train()
        features = backbone.features(image, backbone.taps(2))
        (features.masks.square().mean() + features.pooled.square().mean()).backward()
        assert len(calls) == 1 + checkpointing, "the block runs again in the backward pass"
        found.append((features.masks.detach(), image.grad))
        with torch.no_grad():
            backbone.features(image, backbone.taps(1))
        assert len(calls) == 2 + checkpointing, "nothing is kept where no backward pass follows"
        whole, less = (backbone.activations((64, 64)) for backbone in (opened(sam_folders[family]), backbone))
        assert less < whole if checkpointing else less == whole
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@every
@torch.no_grad()
def test_bfloat16_stays_near(sam_folders: dict[str, Path], family: str) -> None:
    backbone, image = opened(sam_folders[family]), pixels(SIZE[family])
    exact = backbone.features(image, backbone.taps(1)).masks
    with torch.autocast("cpu", torch.bfloat16):
        coarse = backbone.features(image, backbone.taps(1)).masks.float()
    assert 0 < (coarse - exact).norm() / exact.norm() < 0.1


# -- names -------------------------------------------------------------------------------------------------------------


@every
def test_projections_and_slices(sam_folders: dict[str, Path], family: str) -> None:
    backbone = load(sam_folders[family])
    for block in range(backbone.depth):
        for part in ("q", "k", "v", "o", "fc1", "fc2"):
            path, rows = backbone.projection(block, part), backbone.fused(block, part)
            assert (path is None) != (rows is None), (block, part)
            assert isinstance(backbone.model.get_submodule(path or rows.path), nn.Linear)
        if family != "sam3":
            slices = [backbone.fused(block, part) for part in "qkv"]
            rows = backbone.model.get_submodule(slices[0].path).out_features
            assert [(one.start, one.stop) for one in slices] == [
                (part * rows // 3, (part + 1) * rows // 3) for part in range(3)
            ]
    assert backbone.projection(0, "w") is None
    assert backbone.fused(0, "w") is None


@every
def test_wire_names(sam_folders: dict[str, Path], family: str) -> None:
    backbone = load(sam_folders[family])
    names = [backbone.wire_name(name) for name, _ in backbone.model.named_parameters()]
    assert len(set(names)) == len(names)
    wanted = {f"block.03.{part}.weight" for part in ("norm1", "norm2", "o", "fc1", "fc2")}
    wanted |= {"decoder.upscale_conv1.weight", "decoder.mask_tokens.weight", "prompt.no_mask_embed.weight"}
    wanted |= {"decoder.output_hypernetworks_mlps.3.proj_in.bias", "embed.patch.weight", "embed.position"}
    wanted |= {f"block.03.{part}.weight" for part in (("q", "k", "v") if family == "sam3" else ("qkv",))}
    assert wanted <= set(names)
    begins = {name.split(".")[0] for name in names}
    assert begins == {"block", "embed", "neck", "decoder", "prompt"}


def test_decoder_parts_are_modules_with_parameters_of_their_own(sam_folders: dict[str, Path]) -> None:
    parts = load(sam_folders["sam"]).parts()
    assert list(parts) == ["upscale", "output_hypernetworks_mlps", "mask_tokens", "transformer", "decoder"]
    assert parts["upscale"] == tuple(f"mask_decoder.upscale_{name}" for name in ("conv1", "conv2", "layer_norm"))
    assert parts["mask_tokens"] == ("mask_decoder.mask_tokens",)
    assert len(parts["output_hypernetworks_mlps"]) == 4 * 3
    assert "mask_decoder.iou_token" in parts["decoder"]
    assert "mask_decoder.hq_mask_mlp.proj_in" in load(sam_folders["sam_hq"]).parts()["hq"]
    assert load(sam_folders["sam2"]).parts()["high_resolution"] == ("mask_decoder.conv_s0", "mask_decoder.conv_s1")


# -- real shapes without weights ---------------------------------------------------------------------------------------


def count(paths: tuple[str, ...], model: nn.Module) -> int:
    return sum(p.numel() for path in paths for p in model.get_submodule(path).parameters(recurse=False))


def test_numbers_of_sam_vit_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    backbone = load("sam-vit-base", with_weights=False)
    assert all(p.device.type == "meta" for p in backbone.model.parameters())
    assert backbone.parameters_total() == 93_735_728
    parts = {name: count(paths, backbone.model) for name, paths in backbone.parts().items()}
    assert parts["decoder"] == 4_058_340
    assert sum(parts[name] for name in backbone.default_parts) == 634_208
    backbone.open_masks(5, 0)
    more = {name: count(paths, backbone.model) for name, paths in backbone.parts().items()}
    assert sum(more[name] for name in backbone.default_parts) == 634_208 + 140_064
    assert (backbone.width, backbone.depth, backbone.patch) == (768, 12, 16)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("sam-vit-base", 93.74),
        ("sam-vit-large", 312.34),
        ("sam-vit-huge", 641.09),
        ("medsam", 93.74),
        ("sam-hq-vit-base", 94.8),
        ("sam-hq-vit-large", 313.7),
        ("sam-hq-vit-huge", 642.7),
        ("sam2-hiera-tiny", 31.44),
        ("sam2-hiera-small", 38.5),
        ("sam2-hiera-base-plus", 73.4),
        ("sam2-hiera-large", 217.0),
        ("sam3", 458.26),
    ],
)
def test_sizes_of_the_table(name: str, millions: float) -> None:
    backbone = load(name, with_weights=False)
    assert backbone.parameters_total() / 1e6 == pytest.approx(millions, rel=0.005)
    assert backbone.stock_mask_tokens == 4
    size = (1008, 1008) if name == "sam3" else (1024, 1024)
    assert backbone.check_size(size) == []


def test_memory_of_large_inputs_grows_as_global_attention_does() -> None:
    backbone = load("sam-vit-base", with_weights=False)
    small, large = backbone.activations((256, 256)), backbone.activations((1024, 1024))
    assert large > 20 * small, "16 times the pixels"
    # What autograd saves for LoRA was counted on the meta device: 5.2 GiB an image; trained weights save more.
    assert 5.2 < 4 * large / 2**30 < 9


@pytest.mark.slow
@torch.no_grad()
def test_the_whole_vit_base_shape_equals_the_stock_model() -> None:
    """Random weights; 256 px and tables of that size, because 1024 px take minutes on two cores."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.SamConfig(vision_config={"image_size": 256}, prompt_encoder_config={"image_size": 256})
        model: Any = transformers.SamModel(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.03)
    backbone = sam.SegmentAnything("random", model, "")
    backbone.open_masks(4, 0)
    image = pixels(256)[:1]
    masks = backbone.features(image, (12,)).masks
    assert masks.shape == (1, 4, 64, 64)
    torch.testing.assert_close(masks[:, 1:], model(image).pred_masks[:, 0], rtol=1e-5, atol=1e-5)
    wider = backbone.features(pixels(320)[:1], (12,)).masks
    assert wider.shape == (1, 4, 80, 80)
    assert wider.isfinite().all()


# -- faults ------------------------------------------------------------------------------------------------------------


def test_options_have_a_meaning(sam_folders: dict[str, Path]) -> None:
    with pytest.raises(errors.ConfigError, match=r"options\.gradient_checkpointing = 1: give true or false"):
        load(sam_folders["sam"], gradient_checkpointing=1)


def test_the_detector_of_sam_3_is_no_promptable_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "sam3"}')
    with pytest.raises(errors.ConfigError, match="detector alone"):
        load(tmp_path, with_weights=False)


@every
def test_a_video_models_configuration_is_read_too(sam_folders: dict[str, Path], family: str) -> None:
    """Published SAM 2 and SAM 3 files are of the video model; the image part has the same keys."""
    if family in ("sam", "sam_hq"):
        pytest.skip("has no video model")
    values: Mapping[str, Any] = weights.describe(schema.BackboneConfig(name=str(sam_folders[family])))
    shapes = {"sam2": table.TABLE.get("sam2-hiera-tiny"), "sam3": table.TABLE.get("sam3")}
    module = __import__(shapes[family].__module__, fromlist=["shape"])
    video = {"model_type": f"{family}_video", **({"tracker_config": values} if family == "sam3" else values)}
    video["model_type"] = f"{family}_video"
    assert module.shape(video)[1].to_dict() == module.shape(values)[1].to_dict()
    assert table.KINDS[video["model_type"]] in table.TABLE


@every
def test_damaged_weights(sam_folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((sam_folders[family] / file).read_bytes())
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(errors.WeightsError, match="Fetch"):
        load(tmp_path)


def test_numbering_of_blocks() -> None:
    names = {"attn.qkv": "qkv", "proj": "skip"}
    assert promptable.numbered("a.layers.7.attn.qkv.bias", "a.layers", names) == "block.07.qkv.bias"
    assert promptable.numbered("a.layers.12.proj.bias", "a.layers", names) == "block.12.skip.bias"
    assert promptable.numbered("a.layers.12.projector", "a.layers", names) == "block.12.projector"
    assert promptable.numbered("b.layers.12.proj", "a.layers", names) is None
    assert np.isfinite(stock.switch({}, "x", "y"))
