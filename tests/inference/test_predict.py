"""Prediction of pictures and volumes: what evaluation computes, on the input's own pixels; bad files one by one."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import fedvfm
from fedvfm import errors
from fedvfm.client.training import evaluator
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import formats
from fedvfm.data import sample as samples
from fedvfm.data.volumes import nifti, slices
from fedvfm.inference import bundle, delivery, export, graph, predict
from fedvfm.model import feature_cache, sliding_window

Saver = Callable[..., Path]


def picture(path: Path, height: int = 40, width: int = 52, seed: int = 0) -> Path:
    """A smooth grey picture with structure."""
    rows, columns = np.mgrid[:height, :width]
    waves = np.sin(rows / (3 + seed)) * np.cos(columns / (5 + seed)) * 90 + 120
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(waves.astype(np.uint8)).save(path)
    return path


class OneFile:
    """A hospital of one file, as evaluation reads it."""

    name = "here"
    train: tuple[samples.Sample, ...] = ()
    val: tuple[samples.Sample, ...] = ()

    def __init__(self, pixels: samples.Pixels) -> None:
        self._pixels, self.test = pixels, (samples.Sample("one"),)

    def read(self, sample: samples.Sample) -> samples.Pixels:
        return self._pixels


def evaluated(adapter: Path, pixels: samples.Pixels, memory: int = 0) -> torch.Tensor:
    """The logits that evaluation scores."""
    model = fedvfm.load_adapter(adapter)
    site = sites.Site("here", OneFile(pixels), cache=feature_cache.FeatureCache(memory))
    sample = site.split("test")[0]
    return evaluator.logits(model, site, sample, site.whole(model, sample))


class Broken(OneFile):
    """A hospital whose file cannot be read."""

    def read(self, sample: samples.Sample) -> samples.Pixels:
        raise errors.DataError("a.png: damaged; replace it")


@pytest.mark.parametrize(
    ("hospital", "words"),
    [
        (Broken(samples.Pixels(np.zeros((1, 30, 30), np.float32))), "a.png: damaged; replace it"),
        (OneFile(samples.Pixels(np.zeros((2, 30, 30), np.float32))), "an image of shape (2, 30, 30); (1 or 3, height"),
    ],
    ids=["read", "prepare"],
)
def test_a_fault_at_a_site_names_site_and_sample_once(saved: Saver, hospital: OneFile, words: str) -> None:
    model = fedvfm.load_adapter(saved())
    site = sites.Site("here", hospital)
    with pytest.raises(errors.DataError) as caught:
        site.whole(model, hospital.test[0])
    assert str(caught.value).startswith(f"site 'here', sample 'one': {words}")
    with pytest.raises(errors.DataError) as trained:
        site.example(model, hospital.test[0], -1, ("round", 1))
    assert str(trained.value) == str(caught.value)


@pytest.mark.parametrize("fit", ["resize", "native"])
def test_the_mask_is_what_evaluation_scores(saved: Saver, tmp_path: Path, fit: str) -> None:
    adapter = saved(fit=fit)
    path = picture(tmp_path / "in" / "a.png", 70, 100)
    made = fedvfm.predict(adapter, path, tmp_path / "out")
    pixels = samples.Pixels(formats.read_image(path))
    expected = torch.nn.functional.interpolate(
        evaluated(adapter, pixels)[None], size=(70, 100), mode="bilinear", align_corners=False
    )[0].argmax(dim=0)
    mask = formats.read_mask(tmp_path / "out" / "a.png")
    np.testing.assert_array_equal(mask, expected.numpy())
    assert len(np.unique(mask)) > 1
    (row,) = made["inputs"]
    assert row["size"] == [70, 100]
    assert {name: found["voxels"] for name, found in row["classes"].items()} == dict(
        zip(["rest", "cell", "wall"], np.bincount(mask.ravel(), minlength=3).tolist(), strict=True)
    )
    with Image.open(tmp_path / "out" / "a.png") as stored:
        assert stored.mode == "P"
        assert stored.convert("RGB").getcolors() is not None
        assert len(stored.convert("RGB").getcolors()) == len(np.unique(mask))


def test_evaluation_with_and_without_kept_blocks_agree(saved: Saver) -> None:
    pixels = samples.Pixels(np.random.default_rng(3).random((1, 70, 90), dtype=np.float32))
    adapter = saved("segmentation", "head-only", fit="native")
    torch.testing.assert_close(evaluated(adapter, pixels, 2**24), evaluated(adapter, pixels), rtol=1e-5, atol=1e-5)


def test_classification_of_a_large_native_image_is_the_mean_of_its_windows(saved: Saver) -> None:
    model = fedvfm.load_adapter(saved("classification", fit="native"))
    image = np.random.default_rng(0).random((3, 28, 56), dtype=np.float32)
    seen = []

    def run(parts: Any) -> torch.Tensor:
        seen.extend((part.corner, part.image.shape) for part in parts)
        return torch.tensor([[float(part.corner[1]), 0.0, 1.0] for part in parts])

    found = sliding_window.logits(model, image, run)
    assert {shape for _, shape in seen} == {(3, 28, 28)}
    assert len(seen) > 1
    torch.testing.assert_close(found, torch.tensor([float(np.mean([c[1] for c, _ in seen])), 0.0, 1.0]))


def test_a_folder_of_everything(saved: Saver, tmp_path: Path) -> None:
    source = tmp_path / "in"
    picture(source / "a.png")
    picture(source / "deep" / "b.jpg", 30, 31)
    picture(source / "c.tif")
    (source / "notes.txt").write_text("not an image")
    picture(source / ".hidden.png")
    volume(source / "v.nii.gz")
    events = []
    made = fedvfm.predict(
        saved(), source, tmp_path / "out", overlays=True, observer=lambda event, **f: events.append((event, f))
    )
    assert [row["id"] for row in made["inputs"]] == ["a", "c", "v", "deep/b"]
    assert {event for event, _ in events} == {"input", "slice"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == made
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    told = {name for row in made["inputs"] for name in row["files"]}
    assert files == told | {"summary.json", "volumes.csv"}
    assert {"a.png", "deep/b.png", "c.png", "v.nii.gz", "overlays/a.png", "overlays/deep/b.png"} <= files
    with Image.open(tmp_path / "out" / "overlays" / "deep" / "b.png") as shown:
        assert shown.size == (31, 30)
        assert shown.mode == "RGB"


def test_inputs_of_one_name_keep_their_endings(saved: Saver, tmp_path: Path) -> None:
    for name in ("a.png", "A.jpg", "b.png"):
        picture(tmp_path / "in" / name)
    made = fedvfm.predict(saved(), tmp_path / "in", tmp_path / "out")
    assert [row["files"] for row in made["inputs"]] == [["A.jpg.png"], ["a.png.png"], ["b.png"]]


def test_a_result_never_replaces_another(saved: Saver, tmp_path: Path) -> None:
    for name in ("x.png", "overlays/x.png"):
        picture(tmp_path / "in" / name)
    with pytest.raises(errors.DataError, match="would replace that of another input"):
        fedvfm.predict(saved(), tmp_path / "in", tmp_path / "out", overlays=True)


def volume(path: Path, shape: tuple[int, ...] = (20, 24, 3), codes: tuple[int, int] = (1, 1)) -> Path:
    """An oblique, anisotropic volume with an asymmetric bright block, stored L, P, S."""
    rng = np.random.default_rng(0)
    values = rng.normal(100, 5, shape).astype(np.float32)
    values[3:9, 5:20] += 200
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.5, -0.8, 4.0])
    affine[:3, 3] = [10.0, -20.0, 30.0]
    image = nibabel.Nifti1Image(values, affine)
    image.set_sform(affine if codes[0] else None, code=codes[0])
    image.set_qform(affine if codes[1] else None, code=codes[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize(
    ("name", "codes"), [("v.nii.gz", (1, 1)), ("v.nii", (2, 0)), ("v.nii.gz", (0, 3)), ("v.nii", (0, 0))]
)
def test_a_nifti_keeps_its_geometry(saved: Saver, tmp_path: Path, name: str, codes: tuple[int, int]) -> None:
    path = volume(tmp_path / name, codes=codes)
    made = fedvfm.predict(saved(), path, tmp_path / "out")
    given, found = nibabel.load(path), nibabel.load(tmp_path / "out" / name)
    assert found.shape == given.shape
    np.testing.assert_allclose(found.affine, given.affine, atol=1e-5)
    for key in ("sform_code", "qform_code"):
        assert int(found.header[key]) == int(given.header[key]) == codes[key == "qform_code"]
    labels = np.asanyarray(found.dataobj)
    assert labels.dtype == np.uint8
    assert 1 < len(np.unique(labels)) <= 3
    (row,) = made["inputs"]
    for number, count in enumerate(row["classes"].values()):
        assert count["voxels"] == int((labels == number).sum())
        assert count["mm3"] == pytest.approx(count["voxels"] * 1.5 * 0.8 * 4.0, rel=1e-6)
        assert count["ml"] == pytest.approx(count["mm3"] / 1000)
    with (tmp_path / "out" / "volumes.csv").open(newline="") as file:
        (measured,) = csv.DictReader(file)
    assert measured.pop("id") == "v"
    assert measured == {f"{name}_ml": str(row["classes"][name]["ml"]) for name in ("cell", "wall")}


def test_what_headers_leave_in_doubt_is_told_once_a_note(saved: Saver, tmp_path: Path) -> None:
    for name in ("a", "b"):
        volume(tmp_path / "in" / f"{name}.nii.gz", codes=(0, 0))
    volume(tmp_path / "in" / "sure.nii.gz")
    for task in ("segmentation", "classification"):
        made = fedvfm.predict(saved(task), tmp_path / "in", tmp_path / task)
        assert made["notes"] == {nifti.NO_AFFINE: ["a", "b"]}
        assert json.loads((tmp_path / task / "summary.json").read_text())["notes"] == made["notes"]


def test_slices_of_a_volume_are_what_the_folder_source_reads(saved: Saver, tmp_path: Path) -> None:
    """The mask of a slice lies on the voxels of that slice: compared by physical point with evaluation of the slice."""
    adapter, path = saved(), volume(tmp_path / "v.nii.gz")
    fedvfm.predict(adapter, path, tmp_path / "out")
    stored = np.asanyarray(nibabel.load(tmp_path / "out" / "v.nii.gz").dataobj)
    for index in range(3):
        pixels = slices.read([path], index)
        expected = torch.nn.functional.interpolate(
            evaluated(adapter, pixels)[None], size=pixels.image.shape[1:], mode="bilinear", align_corners=False
        )[0].argmax(dim=0)
        # Stored axes run left, back, up; a slice is shown with rows to the back and columns to the left.
        np.testing.assert_array_equal(stored[:, :, index].T, expected.numpy())


def test_slices_are_mixed_with_their_neighbours_as_the_recipe_says(saved: Saver, tmp_path: Path) -> None:
    path = volume(tmp_path / "v.nii.gz", (20, 24, 6))
    task = {"kind": "segmentation", "options": {"neighbours": 0.3}}
    fedvfm.predict(saved(task), path, tmp_path / "out")
    fedvfm.predict(saved(), path, tmp_path / "plain")
    stored, plain = (np.asanyarray(nibabel.load(tmp_path / name / "v.nii.gz").dataobj) for name in ("out", "plain"))
    logits = np.stack([evaluated(saved(task), slices.read([path], index)) for index in range(6)])
    mixed = torch.from_numpy(ndimage.convolve1d(logits, [0.3, 0.4, 0.3], axis=0, mode="nearest"))
    expected = torch.nn.functional.interpolate(mixed, size=(24, 20), mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(stored.transpose(2, 1, 0), expected.argmax(dim=1).numpy())
    assert (stored != plain).any()
    model = fedvfm.load_adapter(saved(task))
    note = (
        "- afterwards, in volumes: a slice's logits times 0.4 and each neighbour's times 0.3, at the ends its own in "
        "place of one that is not there; `fedvfm predict` does so itself"
    )
    for card in (graph.card(model, [], []), bundle._card(model)):  # of networks that normalise, and do not mix
        assert note in card.splitlines()
        assert "then normalised" not in card
    assert [*delivery.what_is_prepared(model), delivery.normalisation_line(model)] == delivery.what_goes_in(model)
    assert "then normalised" in delivery.normalisation_line(model)


@pytest.mark.parametrize("contract", [{"plane": "coronal"}, {"stack": 3}, {"window": [150.0, 400.0]}], ids=str)
def test_volumes_are_cut_stacked_and_windowed_as_the_recipe_says(
    saved: Saver, tmp_path: Path, contract: dict[str, Any]
) -> None:
    adapter, path = saved(**contract), volume(tmp_path / "v.nii.gz")
    fedvfm.predict(adapter, path, tmp_path / "out", overlays=True)
    labels = np.asanyarray(nibabel.load(tmp_path / "out" / "v.nii.gz").dataobj)
    view = slices.View.of(fedvfm.load_adapter(adapter).recipe.data)
    # Stored axes run left, back, up; coronal slices are shown with rows to the feet and columns to the left.
    for index in range(labels.shape[1] if view.plane == "coronal" else labels.shape[2]):
        pixels = slices.read([path], index, view)
        assert len(pixels.image) == view.stack
        mask = torch.nn.functional.interpolate(
            evaluated(adapter, pixels)[None], size=pixels.image.shape[1:], mode="bilinear", align_corners=False
        )[0].argmax(dim=0)
        stored = labels[:, ::-1][:, index, ::-1] if view.plane == "coronal" else labels[:, :, index]
        np.testing.assert_array_equal(stored.T, mask.numpy())


def test_what_a_site_could_not_train_on_is_not_predicted(saved: Saver, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    with pytest.raises(errors.DataError, match=r"recipe\.data\.window needs values in units"):
        fedvfm.predict(saved(window=[150.0, 400.0]), path, tmp_path / "window")
    with pytest.raises(errors.DataError, match=r"recipe\.data\.stack needs neighbouring slices"):
        fedvfm.predict(saved(stack=3), path, tmp_path / "stack")


def test_a_volume_as_png_slices(saved: Saver, tmp_path: Path) -> None:
    made = fedvfm.predict(saved(), volume(tmp_path / "v.nii.gz"), tmp_path / "out", form="png")
    assert made["inputs"][0]["files"] == [f"v/z{at:03d}.png" for at in range(3)]
    assert formats.read_mask(tmp_path / "out" / "v" / "z001.png").shape == (24, 20)


def test_classification_is_one_table(saved: Saver, tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "in" / f"{name}.png", seed=ord(name) - 97)
    volume(tmp_path / "in" / "v.nii.gz")
    adapter = saved("classification")
    made = fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out")
    with (tmp_path / "out" / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["a", "b", "v", "v/z000", "v/z001", "v/z002"]
    assert list(rows[0]) == ["id", "class", "p_rest", "p_cell", "p_wall"]
    expected = evaluated(adapter, samples.Pixels(formats.read_image(tmp_path / "in" / "a.png"))).softmax(dim=0)
    found = [float(rows[0][f"p_{name}"]) for name in ("rest", "cell", "wall")]
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)
    assert rows[0]["class"] == ["rest", "cell", "wall"][int(expected.argmax())]
    # A volume is scored by the mean of its slices, so that is what is delivered of it.
    for name in ("rest", "cell", "wall"):
        mean = np.mean([float(row[f"p_{name}"]) for row in rows[3:]])
        assert float(rows[2][f"p_{name}"]) == pytest.approx(mean, abs=2e-6)
    assert made["inputs"][0]["probabilities"]["rest"] == found[0]
    assert not list((tmp_path / "out").rglob("*.png"))


# -- bad input -------------------------------------------------------------------------------------------------------


def broken(folder: Path) -> dict[str, str]:
    """Bad files, and what their reason must say."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cut.png").write_bytes(picture(folder / "good.png").read_bytes()[:60])
    (folder / "text.jpg").write_text("no picture")
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(folder / "pixel.png")
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(folder / "nan.tif")
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 2, 3), np.float32), np.eye(4)), folder / "film.nii.gz")
    (folder / "cut.nii").write_bytes(volume(folder / "fine.nii").read_bytes()[:400])
    return {
        "cut.png": "cut short",
        "cut.nii": "cut short",
        "text": "unreadable picture",
        "pixel": "at least 2 x 2",
        "nan": "16-bit grey",
        "film": "save each channel or time on its own",
    }


