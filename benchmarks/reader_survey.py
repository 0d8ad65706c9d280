"""Our readers over the test files of public libraries, beside pydicom, nibabel and SimpleITK: counts and differences.

Run: ``python benchmarks/reader_survey.py [FOLDER ...] [--write]``. Without folders: the files that pydicom,
pydicom-data (``pip install pydicom-data``) and nibabel bring, as far as they are installed; highdicom's are in its
repository alone (``data/test_files``), so give that folder. SimpleITK is asked where it is installed.

Each file is read by itself. "Equal" are the same values at the same voxels, frame by frame, after what the standard
says of grey values (rescale, Modality LUT, palettes); of SimpleITK also the same places. ``--write`` puts the tables
into docs/files.md. What differs is listed with its reason, or as unexplained.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels import processing

from fedvfm import errors
from fedvfm.data.volumes import dicom, dicom_pixels, geometry, nifti, volumes
from fedvfm.data.volumes import header as headers

PAGE = Path(__file__).parents[1] / "docs" / "files.md"
START, END = "<!-- made by benchmarks/reader_survey.py -->\n", "<!-- end of the survey -->\n"
Values = NDArray[Any]


@dataclass
class Verdict:
    """What came of one file.

    Attributes:
        ours: "read", or the code of the refusal.
        other: what the library of its format says: "equal", "differs", "fails", or "-" where it was not asked.
        itk: the same of SimpleITK.
        why: reasons of differences.
    """

    ours: str
    other: str = "-"
    itk: str = "-"
    why: set[str] = field(default_factory=set)


def sets() -> dict[str, Path]:
    """Where the public libraries keep their test files."""
    places = {"pydicom": ("pydicom", "data/test_files"), "pydicom-data": ("data_store", "data")}
    places["nibabel"] = ("nibabel", "tests/data")
    installed = {}
    for name, (package, folder) in places.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None and (Path(spec.origin).parent / folder).is_dir():
            installed[name] = Path(spec.origin).parent / folder
    return installed


def files_in(folder: Path) -> Iterator[Path]:
    """DICOM by content, and files whose ending names a volume."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "DICOMDIR" and (dicom.is_dicom(path) or _is_volume(path)):
            yield path


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(tuple(volumes.ENDINGS))


def judge(path: Path) -> Verdict:
    """Read one file by all."""
    try:
        header = volumes.read_header(path)
        volume = volumes.read_volume(path)
    except errors.FedvfmError as error:
        verdict = Verdict(error.code, why={_brief(error)})
        verdict.other = "reads" if _reads(path) else "fails"
        verdict.itk = "-" if itk() is None else "reads" if _itk(path) is not None else "fails"
        return verdict
    verdict = Verdict("read")
    stored = header.stored.turn().undo(volume.voxels)
    compare = _beside_pydicom if header.kind == "dicom" else _beside_nibabel
    verdict.other = compare(path, header, stored, verdict.why)
    verdict.itk = _beside_itk(path, header, stored, verdict.why)
    return verdict


def _brief(error: errors.FedvfmError) -> str:
    return str(error).partition(": ")[2].partition(";")[0]


def _reads(path: Path) -> bool:
    with contextlib.suppress(Exception):
        if dicom.is_dicom(path):
            return bool(pydicom.dcmread(path, force=True).pixel_array.size)
        return bool(np.asanyarray(nibabel.load(path).dataobj).size)
    return False


