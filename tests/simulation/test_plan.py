"""The plan: what a cache must hold, what memory a step takes, and one image of every site held against the recipe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedvfm import errors
from fedvfm.client.training import evaluator, trainer
from fedvfm.config import schema
from fedvfm.model import adapted_model, feature_cache, feature_counts, memory, shape_rules
from fedvfm.protocol import protocol
from fedvfm.simulation import experiment, inspection, plan, run

MIB = 1 << 20


def prepared(tiny: Any, **recipe: Any) -> schema.Experiment:
    """Two views, two epochs, the first two of four blocks frozen."""
    data = {**tiny.values["recipe"]["data"], "augment": ["noise"], "views": 2, **recipe.pop("data", {})}
    whole = {**tiny.values["recipe"], "rounds": 2, **recipe, "data": data}
    return run.prepare({**tiny.values, "recipe": whole, "baselines": []})[0]


@pytest.mark.parametrize("fit", ["resize", "native"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_cache_takes_what_is_planned(tiny: Any, fit: str, precision: str) -> None:
    """Images and features, to the byte, after every view was trained on and every image scored."""
    size = [56, 56] if fit == "resize" else [28, 28]
    what = prepared(tiny, data={"fit": fit, "input_size": size}, precision=precision)
    hospitals = experiment.hospitals(what)
    shapes = adapted_model.AdaptedModel(what.recipe, with_weights=False)
    seen = inspection.inspect(shapes, hospitals)
    planned = memory.memory(shapes, seen, memory.Places(1000))
    members = run.members(what.model_copy(update={"cache_mib": 1000}), hospitals)
    model = adapted_model.AdaptedModel(what.recipe)
    for site in members[:-1]:
        for number in (1, 2):
            trainer.train(model, site, model.initial(), number)
        for split in ("val", "test"):
            evaluator.evaluate(model, site, model.initial(), protocol.Task(what.recipe, 1, model.initial(), split))
    assert members[0].cache.held == pytest.approx((planned.images + planned.features) * MIB, abs=1)
    assert planned.kept == pytest.approx(planned.images + planned.features)


def test_activations_are_those_that_torch_saves(tiny: Any) -> None:
    """On the meta device, of shapes alone: the same bytes as a real forward pass keeps."""
    recipe = prepared(tiny).recipe
    real = adapted_model.AdaptedModel(recipe)
    shapes = adapted_model.AdaptedModel(recipe, with_weights=False)
    pixels = torch.zeros(4, 3, 56, 56)
    blocks, head, largest = memory._saved(real, pixels)
    planned = memory._saved(shapes, pixels.to("meta"))
    assert sum(planned[:2]) == pytest.approx(blocks + head, rel=0.1)
    assert planned[2] == largest
    assert memory.activations(shapes, narrow=True) < memory.activations(shapes) <= 1.1 * (blocks + head) + 2 * largest


@pytest.mark.parametrize(
    ("backbone", "task"),
    [
        ("dino", {"kind": "segmentation"}),
        ("dino", {"kind": "segmentation", "head": "unet"}),
        ("dino", {"kind": "segmentation", "head": "unet-deep"}),
        ("dino", {"kind": "classification"}),
        ("swin", {"kind": "segmentation", "head": "pyramid"}),
        ("unet", {"kind": "segmentation"}),
        ("tinyvit", {"kind": "segmentation"}),
    ],
    ids=lambda part: "-".join(part.values()) if isinstance(part, dict) else part,
)
def test_shapes_by_rules_are_those_of_torch(
    tiny_dino: Path, tiny_swin: Path, sam_folders: dict[str, Path], backbone: str, task: dict[str, str]
) -> None:
    """The same bytes of the same storages as torch's own functions for the meta device, which load its compiler."""
    names = {"dino": str(tiny_dino), "swin": str(tiny_swin), "unet": "unet", "tinyvit": str(sam_folders["tinyvit"])}
    values: dict[str, Any] = {
        "backbone": {"name": names[backbone]},
        "adapter": {"kind": "full"} if backbone == "unet" else {"rank": 2},
        "task": task,
        "data": {"class_names": ["rest", "cell", "wall"], "input_size": [64, 64] if backbone != "dino" else [42, 28]},
    }
    model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"), with_weights=False)
    pixels = torch.empty(2, 3, *model.recipe.data.patch_size, device="meta")
    by_torch = memory._saved(model, pixels)
    with shape_rules.ShapeRules():
        assert memory._saved(model, pixels) == by_torch
    if model.frozen_blocks:
        features = feature_cache.nbytes(model.begun(pixels[:1], model.frozen_blocks))
        assert memory.feature_bytes(model, model.recipe.data.patch_size) == features


