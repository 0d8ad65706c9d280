"""Cases of several files: a model of three channels gets the files together, as in training; one of one gets one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import fedvfm
from fedvfm import errors
from fedvfm.client.training import evaluator
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.sources import table
from fedvfm.inference import channels
from tests.data import dicom_writer as writer

Saver = Callable[..., Path]

NAMED = ("FLAIR", "T1w", "T2w")
TURNED = np.array([[-1.5, 0.2, 0, 4], [0.2, 0.9, 0, -7], [0, 0, 3.0, 2], [0, 0, 0, 1]])


def channel(path: Path, seed: int, affine: np.ndarray = TURNED, shape: tuple[int, ...] = (20, 16, 3)) -> Path:
    rng = np.random.default_rng(seed)
    values = rng.normal(100, 5, shape)
    values[2 : 5 + 2 * seed, 3:12] += 40 * (seed + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), path)
    return path


def nnunet(root: Path, count: int = 3, cases: str = "ab") -> Path:
    """A set of nnU-Net with named channels; masks are there because a source asks for them."""
    for at, name in enumerate(cases):
        for number in range(count):
            channel(root / "imagesTr" / f"{name}_{number:04d}.nii.gz", number + 3 * at)
        mask = np.zeros((20, 16, 3), np.uint8)
        mask[2:6, 3:9, 1] = 1
        (root / "labelsTr").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(mask, TURNED), root / "labelsTr" / f"{name}.nii.gz")
    names = {str(number): name for number, name in enumerate((*NAMED, "T1gd")[:count])}
    labels = {"rest": 0, "cell": 1, "wall": 2}
    (root / "dataset.json").write_text(json.dumps({"channel_names": names, "labels": labels, "file_ending": ".nii.gz"}))
    return root


def source_of(root: Path, adapter: Path, **options: Any) -> Any:
    recipe = fedvfm.load_adapter(adapter).recipe
    settings = schema.SourceConfig(source="folder", path=str(root), options={"ids": "names", **options})
    return table.make(settings, recipe.data)


def evaluated(adapter: Path, source: Any) -> dict[str, np.ndarray]:
    """Sample -> classes as evaluation finds them at a site, on the image's own pixels."""
    model, found = fedvfm.load_adapter(adapter), {}
    (hospital,) = virtual_hospitals.make_hospitals(source, schema.PartitionConfig(kind="iid", sites=1), 0)
    site = sites.Site("here", hospital)
    for one in source.samples():
        whole = site.whole(model, one)
        size = source.read(one).image.shape[1:]
        logits = torch.nn.functional.interpolate(
            evaluator.logits(model, site, one, whole)[None], size=size, mode="bilinear", align_corners=False
        )
        found[one.id] = logits[0].argmax(dim=0).numpy()
    return found


def predicted(folder: Path, name: str) -> list[np.ndarray]:
    """Axial slices of a mask as they are shown: stored axes run left, front, up, so both are turned."""
    stored = np.asanyarray(nibabel.load(folder / f"{name}.nii.gz").dataobj)
    return [stored[:, ::-1, at].T for at in range(stored.shape[2])]


def test_a_grouped_case_is_what_evaluation_computes(saved: Saver, tmp_path: Path) -> None:
    adapter, root = saved(channels=NAMED), nnunet(tmp_path / "set")
    made = fedvfm.predict(adapter, root / "imagesTr", tmp_path / "out")
    assert [row["id"] for row in made["inputs"]] == ["a", "b"]
    expected = evaluated(adapter, source_of(root, adapter))
    classes = set()
    for name in "ab":
        for at, mask in enumerate(predicted(tmp_path / "out", name)):
            np.testing.assert_array_equal(mask, expected[f"{name}-z{at:03d}"])
            classes |= set(np.unique(mask))
    assert len(classes) > 1
    # Another order of the files is another image.
    fedvfm.predict(adapter, root / "imagesTr", tmp_path / "turned", channels="2,1,0")
    turned = predicted(tmp_path / "turned", "a")
    assert any((one != expected[f"a-z{at:03d}"]).any() for at, one in enumerate(turned))


