"""The readiness check on real folders: each fault provoked once, told by its code, and no name of a file or patient."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.client.readiness import affected, check, document, webpage
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data import sample as samples
from fedvfm.data.readiness import catalogue, dataset, duplicates, finding, image_findings, rules, survey
from fedvfm.data.sources import folder
from fedvfm.data.sources import table as sources
from tests.data import dicom_writer as writer

SECRET = "Mueller_Hans_19510203"
COUNT = 40


def picture(number: int, shape: tuple[int, ...] = (40, 48)) -> np.ndarray:
    rng = np.random.default_rng([7, number])
    image = rng.integers(10, 90, size=shape).astype(np.uint8)
    image[10:30, 12:34] += 100
    return image


def mask(number: int, shape: tuple[int, int] = (40, 48)) -> np.ndarray:
    made = np.zeros(shape, dtype=np.uint8)
    made[10:30, 12 : 30 + number % 5] = 1
    return made


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def name(number: int) -> str:
    return f"{SECRET}_{number:02d}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy hospital: 40 pairs of 20 patients; file names and the table carry what must never be shown."""
    folder = tmp_path_factory.mktemp("whole") / "data"
    rows = ["id,patient"]
    for number in range(COUNT):
        save(folder / "images" / f"{name(number)}.png", picture(number))
        save(folder / "masks" / f"{name(number)}.png", mask(number))
        rows.append(f"{name(number)},{SECRET}-{number // 2}")
    (folder / "patients.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "data")


def site(folder: Path, text: str = "", options: str = "", source: str = "folder") -> Path:
    path = folder.parent / "site.toml"
    path.write_text(
        f'name = "north"\n{text}\n[data]\nsource = "{source}"\npath = "{folder.name}"\n[data.options]\n{options}\n'
    )
    return path


def run(folder: Path, text: str = "", options: str = "", **settings: object) -> check.Checked:
    return check.check(site(folder, text, options), **settings)  # type: ignore[arg-type]


def one(made: check.Checked, code: str) -> finding.Finding:
    found = [each for each in made.findings if each.code == code]
    assert len(found) == 1, [(each.code, each.problem) for each in made.findings]
    return found[0]


def shown(made: check.Checked) -> str:
    """All that a report may show."""
    return json.dumps(document.build(made), allow_nan=False)


# --- a healthy folder -------------------------------------------------------------------------------------------------


def test_a_healthy_folder_is_ready(whole: Path) -> None:
    made = run(whole)
    assert {each.code for each in made.findings} == {"no-recipe", "spacing-unknown"}
    assert (made.ready, made.exit_code) == (True, 0)
    assert made.seen is not None
    told = document.build(made)
    assert told["data"]["samples"] == COUNT
    assert told["data"]["patients"] == COUNT // 2
    assert told["data"]["splits"] == {"train": 24, "val": 6, "test": 10}
    assert told["images"]["sizes"] == {"40 x 48": COUNT}
    assert sum(told["images"]["intensity"]["histogram"]) == COUNT * 40 * 48
    stack = np.stack([picture(number) for number in range(COUNT)]) / 255
    assert told["images"]["intensity"]["mean"] == pytest.approx(stack.mean(), abs=1e-4)
    assert told["images"]["intensity"]["std"] == pytest.approx(stack.std(), abs=1e-4)
    assert told["images"]["intensity"]["p50"] == pytest.approx(np.median(stack), abs=1 / survey.BINS)
    share = np.mean([mask(number).mean() for number in range(COUNT)])
    assert told["masks"]["pixel_share"]["foreground"] == pytest.approx(share, rel=1e-3)
    assert SECRET not in shown(made)


def test_patients_stay_together_and_the_split_is_the_sites_own(whole: Path) -> None:
    first, again, other = (run(whole, text) for text in ("", "", "[split]\nseed = 1"))
    assert first.seen is not None
    assert again.seen is not None
    assert other.seen is not None
    assert first.seen.splits == again.seen.splits != other.seen.splits
    homes: dict[str | None, set[str]] = {}
    for number, split in first.seen.split_of.items():
        homes.setdefault(first.seen.samples[number - 1].patient, set()).add(split)
    assert all(len(splits) == 1 for splits in homes.values())


# --- one fault each ---------------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _pages(path: Path) -> None:
    path.unlink()
    pages = [Image.fromarray(picture(0)), Image.fromarray(picture(1))]
    pages[0].save(path.with_suffix(".tif"), save_all=True, append_images=pages[1:])


def _float(path: Path) -> None:
    path.unlink()
    Image.fromarray(picture(0).astype(np.float32)).save(path.with_suffix(".tif"))


def _on_its_side(data: Path) -> None:
    (data / I3).unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(3)).save((data / I3).with_suffix(".tif"), exif=exif)
    save(data / M3, mask(3, (48, 40)))


