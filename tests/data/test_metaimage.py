"""MetaImage, read as ITK reads it: the bytes are those that SimpleITK 2.5.7 writes (compared: `docs/files.md`)."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data.sources import folder
from fedvfm.data.volumes import metaimage, volumes

VOXELS = np.arange(24, dtype="<i2").reshape(4, 3, 2, order="F") - 5  # x, y, z
HEADER = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 0 -1 0 1 0 0 0 0 1
Offset = 1 2 3
CenterOfRotation = 0 0 0
AnatomicalOrientation = PRI
ElementSpacing = 0.5 0.69999999999999996 2
DimSize = 4 3 2
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""
RAW = VOXELS.tobytes(order="F")


def write(path: Path, *changes: tuple[str, str], content: bytes = RAW) -> Path:
    text = HEADER
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() + content)
    return path


def read(path: Path) -> np.ndarray:
    volume = volumes.read_volume(path)
    # The point that SimpleITK 2.5.7 gives for index (1, 2, 1) is (2.4, 1.5, 5.0), in LPS.
    np.testing.assert_allclose(volume.header.stored.world(np.array([1, 2, 1])), (-2.4, -1.5, 5.0))
    return volume.header.stored.turn().undo(volume.voxels)


def code(path: Path) -> str:
    with pytest.raises(errors.DataError) as caught:
        volumes.read_volume(path)
    assert str(caught.value).count(str(path)) == 1
    return str(caught.value.code)


@pytest.mark.files(
    "places",
    "MetaImage (`.mha`; `.mhd` with `.raw` or `.zraw`), packed or not",
    "ITK, MetaIO",
    "directions by rows of TransformMatrix, LPS, as ITK",
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_voxels_inside_and_beside_packed_or_not(tmp_path: Path, packed: bool, beside: bool) -> None:
    content = zlib.compress(RAW) if packed else RAW
    flag = ("CompressedData = False", f"CompressedData = True\nCompressedDataSize = {len(content)}")
    changes = [flag] if packed else []
    if beside:
        (tmp_path / "a.zraw").write_bytes(content)
        path = write(tmp_path / "a.mhd", *changes, ("= LOCAL", "= a.zraw"), content=b"")
    else:
        path = write(tmp_path / "a.mha", *changes, content=content)
    np.testing.assert_array_equal(read(path), VOXELS)
    header = volumes.read_header(path)
    part = metaimage.read_part(header, 2, 1)
    assert packed == (part is None)
    if part is not None:
        np.testing.assert_array_equal(part, VOXELS[:, :, 1:])


@pytest.mark.parametrize(
    "change",
    [
        ("TransformMatrix", "Rotation"),
        ("TransformMatrix", "Orientation"),
        ("Offset", "Position"),
        ("ElementSpacing", "ElementSize"),
        ("BinaryData = True\n", ""),
        ("LOCAL", "Local"),
    ],
)
def test_other_words_for_the_same(tmp_path: Path, change: tuple[str, str]) -> None:
    np.testing.assert_array_equal(read(write(tmp_path / "a.mha", change)), VOXELS)


def test_other_types_and_byte_order(tmp_path: Path) -> None:
    swapped = ("BinaryDataByteOrderMSB = False", "BinaryDataByteOrderMSB = True")
    big = write(tmp_path / "a.mha", swapped, content=VOXELS.astype(">i2").tobytes(order="F"))
    np.testing.assert_array_equal(read(big), VOXELS)
    wide = write(tmp_path / "b.mha", ("MET_SHORT", "MET_DOUBLE"), content=VOXELS.astype("<f8").tobytes(order="F"))
    assert read(wide).dtype == np.float32
    long = write(tmp_path / "c.mha", ("MET_SHORT", "MET_LONG"), content=VOXELS.astype("<i4").tobytes(order="F"))
    np.testing.assert_array_equal(read(long), VOXELS)


@pytest.mark.parametrize("name", ["a.raw", "a.zraw"])
def test_voxels_that_changed_beside_their_header_are_read_again(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(RAW)
    path = write(tmp_path / "a.mhd", ("= LOCAL", f"= {name}"), content=b"")
    np.testing.assert_array_equal(read(path), VOXELS)
    (tmp_path / name).write_bytes((VOXELS + 1).astype("<i2").tobytes(order="F"))
    os.utime(tmp_path / name, ns=(1, 1))
    np.testing.assert_array_equal(read(path), VOXELS + 1)


def test_bytes_before_the_voxels(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"1234567" + RAW)
    for size in ("7", "-1"):
        path = write(
            tmp_path / "a.mhd", ("= LOCAL", "= a.raw"), ("DimSize", f"HeaderSize = {size}\nDimSize"), content=b""
        )
        np.testing.assert_array_equal(read(path), VOXELS)


@pytest.mark.files("places", "MetaImage that leaves out directions or spacing", "ITK, MetaIO", "as ITK, noted")
def test_what_a_header_leaves_out_is_noted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.mha",
        ("TransformMatrix = 0 -1 0 1 0 0 0 0 1\n", ""),
        ("ElementSpacing", "Comment"),
    )
    header = volumes.read_header(path)
    assert header.notes == (metaimage.NO_DIRECTIONS, metaimage.NO_SPACING)
    assert header.spacing("axial") is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("DimSize = 4 3 2", "DimSize = 4 3 200"), "unreadable"),
        (("DimSize = 4 3 2", "DimSize = 4 3 2 2"), "four-axes"),
        (("DimSize = 4 3 2", "DimSize = 4 x 2"), "unreadable"),
        (("MET_SHORT", "MET_SHORT_ARRAY"), "unreadable"),
        (("ElementType", "ElementNumberOfChannels = 3\nElementType"), "channels"),
        (("BinaryData = True", "BinaryData = False"), "compressed"),
        (("Offset = 1 2 3", "Offset = 1 nan 3"), "unreadable"),
        (("TransformMatrix = 0 -1 0 1 0 0 0 0 1", "TransformMatrix = 0 0 0 0 0 0 0 0 0"), "no-geometry"),
        (("ElementDataFile = LOCAL\n", ""), "unreadable"),
        (("= LOCAL", "= LIST"), "link"),
        (("= LOCAL", "= slice%03d.raw 1 2 1"), "link"),
        (("= LOCAL", "= a.raw"), "not-found"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    assert code(write(tmp_path / "a.mha", change)) == expected


@pytest.mark.files("harm", "MetaImage that names a file elsewhere", "", "refused")
@pytest.mark.parametrize(
    "name", ["../secret.raw", "/etc/hostname", "sub/../../secret.raw", "..\\secret.raw", "link.raw"]
)
def test_a_header_opens_no_file_of_another_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.raw").write_bytes(RAW)
    path = write(tmp_path / "data" / "a.mhd", ("= LOCAL", f"= {name}"), content=b"")
    (tmp_path / "data" / "link.raw").symlink_to(tmp_path / "secret.raw")
    assert code(path) == "link"


@pytest.mark.files("harm", "packed MetaImage", "", "what its header claims")
def test_packed_voxels_are_read_as_far_as_the_header_claims(tmp_path: Path) -> None:
    packed = ("CompressedData = False", "CompressedData = True")
    assert code(write(tmp_path / "a.mha", packed, content=zlib.compress(bytes(1 << 24)))) == "too-large"
    assert code(write(tmp_path / "b.mha", packed, content=zlib.compress(RAW)[:-9])) == "unreadable"
    assert (
        code(write(tmp_path / "c.mha", packed, ("4 3 2", "4000 4000 4000"), content=zlib.compress(RAW))) == "unreadable"
    )


def test_images_and_masks_of_a_folder(tmp_path: Path) -> None:
    mask = (VOXELS > 6).astype("u1")
    for name in ("a", "b"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.raw").write_bytes(RAW)
        write(tmp_path / "images" / f"{name}.mhd", ("= LOCAL", f"= {name}.raw"), content=b"")
        write(tmp_path / "masks" / f"{name}.mha", ("MET_SHORT", "MET_UCHAR"), content=mask.tobytes(order="F"))
    source = folder.Folder(schema.SourceConfig(source="folder", path=str(tmp_path)))
    assert sum(int(source.read(sample).mask.sum()) for sample in source.samples()) == 2 * int(mask.sum())
    (tmp_path / "images" / "c.raw").write_bytes(RAW)
    with pytest.raises(errors.DataError) as caught:
        folder.Folder(schema.SourceConfig(source="folder", path=str(tmp_path)))
    assert caught.value.code == "ending"


def test_a_damaged_file_is_skipped_by_choice_and_counted(tmp_path: Path) -> None:
    packed = ("CompressedData = False", "CompressedData = True")
    mask = (VOXELS > 6).astype("u1").tobytes(order="F")
    for name, content in (("a", zlib.compress(RAW)), ("b", zlib.compress(RAW)[:-9])):
        write(tmp_path / "images" / f"{name}.mha", packed, content=content)
        write(tmp_path / "masks" / f"{name}.mha", ("MET_SHORT", "MET_UCHAR"), content=mask)
    source = folder.Folder(schema.SourceConfig(source="folder", path=str(tmp_path), unreadable="skip"))
    assert {sample.unit for sample in source.samples()} == {"image-0001"}
    assert len(source.left) == 1
