"""Whole volumes as samples: how they are put together, cut, trained on, scored, bounded and predicted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import fedvfm
from fedvfm import errors
from fedvfm.client import site_file
from fedvfm.client.readiness import check
from fedvfm.client.training import dp_trainer, evaluator, trainer
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import bags, transforms
from fedvfm.data import sample as samples
from fedvfm.data.partition import appearance, virtual_hospitals
from fedvfm.data.sources import table
from fedvfm.inference import delivery, export
from fedvfm.model import adapted_model, feature_cache, memory
from fedvfm.privacy import gradients, records
from fedvfm.protocol import protocol
from fedvfm.simulation import inspection
from fedvfm.tasks import segmentation
from tests.privacy import test_private_training as private

SHAPE = (20, 26, 12)
AFFINES = {
    "a": np.diag([-1.0, -1.0, 1.0, 1.0]),
    "b": np.diag([1.5, 1.0, 2.5, 1.0]),
    "c": np.array([[0, 0, 2.0, -3], [-1.0, 0, 0, 7], [0, 1.0, 0, 2], [0, 0, 0, 1]]),
}
"""Case -> voxels to millimetres: axes to the left and back; thick slices; sagittal slices as acquired."""


def write(folder: Path) -> None:
    """Three cases: noise with a bright ball (class 1) above a dark one (class 2)."""
    for number, (name, affine) in enumerate(AFFINES.items()):
        rng = np.random.default_rng(number)
        places = np.indices(SHAPE).reshape(3, -1).T
        bright, dark = (np.linalg.norm(places - middle, axis=1) for middle in ((6, 8, 5), (13, 17, 6)))
        labels = np.where(bright < 4, 1, np.where(dark < 5, 2, 0)).reshape(SHAPE).astype(np.uint8)
        grey = (rng.random(SHAPE) * 80 + np.array([300, 600, 20])[labels]).astype(np.int16)
        for part, array in (("images", grey), ("labels", labels)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            nibabel.Nifti1Image(array, affine).to_filename(folder / part / f"{name}.nii.gz")


def recipe(**more: Any) -> schema.Recipe:
    data = {
        "class_names": ["rest", "bright", "dark"],
        "depth": 8,
        "input_size": [16, 16],
        "fit": "native",
        "augment": ["flip", "intensity"],
        **more.pop("data", {}),
    }
    values = {
        "threads": 1,
        "backbone": {"name": "unet3d", "options": {"channels": [8, 16]}},
        "adapter": {"kind": "full"},
        "data": data,
        "optimiser": {"batch_size": 2, "learning_rate": 1e-2, "schedule": "constant", "local_epochs": 40},
        "evaluation": {"surface": False},
        **more,
    }
    return schema.parse(schema.Recipe, values, "recipe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("volumes") / "data"
    write(made)
    return made


def source(folder: Path, chosen: schema.Recipe | None = None) -> samples.Source:
    chosen = chosen or recipe()
    options = {"ids": "names", "class_names": ["rest", "bright", "dark"], "mask_values": [0, 1, 2]}
    values = {"source": "folder", "path": str(folder), "options": options}
    return bags.of(table.make(schema.SourceConfig.model_validate(values), chosen.data), chosen)


def site_of(
    folder: Path, train: Sequence[int] = (0, 1), test: Sequence[int] = (2,), chosen: schema.Recipe | None = None
) -> sites.Site:
    own = source(folder, chosen)
    parts = [tuple(own.samples()[at] for at in numbers) for numbers in (train, test)]
    hospital = virtual_hospitals.Hospital("north", own, parts[0], (), parts[1])
    return sites.Site("north", hospital, cache=feature_cache.FeatureCache(2**24), simulated=True)


def test_a_volume_is_one_sample_in_its_own_millimetres(folder: Path) -> None:
    own = source(folder)
    assert [(one.id, one.whole, one.bag, one.part, len(one.images)) for one in own.samples()] == [
        ("a", True, False, None, 12),
        ("b", True, False, None, 12),
        ("c", True, False, None, 26),
    ], "case c is cut axially like all, across its second stored axis"
    pixels = [own.read(one) for one in own.samples()]
    assert [found.image.shape for found in pixels] == [(1, 12, 26, 20), (1, 12, 26, 20), (1, 26, 20, 12)]
    assert [found.spacing for found in pixels] == [(1.0, 1.0, 1.0), (2.5, 1.0, 1.5), (1.0, 1.0, 2.0)]
    first, second = own.samples()[0], own.samples()[0].images[3]
    np.testing.assert_array_equal(own.read(second).image, pixels[0].image[:, 3])
    np.testing.assert_array_equal(own.read(second).mask, pixels[0].mask[3])  # type: ignore[index]
    assert len({records.stable(one, own)[0] for one in (first, *first.images)}) == 13
    assert len(records.charged("record", [first], own)) == 13, "its slices have no budget of their own"


def test_slices_that_make_no_volume_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for part in ("images", "masks"):
        Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / part / "a.png")
    with pytest.raises(errors.DataError, match=r"recipe\.data\.depth needs whole volumes"):
        source(tmp_path)

    class Gaps(samples.Wrapped):
        def samples(self) -> Sequence[samples.Sample]:
            return [one for one in super().samples() if one.part is not None and one.part.index % 2]

    plain = recipe(backbone={"name": "unet"}, data={"depth": 0})
    with pytest.raises(errors.DataError, match="6 of its 12 slices are samples"):
        bags.of(Gaps(source(folder, plain)), recipe())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"depth": 0}}, "recipe.data.depth: missing"),
        ({"backbone": {"name": "unet"}}, "backbone 'unet' takes slices"),
        ({"task": {"head": "patch"}}, "backbone 'unet3d' takes volumes; use 'voxel'"),
        ({"backbone": {"name": "unet"}, "data": {"depth": 0}, "task": {"head": "voxel"}}, "is for whole volumes"),
        ({"adapter": {"kind": "lora"}}, "backbone 'unet3d'"),
        ({"data": {"fit": "resize"}}, "volumes are not resized"),
        ({"data": {"stack": 3}}, "recipe.data.stack = 3 is for slices"),
        ({"unlabelled": {}}, "recipe.unlabelled is for slices"),
    ],
)
def test_what_does_not_go_with_volumes_is_said(change: dict[str, Any], words: str) -> None:
    assert any(words in fault for fault in adapted_model.examine(recipe(**change))[1])


def test_a_recipe_of_slices_has_the_bytes_it_had() -> None:
    plain = recipe(backbone={"name": "unet"}, data={"depth": 0})
    assert "depth" not in plain.model_dump_json()
    assert "depth" in recipe().model_dump_json()
    assert "spacing" not in recipe().model_dump_json()
    for wrong in ({"depth": 0, "spacing": [1.0, 1.0, 1.0]}, {"spacing": [1.0, 1.0]}):
        with pytest.raises(errors.ConfigError, match="spacing: three numbers"):
            recipe(backbone={"name": "unet"}, data=wrong)


def test_volumes_are_brought_to_one_spacing_and_answered_on_their_own_grid(folder: Path, tmp_path: Path) -> None:
    """A ball keeps its volume in millimetres; the mask has the file's voxels, wherever it was computed."""
    chosen = recipe(data={"spacing": [1.25, 2.0, 1.5]})
    own, contract = source(folder, chosen), chosen.data
    for sample in own.samples():
        pixels = own.read(sample)
        assert pixels.spacing is not None
        prepared = transforms.prepare(pixels, contract, 3)
        assert prepared.mask is not None
        assert prepared.truth is not None
        want = zip(pixels.image.shape[1:], pixels.spacing, contract.spacing, strict=True)
        shape = tuple(round(side * size / new) for side, size, new in want)
        assert prepared.image.shape == (3, *shape)
        assert prepared.mask.shape == shape
        before = (prepared.truth == 2).sum() * np.prod(pixels.spacing)
        assert 0.8 < (prepared.mask == 2).sum() * np.prod(contract.spacing) / before < 1.25
    with pytest.raises(errors.DataError, match="does not say how large its voxels are"):
        transforms.prepare(dataclasses.replace(pixels, spacing=None), contract, 3)
    tiny = recipe(data={"spacing": [0.05, 0.05, 0.05]}).data
    with pytest.raises(errors.DataError, match="at most 536,870,912 voxels"):
        transforms.size_of((300, 512, 512), (1.0, 0.8, 0.8), tiny)
    saved = export.save(private.moved(chosen).eval(), tmp_path / "adapter", {})
    made = fedvfm.predict(saved, folder / "images" / "b.nii.gz", tmp_path / "out")
    mask = np.asarray(nibabel.load(tmp_path / "out" / "b.nii.gz").dataobj)
    assert mask.shape == SHAPE
    assert len(np.unique(mask)) > 1
    site, model = site_of(folder, test=(1,), chosen=chosen), fedvfm.load_adapter(saved)
    (sample,) = site.split("test")
    logits = evaluator.logits(model, site, sample, site.whole(model, sample))
    assert logits.shape == (3, 24, 13, 20)
    counts = np.bincount(segmentation.classes_at(logits, (12, 26, 20)).ravel(), minlength=3).tolist()
    assert [row["voxels"] for row in made["inputs"][0]["classes"].values()] == counts
    assert "voxels resampled to 1.25 x 2 x 1.5 mm" in "".join(delivery.what_goes_in(model))


