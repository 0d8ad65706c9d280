"""One DICOM series put in order along its normal: its grid, or what is wrong with it, in numbers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.data import dicom, geometry, wanted
from fedvfm.data import header as headers

UNEVEN = 0.1
"""How far a slice may lie from its place, in steps from slice to slice."""
PARALLEL = 1e-3
NO_STEP_MM = 0.01
SHOWN = 5
CURVED = "carries a table for display (VOI LUT); values are taken as stored, not as a viewer shows them"

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
        raise errors.DataError(f"{path}: no DICOM image{what}; bring the images or remove it")
    found = wanted.among(study.series, words)
    if not found:
        raise errors.DataError(
            f"{path}: no series fits '{words}'; say it in the words of this list:{wanted.listed(study.series)}"
        )
    if len(found) > 1:
        fitting = f" that fit '{words}'" if words else ""
        raise errors.DataError(
            f"{path}: {len(found)} series{fitting}, one is read; leave only one in the folder, or choose one in words "
            f"of this list (predict --series, data.options.series = '{_hint(found)}'):{wanted.listed(found)}"
        )
    notes = (f"{study.unread} file(s) without images were not read",) if study.unread else ()
    header = arrange(path, found[0], notes)
    return dataclasses.replace(header, among=True) if len(study.series) > 1 else header


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
    if len({(one.rows, one.columns, one.samples, one.spacing) for one in slices}) > 1:
        raise errors.DataError(f"{path}: images of different size or spacing in one {series}; split it into series")
    first = slices[0]
    if first.samples not in (1, 3):
        raise errors.DataError(f"{path}: {first.samples} samples a pixel; one (grey) or three (colour) are read")
    placed = all(one.position is not None and one.orientation is not None for one in slices)
    if placed and first.spacing is not None and not _film(slices):
        return _volume(path, series, notes)
    if len(slices) > 1 and not series.films:
        raise errors.DataError(
            f"{path}: {len(slices)} images that do not say where they lie in the patient ({series}); make a folder of "
            "each"
        )
    return _pictures(path, series, notes)


def _film(slices: Sequence[dicom.Slice]) -> bool:
    """Whether all frames of one file show one place."""
    one_file = len({one.frame.file for one in slices}) == 1
    return one_file and len(slices) > 1 and len({(one.position, one.orientation) for one in slices}) == 1


def _pictures(path: Path, series: dicom.Series, notes: tuple[str, ...]) -> headers.Header:
    """A radiograph, a photograph, or a film of them: rows and columns as stored are rows and columns as shown."""
    first = series.slices[0]
    row, column = first.spacing or (1.0, 1.0)
    affine = geometry.from_lps(np.diag([column, row, 1.0, 1.0]))
    shape = (first.columns, first.rows, len(series.slices))
    grid = geometry.Grid(shape, affine, placed=False, sized=first.spacing is not None)
    frames = tuple(one.frame for one in series.slices)
    return _header(path, series, grid, 2, frames, notes, moments=len(frames) > 1)


def _volume(path: Path, series: dicom.Series, notes: tuple[str, ...]) -> headers.Header:
    directions = np.array([one.orientation for one in series.slices], dtype=np.float64)
    if np.abs(directions - directions[0]).max() > PARALLEL:
        raise errors.DataError(f"{path}: images in different directions in one {series} (a localiser?); split it")
    row, column = directions[0, :3], directions[0, 3:]
    normal = np.cross(row, column)
    if abs(np.linalg.norm(normal) - 1.0) > 1e-2:
        raise errors.DataError(f"{path}: rows and columns of {series} are not at right angles; export it again")
    along = np.array([one.position for one in series.slices], dtype=np.float64) @ normal
    order = np.argsort(along, kind="stable")
    slices = [series.slices[i] for i in order]
    step = _step(path, series, along[order], np.array([one.position for one in slices], dtype=np.float64), normal)
    spacing = slices[0].spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * spacing[1], column * spacing[0], step
    affine[:3, 3] = slices[0].position
    if len(slices) > 1 and np.linalg.norm(step - normal * (step @ normal)) > 0.01 * np.linalg.norm(step):
        notes = (*notes, "slices lie askew (a tilted gantry): distances are those of the tilted grid")
    grid = geometry.Grid((slices[0].columns, slices[0].rows, len(slices)), geometry.from_lps(affine))
    return _header(path, series, grid, grid.turn().axes[2], tuple(one.frame for one in slices), notes)


def _step(path: Path, series: dicom.Series, along: Points, positions: Points, normal: Points) -> Points:
    """From slice to slice in LPS millimetres.

    Raises:
        DataError: for slices that are missing, unevenly spaced, or several at one place.
    """
    if len(along) == 1:
        thickness = series.slices[0].thickness
        return np.asarray(normal * (thickness if thickness is not None and thickness > 0 else 1.0))
    gaps = np.diff(along)
    if gaps.min() < NO_STEP_MM:
        places = len(along) - int((gaps < NO_STEP_MM).sum())
        raise errors.DataError(
            f"{path}: {len(along)} images at {places} places in one {series}: several phases, echoes or copies; leave "
            "one of each place"
        )
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])  # of two the smaller: what is missing makes gaps larger
    uneven = np.flatnonzero(np.abs(gaps - usual) > UNEVEN * usual)
    if len(uneven):
        shown = ", ".join(f"{along[i]:.1f} to {along[i + 1]:.1f}" for i in uneven[:SHOWN])
        more = f" and {len(uneven) - SHOWN} more places" if len(uneven) > SHOWN else ""
        raise errors.DataError(
            f"{path}: slices missing or unevenly spaced: {shown} mm{more}, where {usual:g} mm is the rule in {series}; "
            "bring the missing slices, or resample the volume and save it as NIfTI"
        )
    step: Points = (positions[-1] - positions[0]) / (len(positions) - 1)
    expected = positions[0] + np.arange(len(positions))[:, None] * step
    if np.abs(positions - expected).max() > max(UNEVEN * usual, geometry.SAME_PLACE_MM):
        raise errors.DataError(
            f"{path}: the slices of {series} do not lie on one line; resample the volume and save it as NIfTI"
        )
    return step


def _header(
    path: Path,
    series: dicom.Series,
    grid: geometry.Grid,
    axis: int,
    frames: tuple[headers.Frame, ...],
    notes: tuple[str, ...],
    *,
    moments: bool = False,
) -> headers.Header:
    channels = series.slices[0].samples
    notes = (*notes, CURVED) if series.curved else notes
    return headers.Header(path, "dicom", grid, axis, series.modality, channels, moments, series.inverted, frames, notes)


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