def _as_volume(path: Path) -> None:
    path.unlink()
    nibabel.save(nibabel.Nifti1Image(picture(3)[:, :, None], np.eye(4)), path.with_suffix(".nii"))


def _lost(path: Path) -> None:
    path.unlink()
    path.symlink_to(f"../annex/{SECRET}")


def _claims(path: Path) -> None:
    """A picture whose head claims more pixels than are read."""
    content = path.read_bytes()
    head = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    path.write_bytes(content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:])


def _rewrite(data: Path, change: Callable[[str], str]) -> None:
    table = data / "patients.csv"
    table.write_text(change(table.read_text()))


I3, M3 = f"images/{name(3)}.png", f"masks/{name(3)}.png"

SPOILS: list[tuple[str, Callable[[Path], object]]] = [
    ("unreadable", lambda data: _cut(data / I3)),
    ("unreadable", lambda data: (data / I3).write_text("no picture")),
    ("too-small", lambda data: (save(data / I3, picture(3)[:1, :1]), save(data / M3, mask(3)[:1, :1]))),
    ("several-pages", lambda data: _pages(data / I3)),
    ("value-range", lambda data: _float(data / I3)),
    ("mask-missing", lambda data: (data / M3).unlink()),
    ("image-missing", lambda data: (data / I3).unlink()),
    ("mask-size", lambda data: save(data / M3, mask(3)[:20])),
    ("mask-value", lambda data: save(data / M3, mask(3) * 254)),
    ("mask-colour", lambda data: save(data / M3, np.stack([mask(3), mask(4) * 9, mask(3)], axis=-1))),
    ("ending", lambda data: (data / "images" / f"{SECRET}.dat").write_text("x")),
    ("ending", lambda data: (data / "images" / SECRET).mkdir()),
    ("name-twice", lambda data: save(data / "images" / f"{name(3)}.bmp", picture(3))),
    ("table", lambda data: _rewrite(data, lambda text: text.replace(f"{name(3)},", f"{SECRET},"))),
    ("turned", lambda data: _on_its_side(data)),
    ("kinds-mixed", lambda data: _as_volume(data / I3)),
    ("link", lambda data: _lost(data / I3)),
    ("too-large", lambda data: _claims(data / I3)),
]


@pytest.mark.parametrize(("code", "spoil"), SPOILS, ids=[f"{at}-{code}" for at, (code, _) in enumerate(SPOILS)])
def test_each_fault_of_a_file_is_a_blocker_and_the_rest_is_still_looked_at(
    data: Path, code: str, spoil: Callable[[Path], object]
) -> None:
    spoil(data)
    made = run(data)
    found = one(made, code)
    assert found.severity == "blocker"
    assert found.count >= 1
    assert (made.ready, made.exit_code) == (False, errors.NOT_READY)
    assert made.seen is not None
    assert len(made.seen.found.rows) >= COUNT - 2
    assert SECRET not in shown(made)
    assert any(SECRET in text or not text for _, _, text in made.told)


def test_faults_of_many_kinds_are_all_told_at_once(data: Path, tmp_path: Path) -> None:
    _cut(data / f"images/{name(1)}.png")
    save(data / f"masks/{name(2)}.png", mask(2) * 7)
    save(data / f"masks/{name(3)}.png", mask(3) * 9)
    (data / f"masks/{name(4)}.png").unlink()
    made = run(data)
    assert one(made, "mask-value").count == 2
    assert "values 7, 9" in one(made, "mask-value").problem
    assert one(made, "mask-missing").count == 1
    assert one(made, "unreadable").count == 1
    affected.write(made, tmp_path / "files.csv")
    listed = (tmp_path / "files.csv").read_text()
    assert (tmp_path / "files.csv").stat().st_mode & 0o777 == 0o600
    assert all(row["message"] for row in csv.DictReader(listed.splitlines()))
    for number in (1, 2, 3, 4):
        assert name(number) in listed
    with pytest.raises(errors.OutputInUse, match="no file of an earlier check"):
        affected.write(made, data / "patients.csv")


def test_what_headers_and_pixels_tell_of_one_kind_is_one_finding(data: Path) -> None:
    (data / I3).write_text("no picture")
    _cut(data / f"images/{name(5)}.png")
    found = one(run(data), "unreadable")
    assert found.count == 2
    assert "in the folder; damaged" in found.problem


def test_a_missing_or_unknown_folder_is_a_finding(tmp_path: Path) -> None:
    made = run(tmp_path / "none")
    assert one(made, "options").severity == "blocker"
    (tmp_path / "empty").mkdir()
    made = run(tmp_path / "empty")
    assert one(made, "options").severity == "blocker"
    for part in ("images", "masks"):
        (tmp_path / "bare" / part).mkdir(parents=True)
    assert one(run(tmp_path / "bare"), "no-samples").severity == "blocker"