def test_pieces_often_hold_a_class_and_are_padded_where_a_volume_ends() -> None:
    mask = np.zeros((40, 40, 40), dtype=np.int64)
    mask[33:35, 2:4, 37:39] = 2
    base = transforms.Prepared(transforms.in_three(mask[None].astype(np.float32)), mask, mask, None)
    contract = recipe(data={"augment": []}).data
    held = [
        transforms.training_view(base, contract, np.random.default_rng(number)).mask.any()  # type: ignore[union-attr]
        for number in range(200)
    ]
    assert 0.25 < np.mean(held) < 0.45, "one of three by choice, and hardly one by chance"
    small = transforms.Prepared(base.image[:, :5, :9, :30], mask[:5, :9, :30], None, None)
    view = transforms.training_view(small, recipe().data, np.random.default_rng(0))
    assert view.image.shape == (3, 8, 16, 16)
    assert view.mask is not None
    assert view.mask.shape == (8, 16, 16)


def test_image_and_mask_of_a_piece_turn_together() -> None:
    """Each augmentation that moves voxels moves both alike, of a cube too, whose shape would not tell."""
    mask = np.random.default_rng(0).integers(0, 3, (8, 8, 8))
    for number in range(8):
        image, turned = transforms.augment(
            transforms.in_three(mask[None].astype(np.float32)), mask, ["rot90", "flip"], np.random.default_rng(number)
        )
        np.testing.assert_array_equal(image[0], turned)


