"""Swin: equal to the stock model at every size, whatever it saw before; and to the layout of timm and Ark+."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from fedvfm import errors
from fedvfm.backbones import convert, swin, swin_original, table
from fedvfm.config import schema
from fedvfm.inference import export, forms
from fedvfm.model import adapted_model
from fedvfm.state import state

STEM, DEPTHS, HEADS, WINDOW = 8, (1, 2, 3, 2), (1, 2, 2, 4), 2


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tiny_swin: Path) -> Path:
    return tiny_swin


def load(name: Path | str, **options: Any) -> swin.Swin:
    chosen = schema.BackboneConfig(name=str(name), options=options)
    made = table.loader(chosen)(chosen)
    assert isinstance(made, swin.Swin)
    return made


def stock_model(folder: Path) -> Any:
    """A new one for each input: the stock model remembers the smallest that it saw."""
    return transformers.SwinModel.from_pretrained(folder).eval()


def pixels(height: int, width: int | None = None) -> Tensor:
    return torch.randn(2, 3, height, width or height, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (96, 160)], ids=str)
def test_the_last_grid_and_the_vector_are_the_stock_models(folder: Path, size: tuple[int, int]) -> None:
    ours = load(folder)
    with torch.no_grad():
        ours.features(pixels(64), (ours.depth,))  # a smaller one before changes nothing
        found = ours.features(pixels(*size), (ours.depth,))
        expected = stock_model(folder)(pixels(*size))
    grid = found.grids[-1].flatten(2).transpose(1, 2)
    assert expected.last_hidden_state.abs().mean() > 1e-3
    torch.testing.assert_close(grid, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooled, expected.pooler_output, rtol=1e-5, atol=1e-5)


def test_the_stock_model_computes_another_answer_after_a_smaller_image(folder: Path) -> None:
    """Why windows are set anew at every block; where this fails, transformers has mended it."""
    fresh, used = stock_model(folder), stock_model(folder)
    with torch.no_grad():
        used(pixels(64))
        assert not torch.allclose(used(pixels(128)).pooler_output, fresh(pixels(128)).pooler_output, atol=1e-3)


def test_the_finer_grid_is_the_stock_models_second_stage(folder: Path) -> None:
    ours = load(folder)
    taps = ours.taps(2)
    with torch.no_grad():
        found = ours.features(pixels(128), taps)
        stage = stock_model(folder).encoder.layers[1]
        kept: list[Tensor] = []
        stage.blocks[-1].register_forward_hook(lambda _, __, answer: kept.append(answer[0]))
        model = stock_model(folder)
        model.encoder.layers[1] = stage
        model(pixels(128))
    fine = kept[0].transpose(1, 2).reshape(2, 2 * STEM, 16, 16)
    assert taps == (3, 8)
    assert [tuple(grid.shape) for grid in found.grids] == [(2, ours.width, 8, 8)] * 2
    torch.testing.assert_close(found.grids[0], functional.pixel_unshuffle(fine, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stop", range(9))
def test_prefix_and_suffix_are_the_whole(folder: Path, stop: int) -> None:
    ours = load(folder)
    taps = ours.taps(2)
    with torch.no_grad():
        whole = ours.features(pixels(128), taps)
        parts = ours.features(pixels(128), taps, ours.prefix(pixels(128), stop, taps))
    assert all(torch.equal(left, right) for left, right in zip(whole.grids, parts.grids, strict=True))
    assert torch.equal(whole.pooled, parts.pooled)


def test_checkpointing_computes_the_same(folder: Path) -> None:
    gradients = []
    for options in ({}, {"gradient_checkpointing": True}):
        ours = load(folder, **options)
        image = pixels(128).requires_grad_()
        ours.features(image, (ours.depth,)).pooled.square().sum().backward()  # type: ignore[no-untyped-call]
        assert image.grad is not None
        gradients.append(image.grad)
    torch.testing.assert_close(*gradients)


def test_bfloat16_stays_near(folder: Path) -> None:
    """Masks and tables of positions are float32, what they are added to is not."""
    ours = load(folder)
    with torch.no_grad():
        exact = ours.features(pixels(128), ours.taps(2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = ours.features(pixels(128), ours.taps(2))
    for left, right in zip((exact.pooled, *exact.grids), (rough.pooled, *rough.grids), strict=True):
        assert torch.linalg.vector_norm(left - right.float()) < 0.1 * torch.linalg.vector_norm(left)


def test_sizes_that_have_no_weights_are_refused(folder: Path) -> None:
    ours = load(folder)
    assert ours.check_size((128, 64)) == []
    assert "multiples of the patch size 32" in ours.check_size((72, 72))[0]
    assert "at least 64, 2 cells of 32 pixels" in ours.check_size((32, 64))[0]


def test_names_widths_and_projections(folder: Path) -> None:
    ours = load(folder)
    names = {ours.wire_name(name) for name, _ in ours.model.named_parameters()}
    assert len(names) == sum(1 for _ in ours.model.parameters())
    assert {"block.00.q.weight", "block.02.position_bias", "block.07.norm2.bias", "final_norm.weight"} <= names
    # What halves a grid belongs to the block after it, so that a frozen prefix does not hold it.
    assert {"block.01.merge.norm.weight", "block.03.merge.reduction.weight", "block.06.merge.norm.bias"} <= names
    assert [ours.block_width(block) for block in range(8)] == [8, 16, 16, 32, 32, 32, 64, 64]
    for block in range(8):
        for part in ("q", "k", "v", "o", "fc1", "fc2"):
            assert isinstance(ours.model.get_submodule(str(ours.projection(block, part))), torch.nn.Linear)


def recipe(folder: Path, kind: str, task: str, **adapter: Any) -> schema.Recipe:
    values = {
        "backbone": {"name": str(folder)},
        "adapter": {"kind": kind, "rank": 2, **adapter},
        "task": {"kind": task},
        "data": {"class_names": ["rest", "cell"], "input_size": [64, 64]},
    }
    return schema.parse(schema.Recipe, values, "recipe")


@pytest.mark.parametrize("task", ["segmentation", "classification"])
@pytest.mark.parametrize("kind", ["lora", "norm", "bias", "adaptformer", "head-only", "full"])
def test_every_adapter_trains_and_goes_round(folder: Path, kind: str, task: str) -> None:
    model = adapted_model.AdaptedModel(recipe(folder, kind, task))
    shapes = adapted_model.AdaptedModel(recipe(folder, kind, task), with_weights=False)
    assert shapes.manifest == model.manifest
    start = model.initial()
    model.write(start)
    parameters = [parameter for group in model.trainable().values() for parameter in group]
    optimiser = torch.optim.AdamW(parameters, lr=0.05)
    target = torch.randint(0, 2, (2, 64, 64) if task == "segmentation" else (2,))
    for _ in range(2):
        optimiser.zero_grad()
        model.task.loss(model(pixels(64)), target).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    moved = model.read()
    assert all((moved[name] != start[name]).any() for name in start)
    other = adapted_model.AdaptedModel(recipe(folder, kind, task))
    other.write(moved)
    assert other.read().fingerprint == moved.fingerprint
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(pixels(64)), model.eval()(pixels(64)), rtol=1e-3, atol=1e-3)


def test_prompt_tokens_are_refused(folder: Path) -> None:
    _, faults = adapted_model.examine(recipe(folder, "prompt-tokens", "classification"))
    assert any("no sequence of tokens" in fault for fault in faults)


def test_it_is_exported_as_the_stock_class(folder: Path, tmp_path: Path) -> None:
    model = adapted_model.AdaptedModel(recipe(folder, "lora", "classification"))
    start = model.initial()
    model.write(state.AdapterState({name: array + np.float32(0.1) for name, array in start.items()}))
    adapter = export.save(model.eval(), tmp_path / "adapter", {})
    summary = forms.export_adapter(adapter, tmp_path / "hf", "hf")
    assert summary["class"] == "SwinModel"
    merged = transformers.SwinModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        logits = model.head(dataclasses.replace(model.features(pixels(64)), pooled=merged(pixels(64)).pooler_output))
        torch.testing.assert_close(logits, model(pixels(64)), rtol=1e-4, atol=1e-4)


# -- the layout of timm and Ark+ ---------------------------------------------------------------------------------------


def arrays(*, later: bool = False, more: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Random numbers under the names of timm 0.5 (as Ark+ has them), or of its later releases."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (STEM, 3, 4, 4), "patch_embed.proj.bias": (STEM,)}
    shapes |= {f"patch_embed.norm.{kind}": (STEM,) for kind in ("weight", "bias")}
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        width = STEM * 2**stage
        for block in range(depth):
            at = f"layers.{stage}.blocks.{block}."
            linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
            linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
            for part, shape in linear.items():
                shapes |= {f"{at}{part}.weight": shape, f"{at}{part}.bias": shape[:1]}
            shapes |= {f"{at}{part}.{kind}": (width,) for part in ("norm1", "norm2") for kind in ("weight", "bias")}
            shapes[f"{at}attn.relative_position_bias_table"] = ((2 * WINDOW - 1) ** 2, heads)
        if stage + 1 < len(DEPTHS):
            at = f"layers.{stage + later}.downsample."
            shapes |= {f"{at}norm.{kind}": (4 * width,) for kind in ("weight", "bias")}
            shapes[f"{at}reduction.weight"] = (2 * width, 4 * width)
    shapes |= {f"norm.{kind}": (STEM * 2 ** (len(DEPTHS) - 1),) for kind in ("weight", "bias")}
    draw = torch.Generator().manual_seed(3)
    made = {name: torch.randn(shape, generator=draw) * 0.2 for name, shape in shapes.items()}
    made |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64)}
    made |= {"layers.1.blocks.1.attn_mask": torch.zeros(16, 4, 4)}
    return made | {name: torch.zeros(3, 3) for name in more}


def tokens(own: dict[str, Tensor], image: Tensor, *, later: bool = False) -> Tensor:
    """What the authors' code computes, written here a second time from the paper: the last stage's grid, normalised."""

    def norm(value: Tensor, name: str) -> Tensor:
        return functional.layer_norm(value, value.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"])

    def linear(value: Tensor, name: str) -> Tensor:
        return functional.linear(value, own[f"{name}.weight"], own.get(f"{name}.bias"))

    grid = functional.conv2d(image, own["patch_embed.proj.weight"], own["patch_embed.proj.bias"], stride=4)
    grid = norm(grid.movedim(1, -1), "patch_embed.norm")
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        if stage:
            at = f"layers.{stage - 1 + later}.downsample."
            four = [grid[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            grid = linear(norm(torch.cat(four, -1), f"{at}norm"), f"{at}reduction")
        for block in range(depth):
            at = f"layers.{stage}.blocks.{block}."
            shift = WINDOW // 2 if block % 2 and grid.shape[1] > WINDOW else 0
            grid = grid + attended(own, linear, norm(grid, f"{at}norm1"), at, heads, shift)
            inner = functional.gelu(linear(norm(grid, f"{at}norm2"), f"{at}mlp.fc1"))
            grid = grid + linear(inner, f"{at}mlp.fc2")
    return norm(grid, "norm")


def attended(own: dict[str, Tensor], linear: Any, grid: Tensor, at: str, heads: int, shift: int) -> Tensor:
    """Attention of each cell to those of its window that were neighbours before the shift, one cell at a time."""
    batch, rows, columns, width = grid.shape
    q, k, v = linear(grid, f"{at}attn.qkv").reshape(batch, rows, columns, 3, heads, -1).unbind(3)
    table = own[f"{at}attn.relative_position_bias_table"]
    mixed = torch.zeros(batch, rows, columns, heads, width // heads)

    def part(row: int, column: int) -> tuple[int, ...]:
        down, across = (row - shift) % rows, (column - shift) % columns
        wrapped = (row < shift, column < shift)
        return down // WINDOW, across // WINDOW, *wrapped

    cells = [(row, column) for row in range(rows) for column in range(columns)]
    for row, column in cells:
        seen = [cell for cell in cells if part(*cell) == part(row, column)]
        bias = []
        for other, beside in seen:
            index = (row - other + WINDOW - 1) * (2 * WINDOW - 1) + column - beside + WINDOW - 1
            bias.append(table[index])
        keys = torch.stack([k[:, other, beside] for other, beside in seen], 1)
        values = torch.stack([v[:, other, beside] for other, beside in seen], 1)
        scores = torch.einsum("bhd,bnhd->bnh", q[:, row, column], keys) * (width // heads) ** -0.5
        weights = torch.softmax(scores + torch.stack(bias), dim=1)
        mixed[:, row, column] = torch.einsum("bnh,bnhd->bhd", weights, values)
    mixed_heads: Tensor = linear(mixed.flatten(3), f"{at}attn.proj")
    return mixed_heads


@pytest.mark.parametrize("later", [False, True], ids=["Ark+, timm 0.5", "timm 1"])
def test_it_computes_what_the_authors_code_does(later: bool, tmp_path: Path) -> None:
    heads = ("head.fc.weight",) if later else ("projector.weight", "omni_heads.0.weight", "omni_heads.5.bias")
    own = arrays(later=later, more=heads)
    file = tmp_path / "Ark6_swinLarge768_ep50.pth.tar"
    state = own if later else {f"module.{name}": value for name, value in own.items()}
    torch.save({"epoch": 50, "teacher": state}, file)
    located = convert.bring(file, "ark")
    assert located.config["window_size"] == WINDOW
    assert tuple(located.config["depths"]) == DEPTHS
    ours = load("ark")
    with torch.no_grad():
        found = ours.features(pixels(64), (ours.depth,))
        expected = tokens(own, pixels(64), later=later)
    torch.testing.assert_close(found.grids[-1].movedim(1, -1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", ["teacher", "state_dict"])
def test_of_a_student_and_its_teacher_one_is_named(key: str, tmp_path: Path) -> None:
    """Ark keeps both; the authors take the teacher."""
    teacher, student = arrays(), {name: value + 1 for name, value in arrays().items()}
    file = tmp_path / "ark.pth.tar"
    torch.save({"teacher": teacher, "state_dict": student, "optimizer": {"state": {}}}, file)
    with pytest.raises(errors.WeightsError, match=r"several sets of weights \(state_dict, teacher\).*--key"):
        convert.bring(file, "ark")
    with pytest.raises(errors.WeightsError, match=r"no set of weights 'model'.*state_dict, teacher"):
        convert.bring(file, "ark", key="model")
    convert.bring(file, "ark", key=key)
    chosen = teacher if key == "teacher" else student
    assert torch.equal(load("ark").model.get_parameter("layernorm.weight"), chosen["norm.weight"])


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("layers.0.blocks.0.attn.logit_scale", (1, 1), "Swin V2 is another model"),
        ("layers.0.blocks.0.norm3.weight", (STEM,), "part that is not known here"),
        ("adapter.weight", (2, 2), "part that is not known here"),
        ("layers.3.blocks.0.attn.relative_position_bias_table", (1, 4), "smaller ones"),
        ("patch_embed.proj.weight", (STEM, 1, 4, 4), "3 channels"),
    ],
)
def test_what_would_compute_something_else_is_refused(
    name: str, shape: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "other.pth"
    torch.save(arrays() | {name: torch.zeros(shape)}, file)
    with pytest.raises(errors.WeightsError, match=said):
        convert.bring(file, "other")


def test_the_published_shapes_are_read() -> None:
    """Ark+'s Swin-L: 768 pixels, said by the masks of its shifted windows alone."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (192, 3, 4, 4)}
    for stage, (depth, heads) in enumerate(zip((2, 2, 18, 2), (6, 12, 24, 48), strict=True)):
        for block in range(depth):
            shapes[f"layers.{stage}.blocks.{block}.attn.relative_position_bias_table"] = (529, heads)
        shapes[f"layers.{stage}.downsample.reduction.weight"] = (1, 1)
    shapes |= {"layers.0.blocks.0.mlp.fc1.weight": (768, 192), "layers.0.blocks.0.attn.qkv.bias": (576,)}
    shapes["layers.0.blocks.1.attn_mask"] = (256, 144, 144)
    made = swin_original.settings(shapes)
    assert (made["image_size"], made["window_size"], made["num_heads"]) == (768, 12, [6, 12, 24, 48])
    assert made["depths"] == [2, 2, 18, 2]
