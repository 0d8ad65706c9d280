"""Automatic prompts: what the light head proposes, how it learns, and that prediction needs no oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fedvfm
from fedvfm import errors
from fedvfm.backbones import base
from fedvfm.client.training import evaluator, trainer
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import prompts as simulator
from fedvfm.data import sample as samples
from fedvfm.inference import delivery, export
from fedvfm.model import adapted_model, feature_cache, memory
from fedvfm.protocol import protocol
from fedvfm.tasks import proposals, segmentation

NAMES = ("rest", "box", "bar")
SIDES = {"sam": 64, "sam_hq": 64, "sam2": 64, "sam3": 56, "tinyvit": 64}


class Drawn:
    """Four images of a bright box and a dark bar; the last one shows no bar."""

    name = "here"

    def __init__(self, side: int = 64) -> None:
        self.side = side
        self.train = tuple(samples.Sample(f"image-{n}") for n in range(4))
        self.val: tuple[samples.Sample, ...] = ()
        self.test = self.train

    def read(self, sample: samples.Sample) -> samples.Pixels:
        number = int(sample.id[-1])
        rng = np.random.default_rng(number)
        mask = np.zeros((self.side, self.side), dtype=np.int64)
        mask[8 + number : 24 + number, 10:30] = 1
        if number < 3:
            mask[36:44, 6 : 44 + number] = 2
        image = np.array([0.4, 0.9, 0.1])[mask] + 0.05 * rng.random(mask.shape)
        return samples.Pixels(np.clip(image, 0, 1).astype(np.float32)[None], mask)


def recipe(folder: Path | str, size: int = 64, **more: Any) -> schema.Recipe:
    values = {
        "rounds": 1,
        "threads": 1,
        "precision": "float32",
        "backbone": {"name": str(folder)},
        "adapter": {"rank": 2, **more.pop("adapter", {})},
        "task": {"prompt": "auto", **more.pop("task", {})},
        "data": {"class_names": list(NAMES), "input_size": [size, size], **more.pop("data", {})},
        "optimiser": {"learning_rate": 1e-2, "batch_size": 2, **more.pop("optimiser", {})},
        **more,
    }
    return schema.parse(schema.Recipe, values, "recipe")


def site(side: int = 64) -> sites.Site:
    return sites.Site("here", Drawn(side), cache=feature_cache.FeatureCache(1 << 24), simulated=True)


# -- boxes -------------------------------------------------------------------------------------------------------------


def test_the_box_of_a_filled_ellipse_is_its_bounding_box() -> None:
    rows, columns = np.mgrid[:64, :96]
    inside = ((rows - 30) / 12) ** 2 + ((columns - 50) / 25) ** 2 <= 1
    shares = torch.from_numpy(inside.astype(np.float32))[None, None]
    settings = schema.TaskConfig(prompt="box", prompt_jitter=0.0)
    expected = simulator.draw(inside.astype(np.int64), 2, settings, np.random.default_rng(0))
    assert expected.boxes is not None
    box = proposals.boxes_of(shares, (64, 96))[0]
    np.testing.assert_allclose(box.numpy(), expected.boxes, atol=0.8)
    # The same on a grid of cells of 4 pixels, in pixels of the input.
    coarse = torch.nn.functional.avg_pool2d(shares, 4)
    np.testing.assert_allclose(proposals.boxes_of(coarse, (64, 96))[0].numpy(), expected.boxes, atol=3)


def test_what_is_faint_everywhere_leaves_a_box_where_it_is() -> None:
    shares = torch.full((1, 1, 16, 16), 0.05)
    shares[0, 0, 4:8, 6:12] = 0.9
    left, top, right, bottom = proposals.boxes_of(shares, (64, 64))[0, 0].tolist()
    assert (left, top, right, bottom) == pytest.approx((24, 16, 47, 31), abs=5)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0])
def test_a_class_that_is_nowhere_has_a_finite_box_inside_the_image(value: float) -> None:
    left, top, right, bottom = proposals.boxes_of(torch.full((2, 1, 8, 8), value), (64, 48))[1, 0].tolist()
    assert 0 <= left < right <= 47
    assert 0 <= top < bottom <= 63
    single = torch.zeros(1, 1, 8, 8)
    single[0, 0, 0, 7] = 1.0
    assert torch.isfinite(proposals.boxes_of(single, (64, 64))).all()


# -- model -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SIDES)
def test_it_trains_head_and_decoder_and_predicts_without_any_prompt(sam_folders: dict[str, Path], family: str) -> None:
    side = SIDES[family]
    model, place = adapted_model.AdaptedModel(recipe(sam_folders[family], side)), site(side)
    before = model.initial()
    after = trainer.train(model, place, before, 1).state
    moved = {name: float(np.abs(after[name] - before[name]).max()) for name in after}
    for name in ("head.narrow.weight", "head.around.weight", "head.classify.bias", "decoder.mask_tokens.weight"):
        assert moved[name] > 0, name
    assert moved["block.00.q.B"] > 0
    model.eval()
    pixels = torch.rand(2, 3, side, side)
    with torch.no_grad():
        logits = model(pixels)
    assert logits.shape == (2, 3, side, side)
    assert not logits[:, 0].any()  # the stock model's threshold
    scores = evaluator.evaluate(model, place, model.read(), protocol.Task(model.recipe, 1, split="test"))
    assert 0 <= scores.metrics["dice"] <= 1
    assert model.recipe.task.oracle == simulator.describe(model.recipe.task) == ""


def test_the_next_pass_is_shown_the_mask_of_the_one_before(sam_folders: dict[str, Path]) -> None:
    """Of one pass the stock model's mask for the proposed box; of two its mask for that box and the first mask."""
    answers = {}
    for passes in (1, 2):
        model = adapted_model.AdaptedModel(recipe(sam_folders["sam"], task={"options": {"passes": passes}}))
        model.write(model.initial())
        answers[passes] = model.eval()
    one, two = answers[1], answers[2]
    two.write(one.read())
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    import transformers

    stock = transformers.SamModel.from_pretrained(sam_folders["sam"]).eval()
    with torch.no_grad():
        embedding = stock.get_image_embeddings(pixels)
        shares = one.head.coarse(embedding).softmax(dim=1)[:, 1:]
        boxes = proposals.boxes_of(shares, (64, 64))[:, :1]
        first = stock(image_embeddings=embedding, input_boxes=boxes, multimask_output=False).pred_masks[:, 0]
        prompts = {"input_boxes": boxes, "input_masks": first}
        second = stock(image_embeddings=embedding, multimask_output=False, **prompts).pred_masks[:, 0]
        for model, mask in ((one, first), (two, second)):
            torch.testing.assert_close(model(pixels)[:, 1:2], base.resize(mask, (64, 64)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, second, atol=1e-3)


def test_every_stage_has_its_own_loss_and_learns_by_that_alone(sam_folders: dict[str, Path]) -> None:
    model = adapted_model.AdaptedModel(recipe(sam_folders["tinyvit"]))
    model.write(model.initial())
    model.train()
    pixels, target = torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    stages = model(pixels)
    assert stages.shape == (2, 9, 64, 64)
    task, rows = model.task, torch.split(stages, 3, dim=1)
    assert isinstance(task, segmentation.Segmentation)
    expected = sum(weight * task._loss(row, target, None) for weight, row in zip((1.0, 0.5, 0.5), rows, strict=True))
    torch.testing.assert_close(task.loss(stages, target), expected)
    torch.testing.assert_close(task.losses(stages, target).mean(), task.loss(stages, target), rtol=1e-4, atol=1e-4)
    named = dict(model.head.named_parameters())
    for at, learns in ((0, False), (1, False), (2, True)):
        grads = torch.autograd.grad(rows[at].sum(), list(named.values()), retain_graph=True, allow_unused=True)
        assert [bool(grad.any()) for grad in grads] == [learns] * len(named)


def test_training_brings_boxes_and_masks_to_the_truth(sam_folders: dict[str, Path]) -> None:
    """From random weights, so far is not asked."""
    settings = {"local_epochs": 40, "batch_size": 4, "learning_rate": 3e-2, "schedule": "constant"}
    model, place = adapted_model.AdaptedModel(recipe(sam_folders["sam"], optimiser=settings)), site()
    task = protocol.Task(model.recipe, 1, split="test")
    before = evaluator.evaluate(model, place, model.initial(), task).metrics["dice"]
    after = trainer.train(model, place, model.initial(), 1).state
    assert evaluator.evaluate(model, place, after, task).metrics["dice"] > before + 0.25
    coarse = []
    pixels = sites.collate([place.example(model, place.hospital.train[0], 0)], model)[0]
    with torch.no_grad():
        model.backbone.proposed(
            pixels, model.taps, None, lambda grid, size, decode: coarse.append(model.head.coarse(grid)) or grid
        )
    left, top, right, bottom = proposals.boxes_of(coarse[0].softmax(dim=1)[:, 1:], (64, 64))[0, 0].tolist()
    assert left < 20 < right  # the middle of the bright box
    assert top < 16 < bottom


def test_memory_counts_every_pass(sam_folders: dict[str, Path]) -> None:
    counts = [
        memory.activations(adapted_model.AdaptedModel(recipe(sam_folders["tinyvit"], task=task), with_weights=False))
        for task in ({"prompt": "none"}, {"options": {"passes": 1}}, {"options": {"passes": 3}})
    ]
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": {"options": {"passes": 0}}}, "passes = 0: give a whole number from 1 to 4"),
        ({"task": {"prompt": "none", "options": {"passes": 2}}}, "only prompt = 'auto' reads it"),
        ({"task": {"head": "pyramid"}}, "prompt = 'auto': head 'pyramid' takes no prompts"),
        ({"task": {"prompt_jitter": 0.2}}, "prompt_jitter = 0.2: only prompt = 'box' reads it"),
    ],
)
def test_faults(sam_folders: dict[str, Path], change: dict[str, Any], said: str) -> None:
    _, faults = adapted_model.examine(recipe(sam_folders["tinyvit"], **change))
    assert any(said in fault for fault in faults), faults