def _beside_pydicom(path: Path, header: headers.Header, stored: Values, why: set[str]) -> str:
    """Frame by frame against pydicom's decoding and its own functions for rescale, tables and palettes."""
    try:
        tags = pydicom.dcmread(path, force=True)
        if "TransferSyntaxUID" not in tags.file_meta:
            tags.file_meta.TransferSyntaxUID = dicom.syntax(tags)
        pixels = tags.pixel_array
    except Exception:
        return "fails"
    palette = tags.PhotometricInterpretation == "PALETTE COLOR"
    frames = (
        pixels if len(header.frames) > 1 or (pixels.ndim > 2 and int(tags.get("NumberOfFrames") or 1) > 1) else [pixels]
    )
    equal = True
    for at, frame in enumerate(header.frames):
        values = frames[frame.number]
        expected = processing.apply_color_lut(values, tags)[..., :3] if palette else _as_said(values, tags, frame)
        ours = stored[:, :, at].swapaxes(0, 1)
        if not np.allclose(ours, expected, rtol=1e-5, atol=1e-4):
            equal = False
            why.update(_reason(ours, expected, values, header, frame, tags))
    return "equal" if equal else "differs"


def _as_said(values: Values, tags: Any, frame: headers.Frame) -> Values:
    if tags.get("ModalityLUTSequence") or "RescaleSlope" in tags:
        return np.asarray(processing.apply_modality_lut(values, tags), dtype=np.float64)
    return np.asarray(values * frame.slope + frame.intercept if values.ndim == 2 else values, dtype=np.float64)


def _reason(
    ours: Values, theirs: Values, raw: Values, header: headers.Header, frame: headers.Frame, tags: Any
) -> set[str]:
    """Why values differ from pydicom's functions, which neither turn polarity nor know padding."""
    if ours.shape != theirs.shape:
        return {"other shape"}
    off = ~np.isclose(ours, theirs, rtol=1e-5, atol=1e-4)
    reasons = set()
    if frame.inverted and header.modality not in dicom_pixels.IN_UNITS:
        return {"MONOCHROME1 is turned round"}
    if frame.padding is not None and raw.ndim == 2:
        padded = (raw >= frame.padding[0]) & (raw <= frame.padding[1])
        reasons |= {"padding is made dark"} if (off & padded).any() else set()
        off &= ~padded
    if header.hounsfield and (theirs[off] < dicom_pixels.AIR_HU).all() and off.any():
        return reasons | {"values below air are raised to it"}
    if off.any() and not frame.table and tags.get("ModalityLUTSequence"):
        return reasons | {"the Modality LUT of XA is not applied"}
    return reasons | ({"unexplained"} if off.any() else set())


def _beside_nibabel(path: Path, header: headers.Header, stored: Values, why: set[str]) -> str:
    if header.kind != "nifti":
        return "-"
    image = nibabel.load(path)
    expected = np.asanyarray(image.dataobj).reshape(stored.shape)
    same = np.allclose(stored, expected, rtol=1e-5, atol=1e-5)
    units = nifti.UNITS.get(image.header.get_xyzt_units()[0], 1.0)
    placed = np.allclose(header.stored.affine, np.diag([units] * 3 + [1.0]) @ image.affine, atol=1e-4)
    why.update(set() if same else {"unexplained"})
    why.update(set() if placed else {"place unexplained"})
    return "equal" if same and placed else "differs"


def itk() -> Any:
    """SimpleITK, or None where it is not installed."""
    if importlib.util.find_spec("SimpleITK") is None:
        return None
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def _itk(path: Path) -> Any:
    # ITK's readers print what they think of a file; nothing of it is needed here.
    quiet, kept = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(quiet, 2)
    try:
        return itk().ReadImage(str(path))
    except Exception:
        return None
    finally:
        os.dup2(kept, 2)
        os.close(quiet)
        os.close(kept)


def _beside_itk(path: Path, header: headers.Header, stored: Values, why: set[str]) -> str:
    library = itk()
    image = None if library is None else _itk(path)
    if image is None:
        return "-" if library is None else "fails"
    theirs = library.GetArrayFromImage(image)
    colour = image.GetNumberOfComponentsPerPixel() > 1
    theirs = theirs if theirs.ndim - colour == 3 else theirs[None]
    ours = np.moveaxis(stored, (0, 1, 2), (2, 1, 0))
    if ours.shape != theirs.shape:
        why.add(f"SimpleITK gives {'colours otherwise' if colour or header.channels == 3 else 'another shape'}")
        return "differs"
    same = np.allclose(ours, theirs, rtol=1e-4, atol=1e-3)
    turned = header.kind == "dicom" and not same and np.allclose(ours, theirs[::-1], rtol=1e-4, atol=1e-3)
    if not same and not turned:
        table = any(frame.table for frame in header.frames)
        reason = "has no Modality LUT" if table else "gives colours otherwise" if colour else "values, unexplained"
        why.add(f"SimpleITK {reason}" if not why else "the same beside SimpleITK")
        return "differs"
    if header.stored.placed and not turned and not _same_place(header, image):
        why.add("SimpleITK gives another place")
        return "differs"
    return "equal"


