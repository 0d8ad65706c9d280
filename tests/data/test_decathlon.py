"""The decathlon's images of four axes: channels that dataset.json names, read one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data.sources import folder

NAMES = ["FLAIR", "T1w", "t1gd", "T2w"]
AFFINE = np.array([[0, -1.5, 0, 3], [2.0, 0, 0, 5], [0, 0, 3.0, 7], [0, 0, 0, 1]])


def write(root: Path, voxels: np.ndarray, ending: str = ".nii.gz", names: Any = NAMES) -> Path:
    """Two cases and the list."""
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
    listed = []
    for name in ("BRATS_1", "BRATS_2"):
        image, label = f"imagesTr/{name}{ending}", f"labelsTr/{name}{ending}"
        nibabel.Nifti1Image(voxels, AFFINE).to_filename(root / image)
        nibabel.Nifti1Image((voxels[..., 0] > 50).astype(np.uint8), AFFINE).to_filename(root / label)
        listed.append({"image": image, "label": label})
    settings = {"training": listed, "labels": {"0": "background", "1": "tumour"}}
    settings |= {"modality": {str(at): name for at, name in enumerate(names)}} if names else {}
    (root / "dataset.json").write_text(json.dumps(settings))
    return root


def voxels(kind: str = "i2") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, (6, 5, 4, 4)).astype(kind)


def make(root: Path, **options: object) -> folder.Folder:
    return folder.Folder(
        schema.SourceConfig.model_validate({"source": "folder", "path": str(root), "options": options})
    )


def contract(*names: str) -> schema.DataContract:
    return schema.DataContract(class_names=("background", "tumour"), channels=names)


@pytest.mark.files(
    "places",
    "four axes of the decathlon",
    "Antonelli et al. 2022",
    "the channels that `modality` names, chosen as those in files of their own",
)
@pytest.mark.parametrize(("ending", "kind"), [(".nii.gz", "i2"), (".nii", "i2"), (".nii", "f4"), (".nii.gz", "f8")])
def test_channels_of_one_file_are_those_of_files_of_their_own(tmp_path: Path, ending: str, kind: str) -> None:
    """Each channel as a file of its own gives the same pixels, spacing and mask."""
    stored = voxels(kind)
    whole = make(write(tmp_path / "whole", stored, ending), channels=[3, 0, 2]).under(contract("T2w", "FLAIR", "t1gd"))
    write(tmp_path / "apart", stored, ending)
    settings = json.loads((tmp_path / "apart" / "dataset.json").read_text())
    for entry in settings["training"]:
        path = tmp_path / "apart" / entry["image"]
        images = [entry["image"].replace("BRATS", f"c{at}") for at in range(4)]
        for at, image in enumerate(images):
            nibabel.Nifti1Image(stored[..., at], AFFINE).to_filename(tmp_path / "apart" / image)
        entry["image"] = images
        path.unlink()
    (tmp_path / "apart" / "dataset.json").write_text(json.dumps(settings))
    apart = make(tmp_path / "apart", channels=[3, 0, 2]).under(contract("T2w", "FLAIR", "t1gd"))
    assert len(whole.samples()) == len(apart.samples()) == 8
    for one, other in zip(whole.samples(), apart.samples(), strict=True):
        ours, theirs = whole.read(one), apart.read(other)
        np.testing.assert_array_equal(ours.image, theirs.image)
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        assert ours.spacing == theirs.spacing
        assert ours.image.shape[0] == 3
    assert whole.path_of(whole.samples()[0]).is_file()
    assert not whole.left


def test_the_order_of_channels_is_that_of_their_names(tmp_path: Path) -> None:
    source = make(write(tmp_path, voxels()), channels=[0, 1, 2])
    with pytest.raises(errors.DataError) as caught:
        source.under(contract("T1w", "FLAIR", "t1gd"))
    assert caught.value.faults[0].code == "channels"


@pytest.mark.files("places", "four axes without as many names", "", "refused")
@pytest.mark.parametrize(
    ("names", "code"), [(NAMES[:3], "channels-missing"), ([], "four-axes"), (["only"], "four-axes")]
)
def test_four_axes_without_as_many_names_are_refused(tmp_path: Path, names: Any, code: str) -> None:
    with pytest.raises(errors.DataError) as caught:
        make(write(tmp_path, voxels(), names=names))
    assert code in {fault.code for fault in caught.value.faults}
