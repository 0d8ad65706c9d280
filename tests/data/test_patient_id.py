"""Patients of DICOM studies by a keyed hash of Patient ID: one split for each, no identifier outside of the reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data.sources import folder
from fedvfm.data.volumes import patient_id
from tests.data import dicom_writer as writer

PATIENTS = {"a": f"{writer.PLANTED}-7", "b": f"{writer.PLANTED}-8", "c": f" {writer.PLANTED.lower()}-7 ", "d": ""}


def studies(root: Path) -> Path:
    for name, patient in PATIENTS.items():
        writer.series(root / "studies" / name, np.zeros((5, 4, 2), np.int16), np.eye(4), PatientID=patient)
    (root / "labels.csv").write_text("id,label\n" + "".join(f"{name},{'xy'[name > 'b']}\n" for name in PATIENTS))
    return root


def make(root: Path, **options: object) -> folder.Folder:
    return folder.Folder(
        schema.SourceConfig.model_validate({"source": "folder", "path": str(root), "options": options})
    )


def patients(source: folder.Folder) -> list[str | None]:
    return [sample.patient for sample in source.samples()][::2]


@pytest.mark.files("patients", 'studies of one Patient ID, `patients = "hash"`', "C.7.1.1", "one patient, in one split")
def test_studies_of_one_patient_are_one_patient(tmp_path: Path) -> None:
    source = make(studies(tmp_path), patients="hash")
    first, second, third, fourth = patients(source)
    # Blanks and capitals tell no patients apart; a study without Patient ID is a patient of its own.
    assert first == third
    assert len({first, second, fourth}) == 3
    assert writer.PLANTED.casefold() not in repr(source.samples()).casefold()


def test_names_in_the_ledger_stay_and_hold_no_identifier(tmp_path: Path) -> None:
    source = make(studies(tmp_path), patients="hash", ids="names")
    named = [source.stable(sample)[1] for sample in source.samples()]
    again = make(tmp_path, patients="hash")
    assert named == [again.stable(sample)[1] for sample in again.samples()]
    assert writer.PLANTED.casefold() not in repr(named).casefold()
    (tmp_path / patient_id.KEY_NAME).unlink()
    other = make(tmp_path, patients="hash")
    assert named[0] != other.stable(other.samples()[0])[1]


def test_the_key_is_the_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "patients.key"
    assert patient_id.key(path) == patient_id.key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(errors.ConfigError):
        patient_id.key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(errors.ConfigError):
        make(studies(tmp_path), patients="hash", patients_key=str(path))


def test_a_table_stands_above_the_hash(tmp_path: Path) -> None:
    (studies(tmp_path) / "labels.csv").unlink()
    rows = "".join(f"{name},p{at},{'xy'[name > 'b']}\n" for at, name in enumerate(PATIENTS))
    (tmp_path / "patients.csv").write_text("id,patient,label\n" + rows)
    assert len(set(patients(make(tmp_path, patients="hash")))) == 4


def test_a_row_without_an_image_says_whose_it_is(tmp_path: Path) -> None:
    """No hash can say that it is of a patient with an image, who would then count twice and stand in two splits."""
    rows = "".join(f"{name},{'xy'[name > 'b']},\n" for name in PATIENTS)
    table = studies(tmp_path) / "labels.csv"
    table.write_text(f"id,label,image\n{rows}visit,x,none\n")
    with pytest.raises(errors.ConfigError, match=r"1 rows.*no Patient ID"):
        make(tmp_path, patients="hash")
    assert len(make(tmp_path).samples()) == 2 * len(PATIENTS) + 1


@pytest.mark.files("patients", "the same where nobody says so", "C.7.1.1", "noted")
def test_one_patient_under_several_names_is_noted(tmp_path: Path) -> None:
    source = make(studies(tmp_path))
    noted = [folder.SAME_PATIENT in source.notes_of(sample) for sample in source.samples()[::2]]
    assert noted == [True, False, True, False]
    grouped = make(tmp_path, patients="hash")
    assert not any(folder.SAME_PATIENT in grouped.notes_of(sample) for sample in grouped.samples())


@pytest.mark.parametrize(
    "options", [{"patients": "names"}, {"patients_key": "k"}, {"patients": "hash", "patients_key": 1}]
)
def test_wrong_options(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(errors.ConfigError):
        make(studies(tmp_path), **options)


def test_pictures_have_no_patient_id(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / name / "a.png")
    with pytest.raises(errors.ConfigError):
        make(tmp_path, patients="hash")
