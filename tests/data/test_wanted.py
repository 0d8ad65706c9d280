"""One series of a DICOM folder with several: chosen in the words of the list, by a source and where files are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data.sources import folder
from fedvfm.data.volumes import dicom, series_selector, volumes
from tests.data import dicom_writer as writer

AXIAL = np.diag([0.5, 0.75, 2.5, 1.0])
THIN = np.diag([0.5, 0.75, 1.25, 1.0])
CORONAL = np.array([[0.5, 0, 0, 0], [0, 0, 2.0, 0], [0, -0.75, 0, 0], [0, 0, 0, 1.0]])


def voxels(seed: int, slices: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 99, (6, 5, slices)).astype(np.int16)


def study(path: Path) -> Path:
    """Thick and thin axial CT, coronal CT, and an MR: in one folder, as a CD comes."""
    for number, (affine, slices, modality) in enumerate(
        [(AXIAL, 4, "CT"), (THIN, 8, "CT"), (CORONAL, 3, "CT"), (AXIAL, 4, "MR")], 2
    ):
        writer.series(path / f"part-{number}", voxels(number, slices), affine, number=number, modality=modality)
    return path


LISTED = [
    "series 2: CT, 4 images of 5 x 6, axial, 2.5 mm from slice to slice",
    "series 3: CT, 8 images of 5 x 6, axial, 1.25 mm from slice to slice",
    "series 4: CT, 3 images of 5 x 6, coronal, 2 mm from slice to slice",
    "series 5: MR, 4 images of 5 x 6, axial, 2.5 mm from slice to slice",
]


def test_the_list_says_all_that_tells_them_apart(tmp_path: Path) -> None:
    found = dicom.find(study(tmp_path / "cd")).series
    assert [one.described for one in found] == LISTED
    with pytest.raises(errors.DataError, match="4 series") as caught:
        volumes.read_header(tmp_path / "cd")
    assert all(line in str(caught.value) for line in LISTED)
    assert "data.options.series = '2'" in str(caught.value)
    assert writer.PLANTED not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("2", 2),
        ("MR", 5),
        ("mr axial", 5),
        ("coronal", 4),
        ("CT most", 3),
        ("1.25mm", 3),
        ("CT 2.5mm", 2),
        ("CT axial 4-images 5x6", 2),
    ],
)
def test_words_choose_one(tmp_path: Path, words: str, number: int) -> None:
    path = study(tmp_path / "cd")
    found = volumes.read_volume(path, words)
    alone = volumes.read_volume(path / f"part-{number}")
    np.testing.assert_array_equal(found.voxels, alone.voxels)
    assert found.grid.fits(alone.grid)
    assert found.header.among
    plane = "coronal" if number == 4 else "axial"
    np.testing.assert_array_equal(
        volumes.read_slice(path, 1, plane, words), volumes.read_slice(path / f"part-{number}", 1, plane)
    )
    assert volumes.value_range(path, words) == volumes.value_range(path / f"part-{number}")


def test_words_that_choose_none_or_several(tmp_path: Path) -> None:
    path = study(tmp_path / "cd")
    with pytest.raises(errors.DataError, match="sagittal CT") as none:
        volumes.read_header(path, "sagittal CT")
    assert all(line in str(none.value) for line in LISTED)
    with pytest.raises(errors.DataError, match="2 series that fit 'CT axial'") as several:
        volumes.read_header(path, "CT axial")
    assert LISTED[1] in str(several.value)
    assert LISTED[2] not in str(several.value)
    assert {one.value.code for one in (none, several)} == {"series-mixed"}
    with pytest.raises(errors.ConfigError, match="'CTT'"):
        series_selector.require("CTT axial", "--series")


def settings(path: Path, **options: object) -> schema.SourceConfig:
    return schema.SourceConfig.model_validate({"source": "folder", "path": str(path), "options": options})


def test_a_source_takes_the_series_of_every_study(tmp_path: Path) -> None:
    for name in ("a", "b"):
        study(tmp_path / "studies" / name)
    (tmp_path / "labels.csv").write_text("id,label\na,well\nb,ill\n")
    with pytest.raises(errors.DataError, match=r"2 faults[\s\S]*4 series"):
        folder.Folder(settings(tmp_path))
    source = folder.Folder(settings(tmp_path, series="CT axial most"))
    contract = schema.DataContract.model_validate({"class_names": ["ill", "well"]})
    for one in (source, source.under(contract)):
        assert len(one.samples()) == 16
        pixels = one.read(one.samples()[1])
        shown = volumes.read_slice(tmp_path / "studies" / "a" / "part-3", 1)
        low, high = pixels.units or (0.0, 0.0)
        np.testing.assert_allclose(pixels.image[0] * (high - low) + low, shown, atol=1e-3)
    assert len(folder.Folder(settings(tmp_path, series=4)).samples()) == 10, "three coronal images are 5 axial cuts"
    with pytest.raises(errors.DataError, match="no series fits '9'"):
        folder.Folder(settings(tmp_path, series=9))


def test_segmentations_of_the_series_that_was_left_do_not_disturb(tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="writes the segmentations")
    study_folder = tmp_path / "studies" / "a"
    drawn = {}
    for number, affine in ((1, AXIAL), (2, CORONAL)):
        images = writer.series(study_folder / f"ct-{number}", voxels(number), affine, number=number)
        drawn[number] = np.zeros((6, 5, 4), np.uint8)
        drawn[number][number, 1:3, number] = 1
        writer.segmentation(study_folder / f"seg-{number}.dcm", images, drawn[number])
    for number in (1, 2):
        source = folder.Folder(settings(tmp_path, series=number))
        masks = [source.read(one).mask for one in source.samples()]
        assert sum(int(mask.sum()) for mask in masks if mask is not None) == 2
        points = [at for at, mask in enumerate(masks) if mask is not None and mask.any()]
        assert len(points) == (1 if number == 1 else 2), "coronal images cut the axial plane twice"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"series": True}, "a series number, or words like 'CT axial'"),
        ({"series": "thorax"}, "'thorax' says nothing of a series"),
        ({"series": ""}, "no word that says which series"),
        ({"series": "CT", "layout": "pairs"}, "only for layout studies, datalist, images, this is 'pairs'"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, given: dict[str, object], words: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(errors.FedvfmError) as caught:
        folder.Folder(settings(tmp_path, **given))
    assert words in str(caught.value)