def test_one_file_of_a_case_brings_the_others(saved: Saver, tmp_path: Path) -> None:
    root = nnunet(tmp_path / "set")
    made = fedvfm.predict(saved(channels=NAMED), root / "imagesTr" / "b_0001.nii.gz", tmp_path / "out")
    assert [row["id"] for row in made["inputs"]] == ["b"]
    fedvfm.predict(saved(channels=NAMED), root / "imagesTr", tmp_path / "all")
    for one, other in zip(predicted(tmp_path / "out", "b"), predicted(tmp_path / "all", "b"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_chosen_channels_are_those_of_the_source(saved: Saver, tmp_path: Path) -> None:
    adapter, root = saved(channels=("T1w", "T2w", "T1gd")), nnunet(tmp_path / "set", count=4)
    with pytest.raises(
        errors.DataError, match=r"a: files _0000, _0001, _0002, _0003: _0003 besides, but the model takes 3"
    ):
        fedvfm.predict(adapter, root / "imagesTr", tmp_path / "surplus")
    fedvfm.predict(adapter, root / "imagesTr", tmp_path / "out", channels="1,2,3")
    expected = evaluated(adapter, source_of(root, adapter, channels=[1, 2, 3]))
    for at, mask in enumerate(predicted(tmp_path / "out", "a")):
        np.testing.assert_array_equal(mask, expected[f"a-z{at:03d}"])


def test_a_model_of_one_channel_takes_the_one_that_is_chosen(saved: Saver, tmp_path: Path) -> None:
    adapter, root = saved(channels=("T1w",)), nnunet(tmp_path / "set")
    with pytest.raises(
        errors.DataError, match=r"3 files \(_0000, _0001, _0002\) that are channels of one case"
    ) as caught:
        fedvfm.predict(adapter, root / "imagesTr", tmp_path / "out")
    assert "the model takes one (T1w): say which with --channels 0" in str(caught.value)
    assert len(caught.value.faults) == 2
    fedvfm.predict(adapter, root / "imagesTr", tmp_path / "chosen", channels="1")
    expected = evaluated(adapter, source_of(root, adapter, channels=[1]))
    for at, mask in enumerate(predicted(tmp_path / "chosen", "a")):
        np.testing.assert_array_equal(mask, expected[f"a-z{at:03d}"])
    made = fedvfm.predict(adapter, root / "imagesTr" / "a_0001.nii.gz", tmp_path / "alone")
    assert [row["id"] for row in made["inputs"]] == ["a_0001"]


def failed(adapter: Path, folder: Path, out: Path) -> dict[str, str]:
    with pytest.raises(errors.DataError):
        fedvfm.predict(adapter, folder, out)
    found: dict[str, str] = json.loads((out / "summary.json").read_text())["failed"]
    return found


def test_what_does_not_fit_is_told_case_by_case(saved: Saver, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(3):
        channel(folder / f"good_{number:04d}.nii.gz", number)
        channel(folder / "deeper" / f"moved_{number:04d}.nii.gz", number, np.diag([1.0, 1, 1 + number, 1]))
    for number in (0, 2):
        channel(folder / f"gap_{number:04d}.nii.gz", number)
    channel(folder / "alone.nii.gz", 0)
    Image.fromarray(np.arange(900, dtype=np.uint8).reshape(30, 30)).save(folder / "grey.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)).save(folder / "colour_0000.png")
    channel(folder / "mixed_0000.nii.gz", 0)
    for number in (1, 2):
        Image.fromarray(np.arange(900, dtype=np.uint8).reshape(30, 30)).save(folder / f"mixed_{number:04d}.png")
    found = failed(saved(channels=NAMED), folder, tmp_path / "out")
    reasons = {
        "deeper/moved": "differ in size, spacing or place; resample one onto the other",
        "gap": "files _0000, _0002: no _0001, but the model takes 3 (FLAIR, T1w, T2w); bring a file for each",
        "alone": "NAME_0000.nii.gz (FLAIR), NAME_0001.nii.gz (T1w), NAME_0002.nii.gz (T2w)",
        "grey": "an image of 1 channel, but recipe.data.channels names 3 (FLAIR, T1w, T2w)",
        "mixed": "pictures and volumes mixed",
    }
    assert set(found) == set(reasons)
    for name, words in reasons.items():
        assert words in found[name], (name, found[name])
    made = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["id"] for row in made["inputs"]] == ["colour_0000", "good"]


def test_pictures_of_one_case(saved: Saver, tmp_path: Path) -> None:
    adapter, rng = saved(channels=NAMED), np.random.default_rng(0)
    planes = rng.integers(0, 255, (30, 34, 3), np.uint8)
    (tmp_path / "in").mkdir()
    for number in range(3):
        Image.fromarray(planes[..., number]).save(tmp_path / "in" / f"x_{number:04d}.png")
    Image.fromarray(planes).save(tmp_path / "in" / "whole.png")
    fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out", overlays=True)
    masks = [np.asarray(Image.open(tmp_path / "out" / f"{name}.png")) for name in ("x", "whole")]
    np.testing.assert_array_equal(*masks)


def test_a_numbering_is_not_taken_for_channels(saved: Saver, tmp_path: Path) -> None:
    """Many sets count from _0000; only what must be channels is refused."""
    for number in range(4):
        Image.fromarray(np.arange(900, dtype=np.uint8).reshape(30, 30)).save(tmp_path / f"scan_{number:04d}.png")
        channel(tmp_path / f"ct_{number:04d}.nii.gz", number, shape=(20, 16, 2 + number))
    channel(tmp_path / "mr_0007.nii.gz", 0)
    channel(tmp_path / "mr_0008.nii.gz", 0)
    made = fedvfm.predict(saved(), tmp_path, tmp_path.parent / f"{tmp_path.name}-out")
    assert len(made["inputs"]) == 10


def test_series_of_grey_dicom_are_not_channels(saved: Saver, tmp_path: Path) -> None:
    writer.series(tmp_path / "in", np.zeros((20, 16, 2), np.int16), np.diag([1.0, 1, 2, 1]))
    found = failed(saved(channels=NAMED), tmp_path / "in", tmp_path / "out")
    assert found["series-001"].startswith("1 channel, but recipe.data.channels names 3")


@pytest.mark.parametrize(
    ("named", "text", "words"),
    [
        (NAMED, "0,1", "2 channel numbers, but the model takes 3 (FLAIR, T1w, T2w)"),
        ((), "0,1,2", "3 channel numbers, but the model takes one file a case"),
        ((), "a", "'a': give different channel numbers from 0, like 0,1,3"),
        (NAMED, "0,0,1", "give different channel numbers"),
    ],
)
def test_numbers_that_cannot_be(saved: Saver, tmp_path: Path, named: tuple[str, ...], text: str, words: str) -> None:
    channel(tmp_path / "in" / "a_0000.nii.gz", 0)
    with pytest.raises(errors.ConfigError) as caught:
        fedvfm.predict(saved(channels=named), tmp_path / "in", tmp_path / "out", channels=text)
    assert words in str(caught.value)
    assert channels.read_numbers(" 0, 2 ,1") == (0, 2, 1)


# --- what a site is told ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "options", "words"),
    [
        ((), {}, "one of 3 channels in files of their own, but recipe.data.channels names none"),
        (("T1w",), {}, "3 channels, but recipe.data.channels names 1 (T1w); choose with data.options.channels"),
        (("T1w",), {"channels": [0]}, "the channels taken are FLAIR, but recipe.data.channels names 1 (T1w); set "
         "data.options.channels = [1]"),
        (("T2w", "T1w", "FLAIR"), {}, "data.options.channels = [2, 1, 0]"),
        (NAMED, {"channels": [0]}, "1 channel, but recipe.data.channels names 3 (FLAIR, T1w, T2w); bring a file for "
         "each"),
    ],
)  # fmt: skip
def test_a_site_is_refused_other_channels(
    saved: Saver, tmp_path: Path, named: tuple[str, ...], options: dict[str, Any], words: str
) -> None:
    root = nnunet(tmp_path / "set")
    with pytest.raises(errors.DataError) as caught:
        source_of(root, saved(channels=named), **options)
    assert words in str(caught.value)


def test_an_adapter_of_before_there_were_names_of_channels_still_loads(saved: Saver, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved(), tmp_path / "adapter"))
    about = json.loads((folder / "fedvfm.json").read_text())
    del about["recipe"]["data"]["channels"]
    (folder / "fedvfm.json").write_text(json.dumps(about))
    model = fedvfm.load_adapter(folder)
    assert model.recipe.data.channels == ()
    assert model.recipe_hash == fedvfm.load_adapter(saved()).recipe_hash
    about["recipe"]["data"]["channels"] = list(NAMED)
    (folder / "fedvfm.json").write_text(json.dumps(about))
    with pytest.raises(errors.CheckpointError, match=r"the recipe in fedvfm\.json is not the one"):
        fedvfm.load_adapter(folder)


def test_channels_of_other_names_count_by_their_order(saved: Saver, tmp_path: Path) -> None:
    root = nnunet(tmp_path / "set")
    assert len(source_of(root, saved(channels=("a", "b", "c"))).samples()) == 6
    assert len(source_of(root, saved(channels=("t2W",)), channels=[2]).samples()) == 6


@pytest.mark.parametrize(
    "changes", [{"channels": ["a", "b"]}, {"channels": ["a", "A", "b"]}, {"channels": NAMED, "grey": True},
                {"channels": NAMED, "stack": 3}], ids=str,
)  # fmt: skip
def test_contracts_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match="three"):
        schema.parse(schema.DataContract, {"class_names": ["a", "b"], **changes}, "recipe.data")


