"""DICOM pixels that lie in their files as they are: read without a decoder, bit for bit as it would give them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom import uid

from fedvfm import errors
from fedvfm.data.decoding import decoder
from fedvfm.data.volumes import dicom, dicom_frames, dicom_pixels, dicom_series, nifti, volumes
from fedvfm.data.volumes import header as headers
from tests.data import dicom_writer as writer

AFFINE = np.diag([0.5, 0.7, 2.0, 1.0])
PATIENT = {"PixelPaddingValue": 3, "PixelPaddingRangeLimit": 0}


def stored(kind: str) -> np.ndarray[Any, Any]:
    """All bits in use. Shapes: (5, 3, 3)."""
    content = np.random.default_rng(0).bytes(45 * np.dtype(kind).itemsize)
    return np.frombuffer(content, kind).reshape(5, 3, 3)


@pytest.mark.files(
    "greys",
    "grey DICOM pixels that are not packed",
    "PS3.5 8.1.1",
    "read without a decoder, once its process has said where they lie: bit for bit what it gives",
)
@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize(
    ("kind", "modality", "changes"),
    [
        ("<i2", "CT", {"RescaleIntercept": -1024}),
        ("<u2", "PT", {"RescaleSlope": 0.25}),
        ("<u1", "MR", PATIENT),
        ("<i1", "MR", {}),
        ("<u2", "MR", {"BitsStored": 12, "HighBit": 11}),
        ("<i2", "MR", {"BitsStored": 12, "HighBit": 11} | PATIENT),
        ("<u2", "PT", {"PhotometricInterpretation": "MONOCHROME1"}),
    ],
)
def test_it_is_what_the_decoder_gives(
    tmp_path: Path, kind: str, modality: str, changes: dict[str, Any], implicit: bool
) -> None:
    for one in writer.series(tmp_path, stored(kind), AFFINE, modality=modality, **changes):
        if implicit:
            one.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
            path = next(path for path in tmp_path.iterdir() if path.name.startswith(f"{one.InstanceNumber - 1:03d}"))
            pydicom.dcmwrite(path, one, implicit_vr=True, little_endian=True, enforce_file_format=True)
    check(tmp_path, plain=True)


def test_frames_of_one_file_lie_one_after_the_other(tmp_path: Path) -> None:
    writer.enhanced(tmp_path / "a.dcm", stored("<i2"), AFFINE, order=[2, 0, 1])
    check(tmp_path, plain=True)


def check(path: Path, *, plain: bool) -> headers.Header:
    """Read a series both ways."""
    header = dicom_series.read_header(path)
    assert all((frame.plain is not None) == plain for frame in header.frames)
    voxels, padded = dicom_pixels.read_voxels(header)
    without = tuple(dataclasses.replace(frame, plain=None) for frame in header.frames)
    expected, expected_padded = dicom_pixels.read_voxels(dataclasses.replace(header, frames=without))
    np.testing.assert_array_equal(voxels, expected, strict=True)
    np.testing.assert_array_equal(padded, expected_padded)
    return header


@pytest.mark.parametrize("change", ["behind", "big", "packed"])
def test_what_is_not_certain_is_left_to_the_decoder(tmp_path: Path, change: str) -> None:
    (one,) = writer.series(tmp_path, stored("<u2")[:, :, :1], AFFINE, modality="MR")
    (path,) = tmp_path.iterdir()
    if change == "behind":
        one.DataSetTrailingPadding = b"\0" * 12
        one.save_as(path, enforce_file_format=True)
    elif change == "big":
        one.PixelData = one.pixel_array.astype(">u2").tobytes()
        one.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
        pydicom.dcmwrite(path, one, implicit_vr=False, little_endian=False, enforce_file_format=True)
    else:
        one.compress(uid.RLELossless)
        one.save_as(path, enforce_file_format=True)
    check(tmp_path, plain=False)


def test_a_radiograph_that_shows_small_values_bright_is_turned_round(tmp_path: Path) -> None:
    writer.radiograph(tmp_path / "a.dcm", stored("<u2")[:, :, 0], "MONOCHROME1", BitsStored=12, HighBit=11)
    header = check(tmp_path, plain=True)
    expected = 4095 - (stored("<u2")[:, :, 0] & 4095).astype(int)
    np.testing.assert_array_equal(dicom_pixels.read_frame(header, 0)[0], expected)


@pytest.mark.files("harm", "a place of pixels that is none", "", "`unreadable`, a fault of that file alone")
@pytest.mark.parametrize(
    "plain",
    [
        headers.Plain(-1, "<u2"),
        headers.Plain(2**70, "<u2"),
        headers.Plain(0, "O"),
        headers.Plain(0, "no type"),
        headers.Plain(0, "<u2", 16),
        headers.Plain(0, "<f4", 1),
        headers.Plain(10**6, "<u2"),
        headers.Plain(0, "<u2", stamp=(1, 2)),
    ],
)
def test_a_place_that_is_none_is_one_fault(tmp_path: Path, plain: headers.Plain) -> None:
    writer.radiograph(tmp_path / "a.dcm", stored("<u2")[:, :, 0])
    header = dicom_series.read_header(tmp_path)
    wrong = dataclasses.replace(header, frames=(dataclasses.replace(header.frames[0], plain=plain),))
    with pytest.raises(errors.DataError) as caught:
        dicom_pixels.read_frame(wrong, 0)
    assert caught.value.code == "unreadable"


def test_a_number_of_values_that_is_none_reads_no_whole_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(64))
    with pytest.raises(errors.DataError) as caught:
        headers.Plain(0, "<u2").read(tmp_path / "a", -1, "a")
    assert caught.value.code == "unreadable"


@pytest.mark.parametrize("change", [{"path": Path("other.nii")}, {"sides": (-1, 3, 4)}])
def test_what_a_decoder_says_of_another_volume_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(np.zeros((2, 3, 4), np.int16), np.eye(4)), path)
    header = nifti.read_header(path)
    sides = change.get("sides", (2, 3, 4))
    grid = dataclasses.replace(header.stored, shape=sides)
    wrong = dataclasses.replace(header, path=change.get("path", path), stored=grid)
    monkeypatch.setattr(nifti, "read_header", lambda path: wrong)
    with pytest.raises(errors.DataError) as caught:
        volumes.read_volume(path)
    assert caught.value.code == "decoder-died"


@pytest.mark.files(
    "greys",
    "grey DICOM pixels of a file that changes after its header was read",
    "",
    "`unreadable`: its bytes may be anything now",
)
def test_a_file_that_was_changed_since_is_not_read_by_its_old_header(tmp_path: Path) -> None:
    writer.radiograph(tmp_path / "a.dcm", stored("<u2")[:, :, 0])
    header = dicom_series.read_header(tmp_path)
    packed = pydicom.dcmread(tmp_path / "a.dcm")
    packed.compress(uid.RLELossless)
    packed.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(errors.DataError, match="changed since its header was read"):
        dicom_pixels.read_frame(header, 0)


@pytest.mark.files(
    "greys",
    "DICOM pixels without an element that says what they mean (Photometric Interpretation, Pixel Representation, ...)",
    "PS3.3 C.7.6.3",
    "`unreadable`, and the missing element is named: no sign, no number of bits is guessed",
)
@pytest.mark.parametrize("name", dicom_frames.NEEDED)
def test_a_missing_element_is_named_and_nothing_is_guessed(tmp_path: Path, name: str) -> None:
    dataset = writer.radiograph(tmp_path / "a.dcm", stored("<u2")[:, :, 0])
    del dataset[name]
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    header = dicom_series.read_header(tmp_path)
    with pytest.raises(errors.DataError, match=f"{dicom_frames.NEEDED[name]} missing in the header") as caught:
        dicom_pixels.read_frame(header, 0)
    assert caught.value.code == "unreadable"


@pytest.mark.files(
    "harm", "a decoder that names another file", "", "`decoder-died`: no file is read as pixels but the one asked"
)
def test_what_a_decoder_says_of_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a file took over could have any file read as pixels."""
    writer.radiograph(tmp_path / "a.dcm", stored("<u2")[:, :, 0])
    writer.radiograph(tmp_path / "b.dcm", stored("<u2")[:, :, 1])
    held = dicom.examine.here(tmp_path / "b.dcm", "b")
    monkeypatch.setattr(dicom, "_examine_all", lambda asked: [held for _ in asked])
    with pytest.raises(errors.DataError) as caught:
        dicom.find(tmp_path)
    assert caught.value.code == "decoder-died"