@pytest.mark.parametrize("size", [(1, 8, 8), (8, 8, 8), (2, 3, 5), (8, 16, 8)])
def test_a_volume_of_one_cell_on_the_lowest_level_is_computed(size: tuple[int, ...]) -> None:
    whole = recipe(backbone={"name": "unet3d", "options": {"channels": [4, 4, 4, 4]}})
    model = adapted_model.AdaptedModel(whole).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_training_on_a_volume_fits_it(folder: Path) -> None:
    """The loss falls, and Dice of the whole volume, by windows, rises."""
    site, model = site_of(folder, (0,), (0,)), adapted_model.AdaptedModel(recipe())
    start = model.initial()
    task = protocol.Task(model.recipe, 1, start, "test", per_sample=True)
    before = evaluator.evaluate(model, site, start, task)
    update = trainer.train(model, site, start, 1)
    after = evaluator.evaluate(model, site, update.state, task)
    assert after.num_examples == 1
    assert list(after.ids) == ["a"]
    assert after.metrics["dice"] > max(0.8, before.metrics["dice"] + 0.2)


def test_each_volume_has_its_own_gradient(folder: Path) -> None:
    """What differential privacy bounds is a whole volume: a record."""
    chosen = recipe(
        data={"augment": []},
        optimiser={"batch_size": 2, "local_epochs": 1},
        aggregation={"weighting": "uniform"},
        privacy=private.PRIVACY,
    )
    site, model = site_of(folder), private.moved(chosen)
    assert records.ids("record", site.split("train"), site.hospital.source) == [
        "sample volume a 0",
        "sample volume b 0",
    ]
    what = private.work(model, site)
    assert [one.prepared.image.shape for one in dp_trainer.made(model)] == [(3, 8, 16, 16)] * 2
    with gradients.opened(what) as way:
        rows = way.rows([[one] for one in site.split("train")], what.losses)
    expected = private.plain_rows(model, what, site.split("train"))
    assert torch.linalg.vector_norm(rows - expected) < 1e-4 * torch.linalg.vector_norm(expected)
    assert torch.linalg.vector_norm(rows[0] - expected[1]) > 0.1 * torch.linalg.vector_norm(expected[1])
    with private.steps(model, site) as (opened, own):
        clipped = opened.clipped([[one] for one in site.split("train")], own.losses)
    assert float(torch.linalg.vector_norm(clipped)) <= 2 * chosen.privacy.clip + 1e-5  # type: ignore[operator]