def _same_place(header: headers.Header, image: Any) -> bool:
    axes = min(3, image.GetDimension())
    affine = np.eye(4)
    directions = np.reshape(image.GetDirection(), (image.GetDimension(),) * 2)[:axes, :axes]
    affine[:axes, :axes] = directions * np.array(image.GetSpacing())[:axes]
    affine[:axes, 3] = image.GetOrigin()[:axes]
    ours = geometry.from_lps(header.stored.affine)
    thick = 3 if header.stored.shape[2] > 1 else 2  # of one slice ITK takes another thickness
    return np.allclose(ours[:, :thick], affine[:, :thick], atol=1e-3) and np.allclose(
        ours[:, 3], affine[:, 3], atol=1e-3
    )


def survey(folder: Path) -> dict[str, Verdict]:
    """All files of a folder."""
    verdicts = {}
    for path in files_in(folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdicts[path.relative_to(folder).as_posix()] = judge(path)
    return verdicts


def row(name: str, verdicts: dict[str, Verdict]) -> str:
    """A line of the table."""
    read = [verdict for verdict in verdicts.values() if verdict.ours == "read"]
    refused = [verdict for verdict in verdicts.values() if verdict.ours != "read"]
    cells = [len(verdicts), len(read)]
    for answers in (Counter(verdict.other for verdict in read), Counter(verdict.itk for verdict in read)):
        cells += [answers["equal"], answers["differs"], answers["fails"]]
    cells += [len(refused), sum(verdict.other == "reads" for verdict in refused)]
    cells += [sum(verdict.itk == "reads" for verdict in refused)]
    return f"| {name} | " + " | ".join(map(str, cells)) + " |"


HEAD = (
    "| files of | all | read | = library | differs | it fails | = SimpleITK | differs | it fails | refused | of these "
    "the library reads | SimpleITK reads |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)
REASONS = "| files | what differs, or is refused |\n|---|---|"


def reasons(verdict: Verdict) -> set[str]:
    """Of a file that is read why it differs; of one that is refused the kind of fault, where others read it."""
    if verdict.ours == "read":
        return verdict.why
    others = " and ".join(
        name for name, answer in (("library", verdict.other), ("SimpleITK", verdict.itk)) if answer == "reads"
    )
    return {f"refused (`{verdict.ours}`), {f'read by {others}' if others else 'and by the others'}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/files.md")
    asked = parser.parse_args()
    lines, counts = [HEAD], Counter[str]()
    for name, folder in ({path.name: path for path in asked.folders} or sets()).items():
        verdicts = survey(folder)
        lines.append(row(name, verdicts))
        for file, verdict in verdicts.items():
            counts.update(reasons(verdict))
            if verdict.why:
                print(
                    f"{name}: {file}: {verdict.ours}, {verdict.other}, {verdict.itk}: {'; '.join(sorted(verdict.why))}"
                )
    lines += ["", REASONS, *(f"| {number} | {reason} |" for reason, number in sorted(counts.items(), key=_order))]
    print("\n".join(lines))
    if asked.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(START)
        PAGE.write_text(before + START + "\n".join(lines) + "\n" + END + rest.split(END)[1], encoding="utf-8")


def _order(counted: tuple[str, int]) -> tuple[int, str]:
    return -counted[1], counted[0]


if __name__ == "__main__":
    main()