def test_a_decoder_that_answers_for_fewer_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer.radiograph(tmp_path / "a.dcm", stored("<u2")[:, :, 0])
    monkeypatch.setattr(dicom, "_examine_all", lambda asked: [])
    with pytest.raises(errors.DataError, match="answered for 0 files in place of 1") as caught:
        dicom.find(tmp_path)
    assert caught.value.code == "decoder-died"


def test_headers_that_are_asked_together_name_the_one_at_fault(tmp_path: Path) -> None:
    for number in range(3):
        writer.radiograph(tmp_path / f"{number}.dcm", stored("<u2")[:, :, number])
    whole = (tmp_path / "1.dcm").read_bytes()
    (tmp_path / "1.dcm").write_bytes(whole[:400])
    with pytest.raises(errors.DataError, match="file 2 of 3"):
        dicom.find(tmp_path)


def test_what_takes_more_memory_than_a_file_may_is_left_to_the_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.radiograph(tmp_path / "a.dcm", stored("<u2")[:, :, 0])
    header = dicom_series.read_header(tmp_path)
    monkeypatch.setattr(decoder, "may_take", lambda size: False)
    monkeypatch.setattr(headers.Plain, "read", None)
    assert dicom_pixels.read_frame(header, 0)[0].shape == (5, 3)
