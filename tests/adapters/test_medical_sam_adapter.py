"""Medical-SAM-Adapter bottlenecks: by hand in SAM's blocks and decoder layers, zero at the start, their cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import fedvfm
from fedvfm.adapters import bottleneck
from fedvfm.backbones import table as backbone_table
from fedvfm.config import schema
from fedvfm.inference import export
from fedvfm.model import adapted_model
from fedvfm.state import state

SAM: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "window_size": 3,
        "global_attn_indexes": [1],
        "output_channels": 8,
        "mlp_dim": 32,
        "num_pos_feats": 4,
    },
    "prompt_encoder_config": {"hidden_size": 8, "image_size": 64, "image_embedding_size": 4, "mask_input_channels": 4},
    "mask_decoder_config": {"hidden_size": 8, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 8},
}


@pytest.fixture(scope="session")
def sam(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a tiny SAM: three blocks, the middle one with global attention, random everywhere."""
    folder = tmp_path_factory.mktemp("sam") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = transformers.SamModel(transformers.SamConfig(**SAM))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return str(folder)


def recipe(backbone: str, kind: str = "medical-sam-adapter", **adapter: Any) -> schema.Recipe:
    values = {
        "backbone": {"name": backbone},
        "adapter": {"kind": kind, **adapter},
        "data": {"class_names": ["rest", "cell"], "input_size": [64, 64]},
        "seed": 3,
    }
    return schema.parse(schema.Recipe, values, "recipe")


def square() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def opened(folder: str, **adapter: Any) -> tuple[Any, Any]:
    """A SAM whose decoder is open, with the adapter put in, and what was put in."""
    chosen = recipe(folder, **adapter)
    backbone = backbone_table.loader(chosen.backbone)(chosen.backbone)
    backbone.open_masks(backbone.mask_tokens, 0)
    return backbone, bottleneck.MedicalSamAdapter().inject(chosen.adapter, backbone)


def test_medical_sam_adapter_begins_as_sam_and_every_part_learns(sam: str) -> None:
    backbone, put = opened(sam)
    plain: Any = backbone_table.loader(recipe(sam).backbone)(recipe(sam).backbone)
    plain.open_masks(plain.mask_tokens, 0)
    with torch.no_grad():
        ours, theirs = (one.features(square(), (1, 3)) for one in (backbone, plain))
    for one, other in zip(
        (*ours.grids, ours.pooled, ours.masks), (*theirs.grids, theirs.pooled, theirs.masks), strict=True
    ):
        assert torch.equal(one, other)
    moved(put)
    frozen = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    optimiser = torch.optim.SGD(put.parameters.values(), lr=0.1)
    backbone.features(square(), (1, 3)).masks.square().mean().backward()
    for key, parameter in put.parameters.items():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key
    optimiser.step()
    with torch.no_grad():
        assert not torch.allclose(backbone.features(square(), (1, 3)).masks, theirs.masks, atol=1e-3)
        assert torch.equal(plain.features(square(), (1, 3)).masks, theirs.masks)
    for name, value in frozen.items():
        assert torch.equal(plain.model.get_parameter(name), value), name
    assert {p.data_ptr() for p in plain.model.parameters()} <= {p.data_ptr() for p in backbone.model.parameters()}


def moved(put: Any) -> None:
    rng = torch.Generator().manual_seed(3)
    for parameter in put.parameters.values():
        nn.init.normal_(parameter, std=0.3, generator=rng)
        parameter.requires_grad_(True)


def part(put: Any, place: str) -> Any:
    """A bottleneck by hand."""
    down, up = ((put.parameters[f"{place}.{p}.weight"], put.parameters[f"{place}.{p}.bias"]) for p in ("down", "up"))
    return lambda x: nn.functional.gelu(x @ down[0].T + down[1]) @ up[0].T + up[1]


@pytest.mark.parametrize("block", [0, 1], ids=["windowed", "global"])
def test_medical_sam_adapter_in_a_block_by_hand(sam: str, block: int) -> None:
    backbone, put = opened(sam, options={"scale": 0.5})
    plain: Any = backbone_table.loader(recipe(sam).backbone)(recipe(sam).backbone)
    moved(put)
    theirs = plain.model.vision_encoder.layers[block]
    ours = backbone.model.vision_encoder.layers[block]
    entering = torch.randn(2, 4, 4, 16, generator=torch.Generator().manual_seed(1))
    attention, beside = part(put, f"block.{block:02d}.attention"), part(put, f"block.{block:02d}.ffn")
    with torch.no_grad():
        seen = theirs.layer_norm1(entering)
        size = theirs.window_size
        windows, padding = theirs.window_partition(seen, size) if size else (seen, (4, 4))
        answer = theirs.attn(windows)[0]
        answer = theirs.window_unpartition(answer, size, padding, (4, 4)) if size else answer
        between = entering + answer + attention(answer)
        seen = theirs.layer_norm2(between)
        expected = between + theirs.mlp(seen) + 0.5 * beside(seen)
        torch.testing.assert_close(ours(entering), expected, rtol=1e-4, atol=1e-5)


