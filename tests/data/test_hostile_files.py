"""Files made to harm: what unpacks to far more than it is, links out of the folder, names that are formulas."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import os
import pickle
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import formats, label_tables
from fedvfm.data.sources import folder
from fedvfm.data.volumes import dicom, volumes
from fedvfm.inference import inputs
from fedvfm.storage import storage
from tests.data import dicom_writer as writer

MIB = 1 << 20


def refused(path: Path, code: str = "too-large", least: int = 64 * MIB) -> str:
    """The refusal, which has to come before much memory is taken."""
    tracemalloc.start()
    try:
        with pytest.raises(errors.DataError) as caught:
            volumes.read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < least
    finally:
        tracemalloc.stop()
    assert caught.value.code == code
    return str(caught.value)


@pytest.mark.files("harm", "deflated DICOM", "", "256 MiB, counted before any is kept")
def test_a_deflated_file_that_unpacks_to_much_more(tmp_path: Path) -> None:
    one = writer.pixels(writer.blank(), np.zeros((8, 8), np.uint16))
    one.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    one.save_as(tmp_path / "small.dcm", enforce_file_format=True)
    assert volumes.read_volume(tmp_path / "small.dcm").voxels.shape == (8, 8, 1)
    raw = (tmp_path / "small.dcm").read_bytes()
    length = int(pydicom.filereader.read_file_meta_info(tmp_path / "small.dcm").FileMetaInformationGroupLength)
    start = 132 + 12 + length
    body = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw[start:])
    packing = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    element = b"\xfc\xff\xfc\xffOB\0\0" + (400 * MIB).to_bytes(4, "little")
    made = [raw[:start], packing.compress(body + element)]
    made += [packing.compress(bytes(MIB)) for _ in range(400)]
    (tmp_path / "bomb.dcm").write_bytes(b"".join([*made, packing.flush()]))
    assert (tmp_path / "bomb.dcm").stat().st_size < MIB
    assert "256 MiB" in refused(tmp_path / "bomb.dcm")


def nrrd_file(path: Path, sizes: tuple[int, int, int], content: bytes, encoding: str) -> Path:
    head = (
        f"NRRD0004\ntype: uint8\ndimension: 3\nspace: left-posterior-superior\nsizes: {sizes[0]} {sizes[1]} "
        f"{sizes[2]}\n"
        f"space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nencoding: {encoding}\n\n"
    )
    path.write_bytes(head.encode() + content)
    return path


PACK = {"bzip2": bz2.compress, "bz2": bz2.compress, "gzip": gzip.compress, "gz": gzip.compress, "raw": bytes}


@pytest.mark.files("harm", "packed NRRD", "", "what its header claims")
@pytest.mark.parametrize("encoding", PACK)
def test_packed_nrrd_is_read_as_far_as_it_claims(tmp_path: Path, encoding: str) -> None:
    values = np.arange(60, dtype=np.uint8)
    pack = PACK[encoding]
    path = nrrd_file(tmp_path / "a.nrrd", (3, 4, 5), pack(values.tobytes()), encoding)
    found = volumes.read_volume(path)
    stored = found.header.stored.turn().undo(found.voxels)
    np.testing.assert_array_equal(stored, values.reshape((3, 4, 5), order="F"))
    if encoding == "raw":
        return
    more = nrrd_file(tmp_path / "more.nrrd", (3, 4, 5), pack(bytes(200 * MIB)), encoding)
    assert "unpacks to more than the 60 bytes" in refused(more)
    fewer = nrrd_file(tmp_path / "fewer.nrrd", (3, 4, 5), pack(bytes(59)), encoding)
    refused(fewer, "unreadable")


def test_an_nrrd_that_claims_more_than_it_can_mean(tmp_path: Path) -> None:
    path = nrrd_file(tmp_path / "a.nrrd", (1000, 1000, 1250), bz2.compress(bytes(9)), "bzip2")
    refused(path)


def test_one_dicom_frame_of_too_many_pixels(tmp_path: Path) -> None:
    one = writer.pixels(writer.blank("DX", writer.DX), np.zeros((8, 8), np.uint8))
    one.Rows, one.Columns = 60_000, 60_000
    one.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    refused(tmp_path / "a.dcm")


@pytest.mark.files("harm", "links out of the data folder", "", "refused")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_that_leave_the_data_folder_are_refused(tmp_path: Path, what: str) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    for root in (data, other):
        for part in ("images", "masks"):
            (root / part).mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / part / "a.png")
    if what == "file":
        (data / "images" / "a.png").unlink()
        (data / "images" / "a.png").symlink_to(other / "images" / "a.png")
    else:
        (data / "images" / "a.png").unlink()
        (data / "images").rmdir()
        (data / "images").symlink_to(other / "images")
    with pytest.raises(errors.DataError, match="images") as caught:
        folder.Folder(schema.SourceConfig(source="folder", path=str(data)))
    assert caught.value.faults[0].code == "link"
    linked = tmp_path / "linked"
    linked.symlink_to(other)
    assert len(folder.Folder(schema.SourceConfig(source="folder", path=str(linked))).samples()) == 1


@pytest.mark.files(
    "harm",
    "links to a folder that the site names",
    "",
    "read: `[data] roots`",
)
def test_links_to_folders_that_the_site_names_are_read(tmp_path: Path) -> None:
    data, archive, other = (tmp_path / name for name in ("data", "archive", "other"))
    for root in (data / "images", data / "masks", archive, other):
        root.mkdir(parents=True)
    for root in (data / "masks", archive, other):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "a.png")
    (data / "images" / "a.png").symlink_to(archive / "a.png")
    allowed = {"source": "folder", "path": str(data), "roots": [str(archive)]}
    assert len(folder.Folder(schema.SourceConfig.model_validate(allowed)).samples()) == 1
    (data / "images" / "a.png").unlink()
    (data / "images" / "a.png").symlink_to(other / "a.png")
    with pytest.raises(errors.DataError, match=r"data\.roots"):
        folder.Folder(schema.SourceConfig.model_validate(allowed))


def test_links_inside_the_data_folder_are_read(tmp_path: Path) -> None:
    """As git-annex keeps files."""
    for part in ("images", "masks", ".git/annex"):
        (tmp_path / part).mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / ".git" / "annex" / "x.png")
    for part in ("images", "masks"):
        (tmp_path / part / "a.png").symlink_to("../.git/annex/x.png")
    assert len(folder.Folder(schema.SourceConfig(source="folder", path=str(tmp_path))).samples()) == 1


@pytest.mark.files("harm", "names in tables", "", "no formulas, no control characters")
def test_tables_hold_no_formulas_and_no_control_characters() -> None:
    names = ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "a\x1b[2Kb", "plain, with comma", "a\u202eb"]
    text = storage.table(["name", "value"], [[name, -1.5] for name in names])
    rows = list(csv.reader(io.StringIO(text)))
    assert [row[1] for row in rows[1:]] == ["-1.5"] * len(names)
    assert all(row[0][0] not in "=+-@\t\r" for row in rows)
    assert text.replace("\n", "").isprintable()
    assert rows[8][0] == "plain, with comma"


# --- what is no regular file, and small files that are hostile --------------------------------------------------------


@pytest.mark.files(
    "harm",
    "a pipe, socket or device in a study or among the pictures",
    "",
    "never opened; left out of a study and named, a fault of that file elsewhere",
)
def test_a_pipe_is_never_waited_for(tmp_path: Path) -> None:
    study = tmp_path / "study"
    writer.series(study, np.arange(192, dtype=np.int16).reshape(8, 8, 3), np.eye(4))
    for name in ("pipe", "pipe.dcm"):
        os.mkfifo(study / name)
    held = dicom.find(study)
    assert sorted(path.name for path, _ in held.left) == ["pipe", "pipe.dcm"]
    assert volumes.read_header(study).stored.shape == (8, 8, 3)
    assert [item.kind for item in inputs.find(tmp_path)] == ["dicom"]
    for name in ("a.png", "a.nii", "a.nrrd"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(errors.DataError) as caught:
            (formats.read_image if name == "a.png" else volumes.read_header)(tmp_path / name)
        assert caught.value.code == "unreadable"


HOSTILE_JSON = {
    "deep": "[" * 100_000,
    "endless": '{"segmentAttributes": [[{"labelID": 1e999}]]}',
    "huge": '{"segmentAttributes": [[{"labelID": 1' + "0" * 400 + "}]]}",
    "large": '"' + "x" * (2 << 20) + '"',
}


@pytest.mark.files(
    "harm",
    "JSON or tables nested 100,000 deep, with numbers that no mask has, or larger than such a file is",
    "",
    "refused, naming the file",
)
@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_json_beside_a_mask_is_bounded(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.json").write_text(HOSTILE_JSON[name])
    with pytest.raises(errors.DataError, match=r"a\.json"):
        label_tables.beside(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("cell", ["1" * 200_000, "1" + "0" * 400])
def test_tables_beside_a_mask_are_bounded(tmp_path: Path, cell: str) -> None:
    (tmp_path / "sub-1_dseg.tsv").write_text(f"index\tname\n{cell}\tliver\n")
    with pytest.raises(errors.DataError, match=r"dseg\.tsv"):
        label_tables.beside(tmp_path / "sub-1_dseg.nii.gz")


@pytest.mark.parametrize("name", ["dataset.json", "list.json"])
def test_a_list_of_cases_is_bounded(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(errors.DataError):
        folder.Folder(schema.SourceConfig.model_validate({"source": "folder", "path": str(tmp_path)}))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(errors.DataError):
        folder.Folder(schema.SourceConfig.model_validate({"source": "folder", "path": str(tmp_path)}))


def test_a_folder_travels_to_another_process(tmp_path: Path) -> None:
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        Image.new("L", (16, 16)).save(tmp_path / part / "a.png")
    source = folder.Folder(schema.SourceConfig.model_validate({"source": "folder", "path": str(tmp_path)}))
    back = pickle.loads(pickle.dumps(source))
    assert back.read(back.samples()[0]).image.shape == (1, 16, 16)