def test_bad_files_are_told_one_by_one_and_others_go_on(saved: Saver, tmp_path: Path) -> None:
    reasons = broken(tmp_path / "in")
    with pytest.raises(errors.DataError) as caught:
        fedvfm.predict(saved(), tmp_path / "in", tmp_path / "out")
    made = json.loads((tmp_path / "out" / "summary.json").read_text())
    done = [row["id"] for row in made["inputs"]]
    assert "good" in done
    assert "fine" in done
    assert set(made["failed"]) == set(reasons)
    for name, words in reasons.items():
        assert words in made["failed"][name], (name, made["failed"][name])
        assert name in str(caught.value)
    assert f"{len(reasons)} of {len(reasons) + len(done)} inputs could not be used" in str(caught.value)
    assert len(caught.value.faults) == len(reasons)
    written = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {"summary.json", "good.png", "fine.nii", "volumes.csv"}


def test_a_volume_that_breaks_half_way_leaves_nothing(
    saved: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = predict.slices.read

    def fail_late(files: Any, index: int, view: Any) -> samples.Pixels:
        if index == 2:
            raise errors.DataError("slice 2 is damaged")
        return read(files, index, view)

    monkeypatch.setattr(predict.slices, "read", fail_late)
    with pytest.raises(errors.DataError, match="slice 2 is damaged"):
        fedvfm.predict(saved(), volume(tmp_path / "v.nii.gz"), tmp_path / "out", overlays=True)
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["summary.json"]


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"form": "tiff"}, errors.ConfigError, "give one of auto, png, nifti, dicom-seg"),
        ({"device": "tpu"}, errors.ConfigError, "cpu, cuda, cuda:N, mps or auto"),
        ({"form": "nifti"}, errors.DataError, "--as png"),
        ({"form": "dicom-seg"}, errors.DataError, "--as png"),
    ],
)
def test_wrong_settings(saved: Saver, tmp_path: Path, options: dict[str, str], kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        fedvfm.predict(saved(), picture(tmp_path / "a.png"), tmp_path / "out", **options)


def test_a_nifti_is_no_dicom(saved: Saver, tmp_path: Path) -> None:
    with pytest.raises(errors.DataError, match="--as nifti"):
        fedvfm.predict(saved(), volume(tmp_path / "v.nii.gz"), tmp_path / "out", form="dicom-seg")


def test_nothing_to_predict(saved: Saver, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.DataError, match="nothing to predict"):
        fedvfm.predict(saved(), tmp_path / "empty", tmp_path / "out")
    with pytest.raises(errors.DataError, match="no such file or folder"):
        fedvfm.predict(saved(), tmp_path / "gone", tmp_path / "out")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(errors.DataError, match="no volume"):
        fedvfm.predict(saved(), tmp_path / "a.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_output_must_be_free_and_apart(saved: Saver, tmp_path: Path) -> None:
    source = picture(tmp_path / "in" / "a.png")
    used = tmp_path / "used"
    used.mkdir()
    (used / "x").touch()
    with pytest.raises(errors.OutputInUse, match="not empty"):
        fedvfm.predict(saved(), source, used)
    with pytest.raises(errors.OutputInUse, match="is a file"):
        fedvfm.predict(saved(), source, source)
    with pytest.raises(errors.OutputInUse, match="lies inside the input"):
        fedvfm.predict(saved(), source.parent, source.parent / "out")


def test_another_or_no_backbone_and_no_adapter(saved: Saver, tiny_dino: Path, tmp_path: Path) -> None:
    import shutil

    source = picture(tmp_path / "a.png")
    with pytest.raises(errors.CheckpointError, match="no adapter of this fedvfm"):
        fedvfm.predict(tmp_path, source, tmp_path / "out")
    other = tmp_path / "other"
    shutil.copytree(tiny_dino, other)
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(errors.WeightsError, match="sha256"):
        fedvfm.predict(saved(), source, tmp_path / "out", backbone=str(other))
    (other / "model.safetensors").unlink()
    with pytest.raises(errors.WeightsError, match="safetensors"):
        fedvfm.predict(saved(), source, tmp_path / "out", backbone=str(other))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_shape_is_refused(saved: Saver, tmp_path: Path) -> None:
    import shutil

    mixed = tmp_path / "mixed"
    shutil.copytree(saved(), mixed)
    shutil.copy(saved(class_names=["rest", "cell"]) / export.STATE, mixed / export.STATE)
    with pytest.raises(errors.CheckpointError, match="not of the same adapter"):
        fedvfm.predict(mixed, picture(tmp_path / "a.png"), tmp_path / "out")


@pytest.mark.files("nothing", "one bad file in prediction", "", "the others get their results; the summary says why")
def test_every_file_gets_its_result_or_its_reason(
    saved: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nibabel import cifti2

    root = tmp_path / "in"
    picture(root / "good.png")
    picture(root / "breaks.png")
    axes = (cifti2.ScalarAxis(["thickness"]), cifti2.ScalarAxis([f"v{at}" for at in range(20)]))
    surface = cifti2.Cifti2Image(np.zeros((1, 20), np.float32), header=axes)
    surface.to_filename(root / "sub-01.dscalar.nii")
    (root / "notes.txt").write_text("x")
    (root / "case.seg.nrrd").write_bytes(b"NRRD0004")
    (root / ".hidden").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (root / "more").symlink_to(tmp_path / "elsewhere")
    original = formats.read_shown

    def read(path: Path) -> Any:
        return 1 / 0 if path.name == "breaks.png" else original(path)

    monkeypatch.setattr(formats, "read_shown", read)
    with pytest.raises(errors.DataError, match="2 of 3 inputs could not be used"):
        fedvfm.predict(saved(), root, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["id"] for row in made["inputs"]] == ["good"]
    assert "no volume of voxels" in made["failed"]["sub-01.dscalar"]
    assert made["failed"]["breaks"] == (
        "the reader broke (ZeroDivisionError); if the file is sound, report the kind of error"
    )
    assert made["unread"] == {
        "case.seg.nrrd": "a segmentation of 3D Slicer, no image",
        "more": "a link to a folder, which is not followed",
        "notes.txt": "ending '.txt' is not read",
    }


def test_a_result_that_cannot_be_written_ends_no_other(saved: Saver, tmp_path: Path) -> None:
    """Names as long as the disk takes: the result's is longer, and so is that of the file it is written through."""
    picture(tmp_path / "in" / f"{'m' * 251}.png")
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "z.png")
    picture(tmp_path / "in" / f"{'n' * 251}.png")
    with pytest.raises(errors.DataError, match="2 of 4 inputs could not be used"):
        fedvfm.predict(saved(), tmp_path / "in", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["id"] for row in summary["inputs"]] == ["a", "z"]
    assert sorted(name[0] for name in summary["failed"]) == ["m", "n"]


@pytest.mark.files("harm", "the same in prediction", "", "`predict --memory-mib`, `--seconds`; that file alone fails")
def test_limits_of_decoding_are_those_that_were_given(saved: Saver, tmp_path: Path) -> None:
    picture(tmp_path / "in" / "b.png")
    image = nibabel.Nifti1Image(np.zeros((512, 512, 70), np.uint8), np.eye(4))
    image.header.set_slope_inter(0.5, 0.0)  # read as float32: 73 MB
    nibabel.save(image, tmp_path / "in" / "a.nii.gz")
    made = predict.run(saved(), tmp_path / "in", tmp_path / "out", limits=schema.DecodingLimits(memory_mib=64))
    assert [row["id"] for row in made["inputs"]] == ["b"]
    assert "64 MiB of memory" in made["failed"]["a"]
    assert "--memory-mib" in made["failed"]["a"]