def test_a_lacking_channel_is_black_as_in_evaluation(saved: Saver, tmp_path: Path) -> None:
    more = {"optional_channels": ["T1w"], "augment": ["channel-dropout"]}
    adapter, root = saved(channels=NAMED, **more), nnunet(tmp_path / "set")
    for file in (root / "imagesTr").glob("*_0001*"):
        file.unlink()
    made = fedvfm.predict(adapter, root / "imagesTr", tmp_path / "out", channels="0,-,2")
    assert [row["id"] for row in made["inputs"]] == ["a", "b"]
    whole = nnunet(tmp_path / "whole")
    settings = schema.SourceConfig(
        source="folder", path=str(whole), options={"ids": "names"}, channels={"FLAIR": 0, "T2w": "T2w"}
    )
    expected = evaluated(adapter, table.make(settings, fedvfm.load_adapter(adapter).recipe.data))
    for at, mask in enumerate(predicted(tmp_path / "out", "a")):
        np.testing.assert_array_equal(mask, expected[f"a-z{at:03d}"])
    with pytest.raises(errors.ConfigError, match=r"'-' for T2w: the model may lack T1w"):
        fedvfm.predict(adapter, root / "imagesTr", tmp_path / "no", channels="0,1,-")
    with pytest.raises(errors.ConfigError, match="give different channel numbers"):
        channels.read_numbers("-,-")