def test_medical_sam_adapter_in_a_decoder_layer_by_hand(sam: str) -> None:
    backbone, put = opened(sam)
    plain: Any = backbone_table.loader(recipe(sam).backbone)(recipe(sam).backbone)
    moved(put)
    ours, theirs = (one.model.mask_decoder.transformer.layers[1] for one in (backbone, plain))
    draw = torch.Generator().manual_seed(1)
    tokens, place = (torch.randn(2, 1, 5, 8, generator=draw) for _ in range(2))
    image, where = (torch.randn(2, 1, 16, 8, generator=draw) for _ in range(2))
    to_image, beside, to_tokens = (part(put, f"decoder.1.{name}") for name in ("to_image", "ffn", "to_tokens"))
    with torch.no_grad():
        found = ours(tokens, image, place, where, None)
        own = theirs.layer_norm1(tokens + theirs.self_attn(query=tokens + place, key=tokens + place, value=tokens)[0])
        seen = theirs.cross_attn_token_to_image(query=own + place, key=image + where, value=image)[0]
        own = theirs.layer_norm2(own + seen + to_image(seen))
        own = theirs.layer_norm3(own + theirs.mlp(own) + 0.5 * beside(own))
        told = image + theirs.cross_attn_image_to_token(query=image + where, key=own + place, value=own)[0]
        told = theirs.layer_norm4(told + to_tokens(told))
    torch.testing.assert_close(found[0], own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], told, rtol=1e-4, atol=1e-5)


def test_medical_sam_adapter_names_and_widths(sam: str) -> None:
    _, put = opened(sam, layers=[1])
    assert {spec.name: spec.shape for spec in put.specs if spec.name.endswith("down.weight")} == {
        "block.01.attention.down.weight": (4, 16),
        "block.01.ffn.down.weight": (4, 16),
        **{
            f"decoder.{layer}.{place}.down.weight": (2, 8)
            for layer in (0, 1)
            for place in ("to_image", "ffn", "to_tokens")
        },
    }
    assert {(spec.group, spec.role) for spec in put.specs} == {("bottleneck", "dense")}
    _, put = opened(sam, layers=[1], options={"width": 3})
    assert {spec.shape[0] for spec in put.specs if spec.name.endswith("down.weight")} == {3}


@pytest.mark.parametrize("kind", ["medical-sam-adapter", "adaptformer"])
def test_encoder_of_sam_under_a_plain_head(sam: str, tmp_path: Path, kind: str) -> None:
    """Without the decoder's masks no number travels for it; prefix, round trip and file are as of every kind."""
    values = {
        **recipe(sam, kind=kind, layers=[1, 2]).model_dump(),
        "task": {"kind": "segmentation", "head": "pyramid"},
    }
    chosen = schema.parse(schema.Recipe, values, "recipe")
    assert adapted_model.examine(chosen)[1] == []
    model = adapted_model.AdaptedModel(chosen)
    assert {name.split(".")[0] for name in model.injected.parameters} == {"block"}
    start = model.initial()
    model.write(start)
    assert model.read().fingerprint == start.fingerprint
    frozen = adapted_model.AdaptedModel(chosen.model_copy(update={"adapter": schema.AdapterConfig(kind="head-only")}))
    frozen.write(state.AdapterState({key: a for key, a in start.items() if key.startswith("head.")}))
    with torch.no_grad():
        assert torch.equal(model.eval()(square()), frozen.eval()(square()))
    rng = np.random.default_rng(0)
    model.write(
        state.AdapterState({key: a + rng.normal(0, 0.3, a.shape).astype(np.float32) for key, a in start.items()})
    )
    assert model.frozen_blocks == 1
    with torch.no_grad():
        torch.testing.assert_close(
            model(square(), model.frozen_prefix(square())), model(square()), rtol=1e-5, atol=1e-5
        )
        loaded = fedvfm.load_adapter(export.save(model, tmp_path / "adapter", {}))
        assert torch.equal(loaded(square()), model(square()))


def test_parameter_counts_on_sam_vit_b(tmp_path: Path) -> None:
    """Two bottlenecks of a quarter of the width a block: 7.1 M; with a third for depth and the decoder: 14.7 M.

    The second is the size that Liu et al., "FedFMS", MICCAI 2024, report of FedMSA.
    """
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam"}))
    chosen = recipe(str(tmp_path))
    backbone = backbone_table.loader(chosen.backbone)(chosen.backbone, with_weights=False)
    assert backbone.parameters_total() == 93_735_728
    backbone.masks_open = True
    put = bottleneck.MedicalSamAdapter().inject(chosen.adapter, backbone)
    inside = sum(spec.size for spec in put.specs if spec.name.startswith("block."))
    decoder = sum(spec.size for spec in put.specs if spec.name.startswith("decoder."))
    one = 2 * 768 * 192 + 192 + 768
    assert (inside, decoder) == (24 * one, 6 * (2 * 256 * 64 + 64 + 256)) == (7_100_928, 198_528)
    assert round((36 * one + 4_058_340) / 1e6, 1) == 14.7
    assert all(parameter.device.type == "meta" for parameter in put.parameters.values())