def test_another_backbone_takes_none(tiny_dino: Path) -> None:
    _, faults = adapted_model.examine(recipe(tiny_dino, 28))
    assert any("takes no prompts; use a SAM" in fault for fault in faults), faults


# -- what becomes of it ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(sam_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = adapted_model.AdaptedModel(recipe(sam_folders["sam"]))
    model.write(trainer.train(model, site(), model.initial(), 1).state)
    return export.save(model.eval(), tmp_path_factory.mktemp("adapter") / "adapter", {})


def test_prediction_asks_for_nothing_and_is_the_models(adapter: Path, tmp_path: Path) -> None:
    pixels = Drawn().read(samples.Sample("image-1")).image[0]
    Image.fromarray((255 * pixels).astype(np.uint8)).save(tmp_path / "a.png")
    row = fedvfm.predict(adapter, tmp_path / "a.png", tmp_path / "out")["inputs"][0]
    assert row["size"] == [64, 64]
    drawn = np.asarray(Image.open(tmp_path / "out" / row["files"][0]))
    model = fedvfm.load_adapter(adapter)
    prepared = sites.Site("here", Drawn()).whole(model, samples.Sample("image-1"))
    with torch.no_grad():
        expected = delivery.Deliverable(model)(torch.from_numpy(prepared.image)[None])[0].argmax(dim=0)
    assert (drawn != expected.numpy()).mean() < 0.02  # the file holds 8 bits a pixel


def test_exports_carry_it_whole_or_refuse(adapter: Path, tmp_path: Path) -> None:
    assert not (adapter / "adapter_config.json").exists()
    assert "proposes its own prompts" in (adapter / "README.md").read_text()
    bundle = fedvfm.export_adapter(adapter, tmp_path / "bundle", "monai")
    assert bundle["difference"] == 0.0
    for form, said in (("hf", "no stock class"), ("peft", "no PEFT form")):
        with pytest.raises(errors.ConfigError, match=said):
            fedvfm.export_adapter(adapter, tmp_path / form, form)


@pytest.mark.slow
def test_the_graph_computes_the_same(adapter: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the graph is run with onnxruntime")
    pytest.importorskip("onnxscript", reason="ONNX needs the extra onnx")
    fedvfm.export_adapter(adapter, tmp_path / "onnx", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = delivery.Deliverable(fedvfm.load_adapter(adapter))(image)
    (found_logits,) = session.run(["logits"], {"image": image.numpy()})
    assert delivery.difference(torch.from_numpy(found_logits), expected) < 1e-4