def test_wrong_options_are_named(data: Path) -> None:
    made = run(data, options="layot = 'pairs'")
    assert "layot: unknown option" in one(made, "options").problem


def test_nnunet_faults(tmp_path: Path) -> None:
    data = tmp_path / "data"
    affine = np.diag([0.5, 0.5, 2.0, 1.0])
    settings = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "lesion": 1}, "numTraining": 6}
    for number in range(6):
        values = np.random.default_rng(number).normal(size=(12, 10, 4)).astype(np.float32)
        marks = (values > 0.5).astype(np.uint8) if number else np.zeros((12, 10, 4), np.uint8)
        for path, array in (("imagesTr/{}_0000", values), ("labelsTr/{}", marks)):
            file = data / f"{path.format(name(number))}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, affine), file)
    (data / "dataset.json").write_text(json.dumps(settings))
    made = run(data)
    volume = one(made, "volume-empty")
    assert (volume.severity, volume.count, len(volume.samples)) == ("warning", 1, 4)
    assert one(made, "mask-empty").count == 4
    assert document.build(made)["images"]["spacing_mm"]["row"] == {"min": 0.5, "median": 0.5, "max": 0.5}

    def store(path: str, array: np.ndarray, placed: np.ndarray = affine) -> None:
        nibabel.save(nibabel.Nifti1Image(array, placed), data / path)

    bad = np.full((12, 10, 4), np.nan, dtype=np.float32)
    store(f"imagesTr/{name(1)}_0000.nii.gz", bad)
    store(f"labelsTr/{name(2)}.nii.gz", np.zeros((12, 10, 4), np.uint8), np.diag([0.5, 0.5, 5.0, 1.0]))
    store(f"imagesTr/{name(3)}_0000.nii.gz", np.zeros((12, 10, 4, 3), np.float32))
    store(f"labelsTr/{name(4)}.nii.gz", np.zeros((12, 10, 4), np.float32) + 0.5)
    store(f"imagesTr/{name(5)}_0001.nii.gz", np.zeros((12, 10, 4), np.float32))
    made = run(data)
    for code in ("not-finite", "mask-geometry", "four-axes", "mask-value", "channels-missing"):
        assert one(made, code).severity == "blocker", code
    assert SECRET not in shown(made)
    (data / "dataset.json").write_text("{}")
    assert one(run(data), "dataset-json").severity == "blocker"