def test_faults_of_medical_sam_adapter(tiny_dino: Path, sam: str) -> None:
    plain = recipe(str(tiny_dino))
    data = plain.data.model_copy(update={"input_size": (56, 56)})
    (found,) = adapted_model.examine(plain.model_copy(update={"data": data}))[1]
    assert found.endswith(
        "has no mask decoder to adapt; this kind is for SAM, a plain transformer takes kind 'adaptformer'"
    )
    several = adapted_model.examine(recipe(sam, layers=[3], options={"width": -1, "scale": 0}))[1]
    assert len(several) == 3
    (found,) = adapted_model.examine(recipe(sam, kind="prompt-tokens"))[1]
    assert "takes no prompt tokens: they do not fit the windowed two-dimensional grids of its blocks" in found


def test_medical_sam_adapter_in_a_whole_model(sam: str, tmp_path: Path) -> None:
    """With the decoder's masks and its default parts: identity at the start, only the manifest moves, prefix, file."""
    chosen = recipe(sam, layers=[2], dropout=0.2)
    assert adapted_model.examine(chosen)[1] == []
    model = adapted_model.AdaptedModel(chosen)
    assert {spec.group for spec in model.manifest} == {"bottleneck", "decoder"}
    assert model.frozen_blocks == 2
    start = model.initial()
    model.write(start)
    assert model.read().fingerprint == start.fingerprint
    plain = adapted_model.AdaptedModel(chosen.model_copy(update={"adapter": schema.AdapterConfig(kind="head-only")}))
    plain.write(plain.initial())
    with torch.no_grad():
        stock = plain.eval()(square())
        assert torch.equal(model.eval()(square()), stock)
    trained = {id(p) for group in model.trainable().values() for p in group}
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if id(p) not in trained}
    optimiser = torch.optim.AdamW([p for group in model.trainable().values() for p in group], lr=0.05)
    model.train()
    for _ in range(2):
        optimiser.zero_grad()
        model(square(), model.frozen_prefix(square())).square().mean().backward()
        optimiser.step()
    model.eval()
    for key, before in frozen.items():
        assert torch.equal(before, model.get_parameter(key)), key
    learned = model.read()
    still = [name for name in learned if np.array_equal(learned[name], start[name]) and name.startswith("block")]
    assert still == []
    with torch.no_grad():
        assert torch.equal(plain(square()), stock), "another model on the same frozen weights"
        torch.testing.assert_close(
            model(square(), model.frozen_prefix(square())), model(square()), rtol=1e-5, atol=1e-5
        )
        loaded = fedvfm.load_adapter(export.save(model, tmp_path / "adapter", {}))
        model.write(learned)  # parts of the decoder travel as differences, which rounds the last bit
        assert torch.equal(loaded(square()), model(square()))
    assert loaded.read().fingerprint == learned.fingerprint


def test_names_on_the_wire_in_sam_are_stable(sam: str) -> None:
    """Names, shapes, groups and roles are a promise, as in the matrix."""
    golden = json.loads(Path(__file__).with_name("golden_names.json").read_text())
    model = adapted_model.AdaptedModel(recipe(sam, layers=[1]), with_weights=False)
    rows = [[s.name, list(s.shape), s.group, s.role, s.pair] for s in model.manifest if s.group == "bottleneck"]
    assert rows == golden["medical-sam-adapter"]["segmentation"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sam_hq_and_checkpointing(tmp_path: Path, checkpointing: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        settings = {**SAM, "mask_decoder_config": {**SAM["mask_decoder_config"], "vit_dim": 16}}
        stock = transformers.SamHQModel(transformers.SamHQConfig(**settings))
        for parameter in stock.parameters():
            nn.init.normal_(parameter, std=0.2)
        stock.save_pretrained(tmp_path)
    chosen = recipe(str(tmp_path))
    options = {"gradient_checkpointing": checkpointing}
    chosen = chosen.model_copy(update={"backbone": chosen.backbone.model_copy(update={"options": options})})
    model = adapted_model.AdaptedModel(chosen)
    model.write(model.initial())
    plain = adapted_model.AdaptedModel(chosen.model_copy(update={"adapter": schema.AdapterConfig(kind="head-only")}))
    plain.write(plain.initial())
    with torch.no_grad():
        assert torch.equal(model(square()), plain(square()))
    model.train()
    model(square()).square().mean().backward()
    for spec in (spec for spec in model.injected.specs if spec.group == "bottleneck"):
        name, parameter = spec.name, model.injected.parameters[spec.name]
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().sum() > 0) == (".up." in name), f"{name}: a zero up-projection hides the other"
