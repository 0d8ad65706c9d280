"""One DICOM series put in order along its normal: its grid, or what is wrong with it, in numbers."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedvfm.data import defect
from fedvfm.data.volumes import dicom, dicom_frames, geometry, series_selector
from fedvfm.data.volumes import header as headers

UNEVEN = 0.1
"""How far a slice may lie from its place, in steps from slice to slice."""
FARTHER = 1.5
PARALLEL = 1e-3
NO_STEP_MM = 0.01
SHOWN = 5
ROUNDED_MM = 0.05
"""How far one decimal may move a position."""
ROUNDED_SHARE = 0.16
"""The same in steps of the fit: where one of four slices is missing the others lie a sixth of a step beside it."""
NO_THICKNESS = "its one slice does not say how thick it is; 1 mm was taken, and volumes in ml are not told"
NOT_HOUNSFIELD = "values are not in Hounsfield units"
SCOUT = f"{NOT_HOUNSFIELD}: a localiser (Image Type), of whose values the standard does not say what they are"
UNSCALED = "the file does not say how its values become Hounsfield units (no rescale slope and intercept)"
NO_SIZE = "does not say how large a pixel is (Pixel Spacing is missing), so it is read as a picture without a place"
PET = {
    "GML": "",
    "CM2ML": "",
    "BQML": "PET values are activity (Bq/ml) and no SUV: they depend on dose, weight and time",
    "": "PET values have no unit (Units) in the file",
}
"""What is to be said of a PET by its unit; of units not named here that they are no SUV."""
PET_OTHER = "PET values are neither activity nor SUV, so that no two series compare"
ONE_PLACE = (
    "all its frames lie at one place and do not say that they are moments (phases, echoes, directions); each is a "
    "picture by itself"
)
ALTERNATING = "slices of several acquisitions (Acquisition Number) alternate; each may be a volume of its own"
CURVED = "carries a table for display (VOI LUT); values are taken as stored, not as a viewer shows them"

SLICED = ("CT", "MR", "PT")
"""Modalities whose files are slices of a body."""

Points = NDArray[np.float64]


def read_header(path: Path, words: str = "") -> headers.Header:
    """The one series of a folder, or of one file; ``words`` say which, where there are several.

    Raises:
        DataError: if there is no image, no series that is meant or several (they are listed), images that differ in
            size or direction, slices that are missing, or several at one place.
    """
    study = dicom.find(path)
    if not study.series:
        what = f"; {len(study.segmentations)} segmentation(s)" if study.segmentations else ""
        raise defect.IMAGE_MISSING.error(f"{path}: no DICOM image{what}; bring the images or remove it")
    found = series_selector.among(study.series, words)
    if not found:
        raise defect.SERIES_MIXED.error(
            f"{path}: no series fits '{words}'; say it in the words of this list:{series_selector.listed(study.series)}"
        )
    if len(found) > 1:
        fitting = f" that fit '{words}'" if words else ""
        raise defect.SERIES_MIXED.error(
            f"{path}: {len(found)} series{fitting}, one is read; leave only one in the folder, or choose one in words "
            f"of this list (predict --series, data.options.series = '{_hint(found)}'):{series_selector.listed(found)}"
        )
    header = arrange(path, found[0], study.notes)
    return dataclasses.replace(header, among=len(study.series) > 1, left=tuple(study.left))


def _hint(found: Sequence[dicom.Series]) -> str:
    """Words that tell the first of several series apart, as an example."""
    first, others = found[0], found[1:]
    if first.number is not None and all(one.number != first.number for one in others):
        return str(first.number)
    return " ".join(word for word in (first.modality, first.plane) if word)


def arrange(path: Path, series: dicom.Series, notes: tuple[str, ...] = ()) -> headers.Header:
    """The header of one series.

    Raises:
        DataError: see :func:`read_header`.
    """
    slices = series.slices
    _refuse_unplaced(path, series)
    if len({(frame.rows, frame.columns, frame.samples) for frame in slices}) > 1 or not _one_spacing(slices):
        raise defect.SERIES_MIXED.error(
            f"{path}: images of different size or spacing in one {series}; split it into series"
        )
    first = slices[0]
    if first.samples not in (1, 3):
        raise defect.CHANNELS.error(f"{path}: {first.samples} samples a pixel; one (grey) or three (colour) are read")
    _refuse_mixed(path, series)
    placed = all(one.position is not None and one.orientation is not None for one in slices)
    film = _film(slices)
    if placed and first.spacing is not None and not film:
        return _volume(path, series, notes)
    if len(slices) > 1 and placed and not film:
        raise defect.PIXEL_SIZE.error(
            f"{path}: {len(slices)} images that do not say how large a pixel is (Pixel Spacing is missing in "
            f"{series}); export the series again, or as NIfTI"
        )
    if len(slices) > 1 and not series.films:
        raise defect.NO_GEOMETRY.error(
            f"{path}: {len(slices)} images that do not say where they lie in the patient ({series}); make a folder of "
            "each"
        )
    if len({one.frame.file for one in slices}) > 1:
        clips = len({one.frame.file for one in slices})
        raise defect.SERIES_MIXED.error(f"{path}: {clips} clips or pictures in one {series}; make a folder of each")
    if placed:
        notes = (*notes, ONE_PLACE) if film and not first.moment else notes if film else (*notes, NO_SIZE)
    return _pictures(path, series, notes)


def _refuse_unplaced(path: Path, series: dicom.Series) -> None:
    """Refuse a series of which some images lie in the patient and others (screen copies, reports) do not say where.

    Raises:
        DataError: with their number.
    """
    lacking = [frame for frame in series.slices if frame.position is None or frame.orientation is None]
    if 0 < len(lacking) < len(series.slices):
        raise defect.SERIES_MIXED.error(
            f"{path}: {len(lacking)} of {len(series.slices)} images of {series} do not say where they lie in the "
            "patient, the others do (a copy of the screen, a report?); take them out"
        )


def _one_spacing(slices: Sequence[dicom_frames.Slice]) -> bool:
    """Whether pixels are of one size, up to how numbers were written: over a whole slice they stay at their places."""
    known = [frame.spacing for frame in slices if frame.spacing is not None]
    if len(known) < len(slices):
        return not known
    side = max(slices[0].rows, slices[0].columns)
    return bool(np.ptp(np.array(known), axis=0).max() * side <= geometry.SAME_PLACE_MM)


def _refuse_mixed(path: Path, series: dicom.Series) -> None:
    """Refuse slices whose values are not all scaled alike, or not in one unit.

    Raises:
        DataError: with the numbers.
    """
    without = [one for one in series.slices if not one.scaled]
    others = [one for one in series.slices if one.scaled]
    if without and any((one.frame.slope, one.frame.intercept, one.frame.table) != (1.0, 0.0, False) for one in others):
        raise defect.GREY_UNITS.error(
            f"{path}: {len(without)} of {len(series.slices)} images of {series} do not say how their values are "
            "scaled, the others do (rescale missing); export the series again"
        )
    units = sorted({one.units or "none named" for one in others})
    if len(units) > 1 and not set(units) <= {"HU", "none named"}:
        raise defect.GREY_UNITS.error(
            f"{path}: values in several units ({', '.join(units)}) in one {series}; split it into series"
        )


def _hounsfield(series: dicom.Series) -> tuple[bool | None, tuple[str, ...]]:
    """Whether the values of a CT are Hounsfield units, and what is to be said where they are not."""
    if series.modality != "CT" or series.slices[0].samples != 1:
        return None, ()
    if not all(one.scaled for one in series.slices):
        return False, (f"{NOT_HOUNSFIELD}: {UNSCALED}",)
    units = {one.units for one in series.slices} - {"", "HU"}
    if units == {dicom_frames.LOCALISER}:
        return False, (SCOUT,)
    if units:
        return False, (f"{NOT_HOUNSFIELD} but of rescale type {', '.join(sorted(units))}",)
    return True, ()


def _pet(series: dicom.Series) -> tuple[str, ...]:
    """What is to be said of the unit of a PET; grey values of two units are no one scale."""
    if series.modality != "PT":
        return ()
    note = PET.get(series.slices[0].units, PET_OTHER)
    return (note,) if note else ()


def _film(slices: Sequence[dicom_frames.Slice]) -> bool:
    """Whether all frames of one file show one place."""
    one_file = len({one.frame.file for one in slices}) == 1
    return one_file and len(slices) > 1 and len({(one.position, one.orientation) for one in slices}) == 1


def is_apart(series: dicom.Series) -> bool:
    """Whether the files of a series are images by themselves: radiographs, photographs, or films.

    Slices of a body that lost their places are none: their number would be taken for that of cases.
    """
    if series.modality in SLICED and len(series.slices) > 1 and not series.films:
        return False
    files: dict[Path, list[dicom_frames.Slice]] = {}
    for one in series.slices:
        files.setdefault(one.frame.file, []).append(one)
    return all(_film(held) or all(one.position is None for one in held) for held in files.values())


def _pictures(path: Path, series: dicom.Series, notes: tuple[str, ...]) -> headers.Header:
    """A radiograph, a photograph, or a film of them: rows and columns as stored are rows and columns as shown."""
    first = series.slices[0]
    row, column = first.spacing or (1.0, 1.0)
    affine = geometry.from_lps(np.diag([column, row, 1.0, 1.0]))
    shape = (first.columns, first.rows, len(series.slices))
    grid = geometry.Grid(shape, affine, placed=False, sized=first.spacing is not None)
    found = tuple(one.frame for one in series.slices)
    moments = len(found) > 1 and first.moment
    return _header(path, series, grid, 2, found, notes, moments=moments)


def _volume(path: Path, series: dicom.Series, notes: tuple[str, ...]) -> headers.Header:
    if len({one.reference for one in series.slices if one.reference}) > 1:
        raise defect.SERIES_MIXED.error(
            f"{path}: images in several frames of reference in one {series}, so their positions do not compare; split "
            "it into series"
        )
    directions = np.array([one.orientation for one in series.slices], dtype=np.float64)
    if np.abs(directions - directions[0]).max() > PARALLEL:
        raise defect.SERIES_MIXED.error(
            f"{path}: images in different directions in one {series} (a localiser?); split it"
        )
    row, column = directions[0, :3], directions[0, 3:]
    normal = np.cross(row, column)
    if abs(np.linalg.norm(normal) - 1.0) > 1e-2:
        raise defect.NO_GEOMETRY.error(f"{path}: rows and columns of {series} are not at right angles; export it again")
    along = np.array([one.position for one in series.slices], dtype=np.float64) @ normal
    order = np.argsort(along, kind="stable")
    slices = [series.slices[i] for i in order]
    positions = np.array([one.position for one in slices], dtype=np.float64)
    step, start, more = _step(path, series, along[order], positions, normal)
    notes = (*notes, *more, *_alternating(path, series, slices), *_farther(slices, float(np.linalg.norm(step))))
    spacing = slices[0].spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * spacing[1], column * spacing[0], step
    affine[:3, 3] = start
    if len(slices) > 1 and np.linalg.norm(step - normal * (step @ normal)) > 0.01 * np.linalg.norm(step):
        notes = (
            *notes,
            "slices lie askew (a tilted gantry): distances are those of the tilted grid; ITK, 3D Slicer and nnU-Net "
            "refuse a NIfTI on it, DICOM-SEG is taken",
        )
    grid = geometry.Grid((slices[0].columns, slices[0].rows, len(slices)), geometry.from_lps(affine))
    thick = len(slices) > 1 or slices[0].thickness is not None
    found = tuple(one.frame for one in slices)
    return _header(path, series, grid, grid.turn().axes[2], found, notes, thick=thick)


def _alternating(path: Path, series: dicom.Series, slices: Sequence[dicom_frames.Slice]) -> tuple[str, ...]:
    """What is to be said of slices of several acquisitions that lie between each other, not one after the other.

    Raises:
        DataError: of a CT, whose acquisitions differ in contrast agent or moment.
    """
    numbers = [frame.acquisition for frame in slices if frame.acquisition is not None]
    changes = sum(here != there for here, there in itertools.pairwise(numbers))
    if not numbers or changes < len(set(numbers)):
        return ()
    if series.modality == "CT":
        raise defect.SERIES_MIXED.error(
            f"{path}: {ALTERNATING.replace('may be', 'is')} (before and after contrast agent, say), in one {series}; "
            "split it by Acquisition Number"
        )
    return (ALTERNATING,)


def _farther(slices: Sequence[dicom_frames.Slice], step: float) -> tuple[str, ...]:
    """What is to be said of slices that lie farther apart than their files say: every second one may be missing.

    Some writers give the gap between slices, without their thickness, where the standard means from centre to centre.
    """
    stated, thickness = slices[0].apart, slices[0].thickness
    if len(slices) < 2 or stated is None or step < FARTHER * stated:
        return ()
    if thickness is not None and stated < thickness and abs(stated + thickness - step) <= UNEVEN * step:
        return ()
    return (
        f"slices lie {step:g} mm apart, where their files say {stated:g} mm (Spacing Between Slices): some may be "
        "missing everywhere",
    )


def _step(
    path: Path, series: dicom.Series, along: Points, positions: Points, normal: Points
) -> tuple[Points, Points, tuple[str, ...]]:
    """From slice to slice and the first slice's place, in LPS millimetres, and what is to be said of it.

    Raises:
        DataError: for slices that are missing, unevenly spaced, or several at one place.
    """
    if len(along) == 1:
        thickness = series.slices[0].thickness
        alone: Points = np.asarray(normal * (1.0 if thickness is None else thickness))
        return alone, positions[0], (NO_THICKNESS,) if thickness is None else ()
    gaps = np.diff(along)
    if gaps.min() < NO_STEP_MM:
        places = len(along) - int((gaps < NO_STEP_MM).sum())
        raise defect.SLICES_MISSING.error(
            f"{path}: {len(along)} images at {places} places in one {series}: several phases, echoes or copies; leave "
            "one of each place"
        )
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])  # of two the smaller: what is missing makes gaps larger
    uneven = np.flatnonzero(np.abs(gaps - usual) > UNEVEN * usual)
    if len(uneven):
        rounded = _rounded(positions, normal, series.slices[0].thickness)
        if rounded is not None:
            return rounded
        shown = ", ".join(f"{along[i]:.1f} to {along[i + 1]:.1f}" for i in uneven[:SHOWN])
        more = f" and {len(uneven) - SHOWN} more places" if len(uneven) > SHOWN else ""
        raise defect.SLICES_MISSING.error(
            f"{path}: slices missing or unevenly spaced: {shown} mm{more}, where {usual:g} mm is the rule in {series}; "
            "bring the missing slices, or resample the volume and save it as NIfTI"
        )
    step: Points = (positions[-1] - positions[0]) / (len(positions) - 1)
    expected = positions[0] + np.arange(len(positions))[:, None] * step
    if np.abs(positions - expected).max() > max(UNEVEN * usual, geometry.SAME_PLACE_MM):
        raise defect.SLICES_MISSING.error(
            f"{path}: the slices of {series} do not lie on one line; resample the volume and save it as NIfTI"
        )
    return step, positions[0], ()


def _rounded(
    positions: Points, normal: Points, thickness: float | None
) -> tuple[Points, Points, tuple[str, ...]] | None:
    """The regular grid that positions were rounded from: its step, first place and a note; None where there is none.

    Every coordinate must lie within half of a last decimal (0.05 mm), and 0.16 of a step, of its place. Of the steps
    that fit the stated thickness is taken, else that of least squares, else that of the smallest largest distance.
    """
    index = np.arange(len(positions), dtype=np.float64)
    centred = index - index.mean()
    squares = centred @ positions / (centred @ centred)
    widest = np.array([_nearest_step(positions[:, axis]) for axis in range(3)])
    stated = squares / np.linalg.norm(squares) * thickness if thickness and squares.any() else squares
    for step in (stated, squares, widest):
        rest = positions - index[:, None] * step
        off = float(np.ptp(rest, axis=0).max()) / 2
        if off <= ROUNDED_MM + 1e-6 and off <= ROUNDED_SHARE * abs(float(step @ normal)):
            start = (rest.max(axis=0) + rest.min(axis=0)) / 2
            return (
                step,
                start,
                (f"positions of slices were rounded: they lie up to {off:.2f} mm beside a regular grid",),
            )
    return None


def _nearest_step(values: Points) -> float:
    """The step of the line nearest to values at 0, 1, 2, ... by the largest distance, which is convex in it."""
    index = np.arange(len(values))
    usual, wide = (values[-1] - values[0]) / (len(values) - 1), 2 * np.ptp(values) / (len(values) - 1) + 1e-6
    low, high = float(usual - wide), float(usual + wide)
    for _ in range(80):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if np.ptp(values - left * index) <= np.ptp(values - right * index) else (left, high)
    return (low + high) / 2


def _header(
    path: Path,
    series: dicom.Series,
    grid: geometry.Grid,
    axis: int,
    found: tuple[headers.Frame, ...],
    notes: tuple[str, ...],
    *,
    moments: bool = False,
    thick: bool = True,
) -> headers.Header:
    channels, inverted = series.slices[0].samples, any(frame.inverted for frame in found)
    hounsfield, units = _hounsfield(series)
    notes = (*notes, *series.notes, *units, *_pet(series), *((CURVED,) if series.curved else ()))
    return headers.Header(
        path,
        "dicom",
        grid,
        axis,
        series.modality,
        channels,
        moments,
        inverted,
        found,
        notes,
        thick=thick,
        hounsfield=hounsfield,
    )


def stamp(path: Path) -> tuple[int, ...]:
    """Numbers that change when files come to a folder of a series or go from it.

    Asked for every slice, so files themselves are not looked at: who changes them in place starts a new process.
    """
    found, deeper = [path.stat().st_mtime_ns], [path]
    while deeper:
        with os.scandir(deeper.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    deeper.append(Path(entry.path))
                    found.append(entry.stat().st_mtime_ns)
    return tuple(sorted(found))