def test_class_folders(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(44):
        save(data / ("benign" if number < 40 else SECRET) / f"{SECRET}{number}.png", picture(number))
    made = run(data)
    assert SECRET not in shown(made)
    assert document.build(made)["data"]["per_class"] == {"class 1": 4, "class 2": 40} or SECRET > "benign"
    assert one(made, "imbalance").severity == "warning"
    assert one(made, "patients-unknown").count == 44
    named = run(data, options=f'class_names = ["benign", "malign", "{SECRET}"]')
    assert "malign" in one(named, "class-missing").problem
    made = run(data, options='class_names = ["benign", "malign"]')
    assert one(made, "class-unknown").severity == "blocker"
    (data / "malign").mkdir()
    shutil.rmtree(data / SECRET)
    made = run(data)
    assert one(made, "class-empty").severity == "blocker"
    assert one(made, "one-class").severity == "warning"


AFFINE = np.diag([0.7, 0.7, 3.0, 1.0])


def study(data: Path, number: int, **changes: Any) -> Path:
    """A DICOM series in a folder named after the patient."""
    folder = data / "studies" / f"{SECRET}-{number:02d}"
    voxels = np.random.default_rng(number).integers(0, 900, size=(24, 20, 4)).astype(np.int16)
    writer.series(folder, voxels, AFFINE, intercept=-1000.0, **changes)
    return folder


def labelled(data: Path, count: int, names: tuple[str, str] = ("healthy", "ill")) -> None:
    rows = [f"{SECRET}-{number:02d},{names[number % 2]}" for number in range(count)]
    (data / "labels.csv").write_text("id,label\n" + "\n".join(rows) + "\n")


def test_dicom_studies_with_names_in_every_header(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(6):
        study(data, number)
    labelled(data, 6)
    made = run(data)
    told = document.build(made)
    assert (told["data"]["samples"], told["data"]["volumes"], told["data"]["patients"]) == (24, 6, None)
    assert "each volume was taken for a patient of its own" in one(made, "patients-unknown").problem
    assert told["images"]["spacing_mm"]["row"]["median"] == 0.7
    assert told["images"]["orientations"] == {"LPS": 24}
    assert -1000.0 <= told["images"]["units"]["low"] < told["images"]["units"]["high"] <= -100.0
    assert made.ready
    webpage.write(made, tmp_path / "out.html")
    for text in (shown(made), (tmp_path / "out.html").read_text()):
        assert SECRET not in text
        assert writer.PLANTED not in text
    shutil.copytree(data / "studies" / f"{SECRET}-00", data / "studies" / f"{SECRET}-06")
    labelled(data, 7)
    made = run(data)
    assert one(made, "duplicate-pixels").count == 4


def test_whose_volumes_they_are_and_what_their_headers_leave_open(tmp_path: Path) -> None:
    """Two studies of one patient would land in train and test; their Patient ID hints at it, a table says it."""
    data = tmp_path / "data"
    for number in range(6):
        study(data, number)
        (data / "studies" / f"{SECRET}-{number:02d}" / "report.pdf").write_bytes(b"%PDF")
    labelled(data, 6)
    made = run(data)
    assert one(made, "patients-unknown").count == 24
    problem = f"1 file(s) left out: no DICOM: 24 samples; {folder.SAME_PATIENT}: 24 samples"
    assert one(made, "header-noted").problem == problem
    assert one(made, "header-noted").samples == tuple(range(1, 25))
    rows = [f"{SECRET}-{number:02d},{('healthy', 'ill')[number % 2]},{SECRET}{number // 2}" for number in range(6)]
    (data / "labels.csv").write_text("id,label,patient\n" + "\n".join(rows) + "\n")
    made = run(data)
    assert document.build(made)["data"]["patients"] == 3
    assert not [each for each in made.findings if each.code == "patients-unknown"]
    assert one(made, "few-patients").count == 3
    assert SECRET not in shown(made)


def _change(folder: Path, number: int, **values: Any) -> None:
    """Change one file of a study; None takes an element out."""
    file = sorted(folder.iterdir())[number]
    one = pydicom.dcmread(file)
    for key, value in values.items():
        delattr(one, key) if value is None else setattr(one, key, value)
    one.save_as(file)


def _frames(folder: Path) -> None:
    folder.mkdir(parents=True)
    writer.pixels(writer.blank("CT"), np.zeros((4, 24, 20), np.uint16)).save_as(
        folder / "a.dcm", enforce_file_format=True
    )


def _packed(folder: Path) -> None:
    one = writer.radiograph(folder / "a.dcm", np.zeros((24, 20), np.uint16))
    one.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2K
    one.PixelData = pydicom.encaps.encapsulate([bytes(64)])
    one["PixelData"].VR = "OB"
    one.save_as(folder / "a.dcm", enforce_file_format=True)


STUDIES: list[tuple[str, Callable[[Path], object]]] = [
    ("frames-unplaced", lambda data: _frames(data / "studies" / f"{SECRET}-03")),
    ("compressed", lambda data: _packed(data / "studies" / f"{SECRET}-03")),
    ("whole-slide", lambda data: study(data, 3, SOPClassUID=pydicom.uid.VLWholeSlideMicroscopyImageStorage)),
    ("no-geometry", lambda data: study(data, 3, ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0])),
    ("pixel-size", lambda data: study(data, 3, PixelSpacing=None)),
    ("grey-units", lambda data: _change(study(data, 3), 1, RescaleSlope=None, RescaleIntercept=None)),
    ("too-large", lambda data: study(data, 3, Rows=60_000, Columns=60_000)),
    ("channels", lambda data: study(data, 3, SamplesPerPixel=2, BitsAllocated=8, BitsStored=8, HighBit=7)),
    ("link", lambda data: (study(data, 3) / "more").symlink_to(data / "studies" / f"{SECRET}-00")),
    ("image-missing", lambda data: (data / "studies" / f"{SECRET}-03").mkdir()),
    ("class-unknown", lambda data: (study(data, 3), labelled(data, 4, ("healthy", SECRET)))),
    ("table", lambda data: (study(data, 3), labelled(data, 3))),
]


@pytest.mark.parametrize(("code", "spoil"), STUDIES, ids=[f"{at}-{code}" for at, (code, _) in enumerate(STUDIES)])
def test_each_fault_of_a_study_is_a_blocker_and_names_no_patient(
    tmp_path: Path, code: str, spoil: Callable[[Path], object]
) -> None:
    data = tmp_path / "data"
    for number in range(3):
        study(data, number)
    labelled(data, 4)
    spoil(data)
    made = run(data, options='class_names = ["healthy", "ill"]')
    found = one(made, code)
    assert found.severity == "blocker"
    assert made.seen is not None
    assert len(made.seen.found.rows) >= 8
    for text in (shown(made), "".join(each.problem for each in made.findings)):
        assert SECRET not in text
        assert writer.PLANTED not in text


def test_listed_files_that_are_missing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    save(data / "a.png", picture(0))
    save(data / "a_mask.png", mask(0))
    entries = [{"image": "a.png", "label": "a_mask.png"}, {"image": f"{SECRET}.png", "label": "a_mask.png"}]
    settings = {"labels": {"0": "background", "1": "lesion"}, "training": entries}
    (data / "dataset.json").write_text(json.dumps(settings))
    made = run(data)
    assert one(made, "not-found").severity == "blocker"
    assert SECRET not in shown(made)


def test_dicom_faults(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(4):
        study(data, number)
    study(data, 4, skip=(1,))
    study(data, 5)
    voxels = np.zeros((24, 20, 3), dtype=np.int16)
    writer.series(data / "studies" / f"{SECRET}-05" / "more", voxels, AFFINE, number=3)
    study(data, 6, modality="MR")
    cut = sorted(study(data, 7).iterdir())[1]
    cut.write_bytes(cut.read_bytes()[:-300])
    labelled(data, 8)
    asked, told = schema.DataContract(class_names=("healthy", "ill"), modality="CT"), list[str]()
    source = sources.survey(schema.SourceConfig(source="folder", path=str(data)), told, asked)
    assert sorted(map(defect.of, told)) == ["modality", "series-mixed", "slices-missing"]
    assert len(source.samples()) == 20
    made = run(data)
    # A volume is read whole, so one damaged file costs all its slices.
    for code, count in (("slices-missing", 1), ("series-mixed", 1), ("unreadable", 4)):
        found = one(made, code)
        assert (found.severity, found.count) == ("blocker", count), code
    assert made.seen is not None
    assert len(made.seen.found.rows) == 20
    assert not made.ready
    affected.write(made, tmp_path / "files.csv")
    assert f"{SECRET}-04" in (tmp_path / "files.csv").read_text()
    for text in (shown(made), "".join(each.problem for each in made.findings)):
        assert SECRET not in text
        assert writer.PLANTED not in text


# --- patients, splits and duplicates ----------------------------------------------------------------------------------


def test_a_patient_in_train_and_test(data: Path) -> None:
    lines = (data / "patients.csv").read_text().splitlines()
    splits = ["train" if number % 2 else "test" for number in range(COUNT)]
    splits[2:] = ["train", "train"] * 10 + ["test", "test"] * 9
    table = [lines[0] + ",split", *(f"{line},{split}" for line, split in zip(lines[1:], splits, strict=True))]
    (data / "patients.csv").write_text("\n".join(table) + "\n")
    made = run(data)
    found = one(made, "patient-across-splits")
    assert (found.severity, found.count, found.samples) == ("blocker", 1, (1, 2))
    assert one(made, "no-validation-sample").severity == "note"


def test_duplicates_by_file_by_pixels_and_across_splits(data: Path) -> None:
    made = run(data)
    assert made.seen is not None
    split_of = made.seen.split_of
    train = [number for number, split in split_of.items() if split == "train"]
    test = next(number for number, split in split_of.items() if split == "test")
    copy, source = data / "images" / f"{name(train[1] - 1)}.png", data / "images" / f"{name(train[0] - 1)}.png"
    shutil.copy(source, copy)
    leak = data / "images" / f"{name(test - 1)}.png"
    leak.unlink()
    Image.open(data / "images" / f"{name(train[2] - 1)}.png").save(leak.with_suffix(".bmp"))
    made = run(data)
    found = one(made, "duplicate-files")
    assert (found.severity, found.count, set(found.samples)) == ("warning", 1, set(train[:2]))
    found = one(made, "duplicate-pixels")
    assert (found.severity, found.count, set(found.samples)) == ("warning", 1, {train[2], test})
    found = one(made, "duplicate-across-splits")
    assert (found.severity, found.count, set(found.samples)) == ("blocker", 1, {train[2], test})
    assert one(made, "duplicate-conflict").count >= 1


def test_few_samples_and_shown_names(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(6):
        save(data / "images" / f"{name(number)}.png", picture(number))
        save(data / "masks" / f"{name(number)}.png", mask(number))
    made = run(data, options='ids = "names"')
    assert one(made, "few-training-samples").severity == "warning"
    assert one(made, "few-test-samples").severity == "warning"
    assert one(made, "names-shown").severity == "warning"
    assert SECRET not in shown(made)
    (data / "patients.csv").write_text("id,patient,site\n" + "".join(f"{name(at)},p,s{at % 2}\n" for at in range(6)))
    made = run(data)
    assert one(made, "no-test-sample").severity == "blocker"
    assert one(made, "few-patients").count == 1
    assert one(made, "several-sites").count == 2
    made = run(data, 'include = ["s1"]')
    assert made.seen is not None
    assert len(made.seen.samples) == 3
    assert one(run(data, 'include = ["elsewhere"]'), "no-samples").severity == "blocker"


def test_limit_looks_at_some_and_says_so(whole: Path) -> None:
    made = run(whole, limit=10)
    assert made.seen is not None
    assert len(made.seen.found.rows) == 10
    assert [row.number for row in made.seen.found.rows][::9] == [1, COUNT]
    assert one(made, "limited").count == COUNT - 10
    assert document.build(made)["data"]["limited"] is True


def test_progress_is_told(whole: Path) -> None:
    told = []
    run(whole, limit=5, observer=lambda event, /, **fields: told.append((event, fields)))
    assert told == [("check", {"done": done, "total": 5}) for done in range(1, 6)]


# --- judged from pixels -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Given:
    """A source of arrays."""

    pixels: Sequence[samples.Pixels | Exception]
    task: str = "segmentation"
    class_names: tuple[str, ...] = ("background", "lesion", "cyst")
    labels: Sequence[int | None] = ()

    @property
    def info(self) -> samples.SourceInfo:
        return samples.SourceInfo("given", self.task, self.class_names, "ours")

    def samples(self) -> list[samples.Sample]:
        labels = self.labels or [None] * len(self.pixels)
        return [samples.Sample(f"{at}", label=label, patient=f"{at}") for at, label in enumerate(labels)]

    def read(self, sample: samples.Sample) -> samples.Pixels:
        found = self.pixels[int(sample.id)]
        if isinstance(found, Exception):
            raise found
        return found


def judge(source: Given, contract: schema.DataContract | None = None) -> dict[str, finding.Finding]:
    everything = source.samples()
    found = survey.look(source, survey.spaced(everything, 0), contract=contract)
    numbers = list(range(1, len(everything) + 1))
    cut = max(1, len(numbers) * 2 // 3)
    splits = {"train": numbers[:cut], "val": [], "test": numbers[cut:]}
    seen = dataset.Looked(source.info, source.class_names, everything, found, splits, contract=contract)
    made = [*rules.findings(seen), *image_findings.findings(seen), *duplicates.findings(seen)]
    codes = [each.code for each in made]
    assert len(set(codes)) == len(codes)
    return {each.code: each for each in made}


def image(seed: int, shape: tuple[int, int, int] = (1, 40, 40), low: float = 0.0, high: float = 0.4) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, size=shape).astype(np.float32)


def square(value: int = 1, shape: tuple[int, int] = (40, 40)) -> np.ndarray:
    made = np.zeros(shape, dtype=np.int64)
    made[4:20, 4:20] = value
    return made


def contract(**values: object) -> schema.DataContract:
    return schema.DataContract.model_validate({"class_names": ("background", "lesion", "cyst"), **values})


def test_empty_and_full_masks() -> None:
    empty, full = np.zeros((40, 40), dtype=np.int64), np.ones((40, 40), dtype=np.int64)
    made = judge(Given([samples.Pixels(image(at), mask) for at, mask in enumerate([square(), square(2), empty, full])]))
    assert (made["mask-empty"].severity, made["mask-empty"].samples) == ("note", (3,))
    assert (made["mask-full"].severity, made["mask-full"].samples) == ("warning", (4,))
    made = judge(Given([samples.Pixels(image(at), mask) for at, mask in enumerate([square(), empty, empty])]))
    assert made["masks-mostly-empty"].severity == "warning"
    assert "cyst" in made["class-missing"].problem
    made = judge(Given([samples.Pixels(image(at), empty) for at in range(3)]))
    assert made["masks-all-empty"].severity == "blocker"
    tiny = np.zeros((40, 40), dtype=np.int64)
    tiny[0, 0] = 1
    assert (
        "lesion 0.0006" in judge(Given([samples.Pixels(image(at), tiny) for at in range(2)]))["foreground-rare"].problem
    )


def test_blank_images_and_values_out_of_range() -> None:
    blank = np.full((1, 40, 40), 0.3, dtype=np.float32)
    made = judge(Given([samples.Pixels(image(0), square()), samples.Pixels(blank, square())]))
    assert made["blank"].samples == (2,)
    made = judge(Given([samples.Pixels(blank, square())] * 3))
    assert made["all-blank"].severity == "blocker"
    assert not {code for code in made if code.startswith("duplicate")}
    made = judge(Given([samples.Pixels(image(0, high=3.0), square())]))
    assert made["out-of-range"].severity == "blocker"


def test_sizes_against_the_recipe() -> None:
    pixels = [samples.Pixels(image(0, (1, 40, 200)), square(shape=(40, 200))), samples.Pixels(image(1), square())]
    made = judge(Given(pixels), contract(input_size=(224, 224)))
    assert made["small-images"].count == 2
    assert made["sizes-vary"].severity == "note"
    assert made["distorted"].samples == (1,)
    assert "small-images" not in judge(Given(pixels))


def test_structures_finer_than_the_recipe_s_pixels() -> None:
    fine = np.zeros((200, 200), dtype=np.int64)
    fine[::10], fine[100:, 100:] = 1, 2
    pixels = [samples.Pixels(image(at, (1, 200, 200)), fine) for at in range(2)]
    told = judge(Given(pixels), contract(input_size=(64, 64)))["detail-lost"]
    assert (told.severity, told.count) == ("warning", 2)
    assert "lesion 0." in told.problem
    assert "cyst" not in told.problem
    assert "detail-lost" not in judge(Given(pixels), contract(input_size=(224, 224)))
    assert "detail-lost" not in judge(Given(pixels), contract(input_size=(64, 64), fit="native"))
    assert "detail-lost" not in judge(Given(pixels))


def test_lost_detail_in_words() -> None:
    rows = [{1: 0.5, 2: 0.99}, {1: 0.7}, {}]
    assert image_findings.lost_detail(rows, ("rest", "vessel", "disc", "never")) == "vessel 0.60"
    assert image_findings.lost_detail([], ("rest", "vessel")) == ""


def test_colour_and_polarity() -> None:
    colour = samples.Pixels(image(0, (3, 40, 40)), square())
    grey = samples.Pixels(np.repeat(image(1), 3, axis=0), square())
    bright = samples.Pixels(image(2, low=0.7, high=1.0), square())
    made = judge(Given([colour, grey, bright]))
    assert made["colour-mixed"].samples == (1,)
    assert made["polarity-mixed"].count == 1
    made = judge(Given([colour, grey, bright]), contract(grey=True, intensity="polarity"))
    assert (made["colour-where-grey"].severity, made["colour-where-grey"].samples) == ("warning", (1,))
    assert "polarity-mixed" not in made
    made = judge(Given([colour, grey, bright]), contract(stack=3))
    assert "colour-mixed" not in made, "channels of a stack are neighbouring slices"


def test_spacing() -> None:
    def with_spacing(*sizes: float | None) -> Given:
        return Given(
            [
                samples.Pixels(image(at), square(), None if size is None else (size, size))
                for at, size in enumerate(sizes)
            ]
        )

    assert judge(with_spacing(None, None))["spacing-unknown"].severity == "note"
    assert judge(with_spacing(0.5, None))["spacing-partly"].samples == (2,)
    assert "from 0.5 to 2 mm" in judge(with_spacing(0.5, 2.0))["spacing-varies"].problem


def test_orientation_is_told_where_the_source_knows_it() -> None:
    codes = ("RAS", "LPS", "LPS")
    source = Given([samples.Pixels(image(at), square(), orientation=code) for at, code in enumerate(codes)])
    assert judge(source)["orientation-mixed"].problem == "axes stored as LPS, RAS"


def test_samples_that_training_would_refuse() -> None:
    pixels: list[samples.Pixels | Exception] = [
        samples.Pixels(image(0, (2, 40, 40)), square()),
        samples.Pixels(image(1) + np.float32("nan"), square()),
        samples.Pixels(image(2), None),
        samples.Pixels(image(3), square()[:20]),
        samples.Pixels(image(4), square(7)),
        samples.Pixels(image(5)[:, :1], square()[:1]),
        ValueError(f"{SECRET}.dcm"),
        errors.DataError(f"{SECRET}/a.png: something new"),
        samples.Pixels(image(8), square()),
    ]
    made = judge(Given(pixels))
    expected = ("channels", "not-finite", "mask-missing", "mask-size", "mask-value", "too-small", "reader-failed")
    for number, code in enumerate((*expected, "structure"), 1):
        assert (made[code].severity, made[code].samples) == ("blocker", (number,)), code
    assert SECRET not in "".join(each.problem for each in made.values())


def test_labels_of_a_classification() -> None:
    pixels = [samples.Pixels(image(at)) for at in range(6)]
    made = judge(Given(pixels, "classification", ("a", "b", "c"), [0, 0, 0, 0, 1, 1]))
    assert "no sample of c" in made["class-missing"].problem
    assert "b" in made["class-missing-in-split"].problem or "a" in made["class-missing-in-split"].problem
    assert "spacing-unknown" not in made


# --- codes ------------------------------------------------------------------------------------------------------------


def test_every_kind_of_fault_is_in_the_catalogue() -> None:
    assert set(catalogue.FILES) <= set(defect.KINDS) <= set(catalogue.ENTRIES)
    for entry in catalogue.ENTRIES.values():
        assert entry.severity in finding.SEVERITIES
        assert entry.why.endswith(".")
        assert entry.remedy


def test_a_fault_keeps_its_code_in_lists_copies_and_errors() -> None:
    fault = defect.MASK_VALUE.fault("data/a.png: value 7 is no class", [7])
    other = defect.LINK.fault("b: a link")
    for copied in (copy.deepcopy(fault), pickle.loads(pickle.dumps(fault))):
        assert (copied, copied.code, copied.values) == (fault, "mask-value", (7,))
    assert errors.DataError("x", [fault, fault]).code == "mask-value"
    assert errors.DataError("x", [fault, other]).code == errors.DataError("x", ["a", "b"]).code == "data"
    error = defect.MASK_VALUE.error("data/a.png: value 7 is no class", [7]).at("site 'north'")
    assert (error.code, error.values, str(error)) == ("mask-value", (7,), f"site 'north': {fault}")
    assert error.fault(Path("data")).endswith("'north': a.png: value 7 is no class")
    for sent in (error, errors.PartitionError("x", code=defect.PATIENT_ACROSS_SPLITS)):
        assert pickle.loads(pickle.dumps(sent)).code == sent.code


def test_what_has_no_code_is_of_no_known_kind() -> None:
    for thing in ("images/series.png: a mask with value 3", errors.DataError("damaged"), ValueError("cut short")):
        assert defect.of(thing) == "structure"
    assert defect.of(errors.DataError("x", code="nobody-knows")) == "structure"


def test_a_large_value_of_a_mask_may_be_a_patient_s_number() -> None:
    pixels: list[samples.Pixels | Exception] = [samples.Pixels(image(at), square()) for at in range(3)]
    made = judge(Given([*pixels, defect.MASK_VALUE.error("x", [19_510_203]), defect.MASK_VALUE.error("y", [7])]))
    assert made["mask-value"].problem == "mask values that are no class: 2 samples, values 7"


def test_polarity_is_advised_for_two_groups_of_pictures_only() -> None:
    dark = [samples.Pixels(image(at, low=0.0, high=0.5), square()) for at in range(6)]
    bright = [samples.Pixels(image(at, low=0.6, high=1.0), square()) for at in range(6, 9)]
    middle = [samples.Pixels(image(at, low=0.1, high=0.6 + at / 20), square()) for at in range(8)]
    made = judge(Given([*dark, *bright]))
    assert made["polarity-mixed"].count == 3
    assert "made worse" in made["polarity-mixed"].remedy
    assert "polarity-mixed" not in judge(Given([*dark[:2], *middle, *bright]))
    with_units = [dataclasses.replace(one, units=(0.0, 4095.0)) for one in (*dark, *bright)]
    assert "polarity-mixed" not in judge(Given(with_units)), "DICOM says what is bright"


def test_what_training_would_refuse_is_refused() -> None:
    grey, colour = samples.Pixels(image(1), square()), samples.Pixels(image(0, (3, 40, 40)), square())
    made = judge(Given([grey, colour, grey]), contract(channels=["a", "b", "c"]))
    assert (made["channels"].severity, made["channels"].samples) == ("blocker", (1, 3))
    made = judge(Given([grey, dataclasses.replace(grey, units=(-1000.0, 1000.0))]), contract(window=[0.0, 80.0]))
    assert made["volume-needed"].samples == (1,)


@pytest.mark.files("greys", "CT as NIfTI, not in Hounsfield units", "", "under a window the finding `never-negative`")
@pytest.mark.parametrize(("shift", "scale", "right"), [(0, 1.0, True), (1024, 1.0, False), (1024, 1 / 2000, False)])
def test_a_window_on_values_that_are_never_negative(tmp_path: Path, shift: int, scale: float, right: bool) -> None:
    values = (np.random.default_rng(0).integers(-1000, 900, (8, 8, 4)) + shift).astype(np.float32) * np.float32(scale)
    for part, made in (("images", values), ("masks", (values > 0).astype(np.uint8))):
        (tmp_path / part).mkdir()
        nibabel.save(nibabel.Nifti1Image(made, np.eye(4)), tmp_path / part / "a.nii")
    asked = {"class_names": ["rest", "x"], "input_size": [16, 16], "modality": "CT"}
    for window, told in (([40.0, 400.0], not right), ([40.0, 80.0], False)):
        contract = schema.DataContract.model_validate({**asked, "window": window})
        source = folder.Folder(schema.SourceConfig(source="folder", path=str(tmp_path))).under(contract)
        seen = survey.look(source, survey.spaced(source.samples(), 0), contract=contract)
        looked = dataset.Looked(source.info, ("rest", "x"), source.samples(), seen, {}, contract=contract)
        codes = {each.code for each in image_findings.findings(looked)}
        assert ("never-negative" in codes) == told
