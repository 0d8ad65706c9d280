"""No patient's name, number or UID gets out of a DICOM file: not into samples, errors, logs, warnings or outputs.

Every file of the writer carries planted text in its names, numbers and descriptions, its file names hold it, too, and
here also the elements that are read. Whatever can be seen afterwards is searched for it.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data.decoding import decoder
from fedvfm.data.sources import folder
from fedvfm.data.volumes import slices, volumes
from tests.data import dicom_writer as writer

LPS = np.diag([0.5, 0.75, 2.5, 1.0])
READ = [
    "Modality",
    "SeriesNumber",
    "PhotometricInterpretation",
    "RescaleSlope",
    "RescaleIntercept",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "SliceThickness",
    "BitsStored",
    "Rows",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PixelRepresentation",
    "SeriesInstanceUID",
    "SharedFunctionalGroupsSequence",
    "PatientName",
]


class Seen:
    """What was printed, logged and warned of since :meth:`start`: making bad files is not quiet itself."""

    def __init__(self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self._capfd, self._caplog = capfd, caplog

    def start(self) -> None:
        self._capfd.readouterr()
        self._caplog.clear()
        self._said.clear()

    def __enter__(self) -> Seen:
        self._caught = warnings.catch_warnings(record=True)
        self._said: Any = self._caught.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *what: object) -> None:
        self._caught.__exit__(*what)  # type: ignore[arg-type]

    def text(self) -> str:
        out, err = self._capfd.readouterr()
        return "\n".join([out, err, self._caplog.text, *(str(one.message) for one in self._said)])


@pytest.fixture
def seen(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[Seen]:
    caplog.set_level(logging.DEBUG)
    with Seen(capfd, caplog) as found:
        yield found


def told(path: Path) -> str:
    """All that an error shows, to a user and in a traceback; or, without one, what a reader keeps of the file."""
    try:
        volume = volumes.read_volume(path)
        pixels = slices.read([path], 0)
        return f"{volume!r} {volume.header!r} {volume.header.notes} {pixels!r}"
    except errors.DataError as error:
        return "".join([str(error), repr(error), *traceback.format_exception(error)])


def clean(uids: list[str], *texts: str) -> None:
    for text in texts:
        assert writer.PLANTED not in text
        for uid in [*uids, "1.2.826.0.1.7777777", "1.2.3.", "19700101"]:
            assert uid not in text


@pytest.mark.parametrize("element", READ)
def test_planted_text_in_any_element(tmp_path: Path, element: str, seen: Seen) -> None:
    made = writer.series(tmp_path / "study", np.zeros((8, 8, 3), np.int16), LPS)
    for one, file in zip(made, sorted((tmp_path / "study").iterdir()), strict=True):
        one.add_new(element, "LO", f"{writer.PLANTED} text")
        one.save_as(file, enforce_file_format=True)
    uids = [str(one.SOPInstanceUID) for one in made]
    seen.start()
    clean(uids, told(tmp_path / "study"), seen.text())


@pytest.mark.parametrize("uid", ["1.2.840.PLANTED.2.1", "1.2.840.10008.1.9.9", "1.2.826.0.1.77777.1"])
def test_planted_text_as_transfer_syntax(tmp_path: Path, uid: str, seen: Seen) -> None:
    file = tmp_path / "a" / "1.2.3.PLANTED.dcm"
    one = writer.radiograph(file, np.zeros((8, 8), np.uint16))
    plain = b"1.2.840.10008.1.2.1"
    assert len(uid) == len(plain)
    assert plain in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(plain, uid.encode(), 1))
    seen.start()
    text = told(tmp_path / "a")
    assert "DataError" in text
    clean([str(one.SOPInstanceUID), uid], text, seen.text())


def broken(kind: str, folder: Path) -> list[Any]:
    """A study that is wrong in one way."""
    values = np.random.default_rng(0).integers(0, 99, (16, 16, 6)).astype(np.int16)
    made: list[Any] = writer.series(folder, values, LPS, skip=(2,) if kind == "missing" else ())
    files = sorted(folder.iterdir())
    if kind == "mixed":
        made += writer.series(folder / "other", values, LPS, number=2, modality="PR-PLANTED")
    elif kind == "cut pixels":
        files[1].write_bytes(files[1].read_bytes()[:-100])
    elif kind == "cut header":
        files[1].write_bytes(files[1].read_bytes()[:700])
    elif kind == "no dicom":
        files[1].write_bytes(b"PLANTED no DICOM")
    elif kind == "turned":
        made[0].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        made[0].save_as(files[0], enforce_file_format=True)
    elif kind == "copies":
        made[0].ImagePositionPatient = made[1].ImagePositionPatient
        made[0].save_as(files[0], enforce_file_format=True)
    elif kind == "packed":
        made[1].file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
        made[1].PixelData = pydicom.encaps.encapsulate([b"PLANTED" * 10])
        made[1]["PixelData"].VR = "OB"
        made[1].save_as(files[1], enforce_file_format=True)
    return made


KINDS = ["whole", "missing", "mixed", "cut pixels", "cut header", "no dicom", "turned", "copies", "packed"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_a_study_can_be_wrong(tmp_path: Path, kind: str, seen: Seen) -> None:
    made = broken(kind, tmp_path / "study")
    seen.start()
    text = told(tmp_path / "study")
    assert (kind == "whole") == ("DataError" not in text)
    clean([str(one.SOPInstanceUID) for one in made], text, seen.text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_of_such_studies(tmp_path: Path, kind: str, seen: Seen) -> None:
    """Also its samples, and the errors of reading them; the study's own folder may be named, its files not."""
    made = [one for name in ("a", "b") for one in broken(kind, tmp_path / "studies" / name)]
    (tmp_path / "labels.csv").write_text("id,label,patient\na,well,PLANTED-1\nb,ill,PLANTED-2\n")
    source_config = schema.SourceConfig(source="folder", path=str(tmp_path))
    seen.start()
    texts = []
    try:
        source = folder.Folder(source_config)
        texts += [repr(one) for one in source.samples()] + [repr(source.info)]
        texts.append(repr(source.read(source.samples()[1])))
    except errors.DataError as error:
        assert kind != "whole"
        texts += [str(error), *traceback.format_exception(error)]
    assert texts
    clean([str(one.SOPInstanceUID) for one in made], *texts, seen.text())


def test_names_are_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set that pydicom makes for us has none of the elements that name someone."""
    read: list[pydicom.Dataset] = []
    original = pydicom.dcmread
    monkeypatch.setattr(pydicom, "dcmread", lambda *a, **k: (read.append(original(*a, **k)), read[-1])[1])
    writer.series(tmp_path / "study", np.zeros((8, 8, 3), np.int16), LPS)
    with decoder.trusted():
        volumes.read_volume(tmp_path / "study")
    assert len(read) >= 3
    for one in read:
        assert not [name for name in one.dir() if name.startswith(("Patient", "Accession", "Study", "Institution"))]