@pytest.mark.parametrize("last", [False, True])
def test_a_rule_gives_shape_type_and_order_in_memory_as_torch_does(last: bool) -> None:
    def of(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, device="meta")
        return made.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else made

    image, functional = of(2, 8, 9, 7), torch.nn.functional
    calls: list[Any] = [
        lambda: image + of(8, 1, 1),
        lambda: image * 2.0,
        lambda: image.half() + image.half(),
        lambda: image + image.transpose(2, 3).transpose(2, 3),
        lambda: functional.gelu(image.permute(0, 2, 3, 1)),
        lambda: functional.relu(image),
        lambda: torch.cat((image, of(2, 3, 9, 7)), dim=1),
        lambda: torch.cat((of(2, 4, 5).transpose(1, 2), of(2, 5, 4)), dim=-1),
        lambda: functional.conv2d(image, of(6, 4, 3, 3), of(6), stride=2, padding=1, dilation=1, groups=2),
        lambda: functional.conv1d(of(2, 4, 11), of(6, 4, 3), dilation=2),
        lambda: functional.conv_transpose2d(image, of(8, 3, 2, 2), stride=2, output_padding=1, groups=2),
        lambda: functional.interpolate(image, size=(5, 6), mode="bilinear"),
        lambda: functional.interpolate(image, size=(18, 20), mode="bicubic"),
        lambda: functional.interpolate(of(2, 3, 5), size=9, mode="linear"),
        lambda: functional.group_norm(of(2, 8, 5), 4, of(8), of(8)),
        lambda: functional.layer_norm(of(2, 5, 8), (8,), of(8), of(8)),
        lambda: functional.linear(of(2, 5, 8), of(3, 8), of(3)),
        lambda: of(2, 5, 8) @ of(2, 8, 4),
        lambda: functional.scaled_dot_product_attention(of(2, 2, 5, 8), of(2, 2, 5, 8), of(2, 2, 5, 8)),
    ]
    for call in calls:
        expected = call()
        with shape_rules.ShapeRules():
            given = call()
        for name in ("shape", "dtype", "device"):
            assert getattr(given, name) == getattr(expected, name)
        assert given.stride() == expected.stride()
    for wrong in (lambda: functional.conv2d(image, of(6, 8, 11, 11)), lambda: image @ of(6, 2)):
        with shape_rules.ShapeRules(), pytest.raises(RuntimeError):
            wrong()


def test_arms_share_a_cache() -> None:
    """Features of every arm, images once, the largest step; what goes to files takes no memory."""
    one = memory.Memory(400.0, 80.0, 100.0, 0.0, features=50.0, images=30.0)
    other = memory.Memory(400.0, 10.0, 300.0, 0.0, features=20.0, images=30.0)
    assert memory.largest([one, other], memory.Places(1000)).total == 400 + 310 + 100
    assert memory.largest([one, other], memory.Places(60)).total == 400 + 310 + 60
    assert memory.largest([one, other], memory.Places(1000, 40, files_first=True)).total == 400 + 310 + 60
    assert memory.largest([one, other], memory.Places(1000, 40)).total == 400 + 310 + 100


def test_the_plan_says_which_epochs_are_cheap_and_what_a_cache_needs(tiny: Any) -> None:
    what = prepared(tiny)
    made = plan.plan(what, experiment.hospitals(what))
    (note,) = [note for note in made["notes"] if "epochs" in note]
    assert note == ("epochs 1 to 2 of 2 (rounds 1 to 2) see each view for the first time and compute all 4 blocks")
    longer = what.model_copy(update={"recipe": what.recipe.model_copy(update={"rounds": 5})})
    made = plan.plan(longer, experiment.hospitals(longer))
    assert any(note.endswith("; later epochs compute only the last 2") for note in made["notes"])
    small = longer.model_copy(update={"cache_mib": 0, "cache_disk_mib": 1})
    wide = small.model_copy(update={"recipe": small.recipe.model_copy(update={"rounds": 400})})
    views = wide.recipe.data.model_copy(update={"views": 400})
    wide = wide.model_copy(update={"recipe": wide.recipe.model_copy(update={"data": views})})
    made = plan.plan(wide, experiment.hospitals(wide))
    need = made["cache"]["images_mib"] + made["cache"]["features_mib"]
    (note,) = [note for note in made["notes"] if "computed again" in note]
    assert f"raise cache_mib + cache_disk_mib from 1 to {need:,.0f}" in note


def spoiled(tiny: Any, folder: Path, **masks: np.ndarray[Any, Any]) -> schema.Experiment:
    """The tiny experiment with the masks of sites replaced."""
    shutil.copytree(tiny.data, folder)
    for path in (folder / "masks").iterdir():
        mask = masks.get(path.stem.partition("-")[0])
        if mask is not None:
            Image.fromarray(mask).save(path)
    return run.prepare({**tiny.values, "data": {**tiny.values["data"], "path": str(folder)}, "baselines": []})[0]


def test_a_plan_opens_one_image_and_mask_of_every_site(tiny: Any, tmp_path: Path) -> None:
    """What training would refuse in them is refused at once, of all sites together."""
    values = np.full((60, 56), 9, dtype=np.uint8)
    what = spoiled(tiny, tmp_path / "data", north=values, west=values + 1)
    hospitals = experiment.hospitals(what)
    with pytest.raises(errors.DataError) as caught:
        plan.plan(what, hospitals)
    for site, value in (("north", 9), ("west", 10)):
        (own,) = [one for one in hospitals if one.name == site]
        assert f"site '{site}', sample '{own.train[0].id}': " in str(caught.value)
        assert f"value {value}" in str(caught.value)


def test_a_plan_refuses_other_channels(tiny: Any) -> None:
    what = prepared(tiny, data={"channels": ["red", "green", "blue"]})
    with pytest.raises(errors.FedvfmError, match=r"channel"):
        plan.plan(what, experiment.hospitals(what))


def test_the_cache_of_a_run_is_that_of_the_plan(tiny: Any, tmp_path: Path) -> None:
    """Nothing is computed again where the plan says that the cache is large enough."""
    what = prepared(tiny).model_copy(update={"cache_disk_mib": 0, "workers": 1})
    seen: list[feature_counts.Counts] = []
    everyone = run.members(what, experiment.hospitals(what))

    def engine(jobs: Any, members: Any, observer: Any, settings: Any) -> None:
        from fedvfm.simulation.engines import in_process

        everyone[:] = members
        in_process.run(jobs, members, observer, settings)
        seen.append(members[0].cache.counts)

    run.simulate(what, output=tmp_path / "run", engine=engine)
    assert seen[0].again == 0
    assert everyone[0].cache.counts.computed == seen[0].computed, "pictures of the report take what is there"
    assert everyone[0].cache.counts.memory > seen[0].memory