def test_the_forecast_counts_volumes(folder: Path) -> None:
    shapes = adapted_model.AdaptedModel(recipe(), with_weights=False)
    (seen,) = inspection.inspect(shapes, [site_of(folder).hospital])  # type: ignore[list-item]
    assert (seen.size, seen.train, seen.evaluated) == ((12, 26, 20), 2, 1)
    deeper = adapted_model.AdaptedModel(recipe(data={"depth": 16}), with_weights=False)
    assert memory.activations(deeper) > 1.8 * memory.activations(shapes)


def test_a_scanner_shows_a_volume_slice_by_slice(folder: Path) -> None:
    own = source(folder)
    scanner = appearance.Appearance(gamma=1.3, noise=0.02, bias=0.2, bias_seed=3)
    hospital = virtual_hospitals.Hospital("north", own, tuple(own.samples()), (), (), appearance=scanner)
    found, plain = (reader.read(own.samples()[0]) for reader in (hospital, own))
    assert found.image.shape == plain.image.shape
    assert not np.allclose(found.image[:, 0] - plain.image[:, 0], found.image[:, 1] - plain.image[:, 1])


def test_data_check_reads_slices_and_plans_volumes(folder: Path, tmp_path: Path) -> None:
    """What it finds is of slices, what it trains on and forecasts is of volumes."""
    chosen = recipe(optimiser={"batch_size": 1})
    options = 'ids = "names"\nclass_names = ["rest", "bright", "dark"]\nmask_values = [0, 1, 2]\n'
    own = f'name = "north"\n[data]\nsource = "folder"\npath = "{folder}"\n[data.options]\n{options}'
    (tmp_path / "site.toml").write_text(own)
    made = check.check(site_file.read(tmp_path / "site.toml", chosen))
    blockers = {finding.code for finding in made.findings if finding.severity == "blocker"}
    assert blockers <= {"policy-refuses", "few-patients"}, "three volumes are few, and that is all"
    assert made.seen is not None
    assert (len(made.seen.samples), len(made.seen.found.rows)) == (3, 50)
    shapes = adapted_model.AdaptedModel(chosen, with_weights=False)
    sizes = [(one.size, one.train + one.evaluated) for one in check._images(made, shapes)]
    assert {size for size, _ in sizes} == {(12, 26, 20), (26, 20, 12)}
    assert sum(count for _, count in sizes) == 3
    assert made.facts["training_step"] is not None


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose every number is off its start, so that it draws all classes."""
    model = private.moved(recipe())
    return export.save(model.eval(), tmp_path_factory.mktemp("adapter") / "adapter", {})


@pytest.mark.parametrize("name", AFFINES)
def test_a_volume_is_predicted_on_its_own_grid(folder: Path, adapter: Path, tmp_path: Path, name: str) -> None:
    """As evaluation scores it, whatever its spacing and axes; the same voxels stored along other axes are the same."""
    path = folder / "images" / f"{name}.nii.gz"
    made = fedvfm.predict(adapter, path, tmp_path / "out")
    found = nibabel.load(tmp_path / "out" / f"{name}.nii.gz")
    assert np.allclose(found.affine, AFFINES[name])
    mask = np.asarray(found.dataobj)
    assert mask.shape == SHAPE
    assert len(np.unique(mask)) > 1
    site, model = site_of(folder, test=(list(AFFINES).index(name),)), fedvfm.load_adapter(adapter)
    (sample,) = site.split("test")
    logits = evaluator.logits(model, site, sample, site.whole(model, sample))
    counts = np.bincount(logits.argmax(dim=0).numpy().ravel(), minlength=3).tolist()
    assert [one["voxels"] for one in made["inputs"][0]["classes"].values()] == counts
    turned = nibabel.as_closest_canonical(nibabel.load(path))
    (tmp_path / "in").mkdir()
    turned.to_filename(tmp_path / "in" / f"{name}.nii.gz")
    fedvfm.predict(adapter, tmp_path / "in", tmp_path / "turned")
    other = nibabel.load(tmp_path / "turned" / f"{name}.nii.gz")
    np.testing.assert_array_equal(np.asarray(other.dataobj), np.asarray(nibabel.as_closest_canonical(found).dataobj))


def test_prediction_says_of_a_picture_and_a_slice_that_they_are_no_volume(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "in" / "a.png")
    nibabel.Nifti1Image(np.zeros((20, 20, 1), np.int16), np.eye(4)).to_filename(tmp_path / "in" / "b.nii.gz")
    with pytest.raises(errors.DataError) as caught:
        fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out")
    failed = json.loads((tmp_path / "out" / "summary.json").read_text())["failed"]
    assert "needs whole volumes" in failed["a"]
    assert "make no volume" in failed["b"]
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize("form", ["monai", "onnx"])
def test_an_export_computes_the_same_of_a_piece(adapter: Path, tmp_path: Path, form: str) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
    made = fedvfm.export_adapter(adapter, tmp_path / form, form)
    assert made["difference"] < 1e-4
    text = "\n".join(path.read_text() for path in (tmp_path / form).rglob("README.md"))
    assert "8 x 16 x 16 (slices, height, width of whole volumes)" in text
    assert "axes: slices from feet to head, rows from front to back, columns from the patient's right to left" in text


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_volumes_run_as_their_card_says(tmp_path: Path, plane: str) -> None:
    """Values of each voxel say how far right, front and head it is."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    far = np.indices((6, 7, 8)).astype(np.int16) + np.array([10, 20, 30], dtype=np.int16).reshape(3, 1, 1, 1)
    for number, name in enumerate(("right", "front", "head")):
        nibabel.Nifti1Image(far[number], np.eye(4)).to_filename(tmp_path / "images" / f"{name}.nii.gz")
        nibabel.Nifti1Image(np.zeros((6, 7, 8), np.uint8), np.eye(4)).to_filename(
            tmp_path / "labels" / f"{name}.nii.gz"
        )
    own = source(tmp_path, recipe(data={"plane": plane}))
    runs = {}
    for sample in own.samples():
        image = own.read(sample).image[0]
        ((axis, forwards),) = [
            (at, bool((np.diff(image, axis=at) > 0).all())) for at in range(3) if np.diff(image, axis=at).any()
        ]
        runs[axis] = sample.id if forwards else f"not {sample.id}"
    opposite = {"head": "feet", "front": "back", "right": "left"}
    to = {**{name: name for name in opposite}, **{f"not {name}": other for name, other in opposite.items()}}
    said = delivery._AXES[plane].replace("the patient's ", "")
    assert [to[runs[axis]] for axis in range(3)] == [part.split(" to ")[1] for part in said.split(", ")]


def test_a_volume_has_no_peft_and_no_hub_form(adapter: Path, tmp_path: Path) -> None:
    for form in ("peft", "hf"):
        with pytest.raises(errors.FedvfmError):
            fedvfm.export_adapter(adapter, tmp_path / form, form)
