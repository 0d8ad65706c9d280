"""What a volume's files say of it before voxels are read: its grid, its slices, its kind, and where its parts are."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedvfm.data import defect
from fedvfm.data.volumes import geometry

Kind = Literal["nifti", "nrrd", "metaimage", "dicom"]


def stamp_of(opened: IO[bytes]) -> tuple[int, int]:
    """When a file was last changed, in nanoseconds, and how many bytes it has."""
    state = os.fstat(opened.fileno())
    return state.st_mtime_ns, state.st_size


@dataclass(frozen=True, slots=True)
class Plain:
    """Values that lie in a file as they are: they need no decoder, only somebody who says where they lie.

    Attributes:
        offset: where they begin, in bytes.
        kind: numpy's name of their type.
        unused: how many of the highest bits of each mean nothing (DICOM PS3.5, Section 8.1.1).
        stamp: what :func:`stamp_of` said of the file as the place was looked up; None where that is right before it is
            read.
    """

    offset: int
    kind: str
    unused: int = 0
    stamp: tuple[int, int] | None = None

    def read(self, file: Path, count: int, where: object) -> NDArray[Any]:
        """The values in one row; they are read, as a file that is mapped and cut meanwhile would end this process.

        Raises:
            DataError: for what is no such block, and for a file that was changed since its place was looked up: what
                lies there now may be anything, and any bytes are numbers.
        """
        try:
            kind = np.dtype(self.kind)
            if kind.kind not in "iuf" or min(self.offset, count) < 0 or not 0 <= self.unused < 8 * kind.itemsize:
                raise ValueError
            with file.open("rb", buffering=0) as opened:
                if self.stamp not in (None, stamp_of(opened)):
                    raise defect.UNREADABLE.error(f"{where}: was changed since its header was read; start again")
                values = np.fromfile(opened, kind, count, offset=self.offset)
            if len(values) < count:
                raise EOFError
            return (values << self.unused) >> self.unused if self.unused else values
        except (OSError, ValueError, TypeError, OverflowError, EOFError) as error:
            raise defect.damaged(where, type(error).__name__) from None


@dataclass(frozen=True, slots=True)
class Frame:
    """Where one stored slice of a DICOM volume is. Neither is ever shown: both may name a patient.

    Attributes:
        file: the DICOM file.
        number: which frame of it, from 0.
        uid: its SOP instance UID, which DICOM-SEG objects refer to.
        slope, intercept: stored value to the file's units (rescale).
        together: whether its frames can only be read all together: packed as a whole, or single bits that split bytes.
        bare: whether the file begins without the 128 bytes and "DICM" of PS3.10.
        inverted: whether it shows small values bright (MONOCHROME1).
        table: whether its Modality LUT is applied to the values.
        padding: lowest and highest stored value that is no grey value but padding, or None.
        plain: where its values lie, where they are grey and in the file as they are; else None.
    """

    file: Path = field(repr=False)
    number: int = 0
    uid: str = field(default="", repr=False)
    slope: float = 1.0
    intercept: float = 0.0
    together: bool = False
    bare: bool = False
    inverted: bool = False
    table: bool = False
    padding: tuple[float, float] | None = None
    plain: Plain | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """What a volume's files say of it before voxels are read.

    Attributes:
        path: the file, or the folder of a DICOM series.
        kind: how it is stored.
        stored: the grid in the file's own axes; DICOM: (column, row, slice), slices in the order of ``frames``.
        slices: the canonical axis that crosses the slices as acquired (DICOM: those of the series; else the coarsest
            axis where one is clearly coarser, or z).
        modality: DICOM's code ("CT", "MR", ...), or empty.
        channels: 1 grey, 3 colour.
        moments: whether the slices are moments of one view (an ultrasound film), not places.
        inverted: whether a frame shows small values bright (MONOCHROME1); its voxels are read the other way round.
        frames: where DICOM's slices are, in the order of the stored third axis.
        notes: what a reader should know, one sentence each, without text of the file.
        among: whether other series lie in the same folder.
        left: files of the folder that were left out, each with the reason.
        thick: whether the file says how thick its slices are; else the third spacing of one slice is a guess.
        hounsfield: whether the values of a CT are in Hounsfield units; None where the kind of file does not say.
    """

    path: Path = field(repr=False)
    kind: Kind
    stored: geometry.Grid
    slices: int = 2
    modality: str = ""
    channels: int = 1
    moments: bool = False
    inverted: bool = False
    frames: tuple[Frame, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    among: bool = False
    left: tuple[tuple[Path, str], ...] = field(default=(), repr=False)
    thick: bool = True
    hounsfield: bool | None = None

    @property
    def padded(self) -> bool:
        """Whether some values may be padding, which is no grey value."""
        return any(frame.padding is not None for frame in self.frames)

    @property
    def grid(self) -> geometry.Grid:
        """The grid in canonical axes, those of :attr:`Volume.voxels`."""
        return self.stored.canonical()

    def axis(self, plane: geometry.Plane) -> int:
        """The canonical axis that slices of ``plane`` are cut across; pictures have one plane only."""
        return self.slices if plane == "acquired" or not self.stored.placed else geometry.ACROSS[plane]

    def count(self, plane: geometry.Plane) -> int:
        """How many slices of ``plane`` there are."""
        return self.grid.shape[self.axis(plane)]

    def size(self, plane: geometry.Plane) -> tuple[int, int]:
        """(rows, columns) of a slice of ``plane``."""
        return geometry.in_plane(self.grid, self.axis(plane))[0]

    def spacing(self, plane: geometry.Plane) -> tuple[float, float] | None:
        """(row, column) size of a pixel of a slice in millimetres, or None where the file does not say."""
        return geometry.in_plane(self.grid, self.axis(plane))[1] if self.stored.sized else None

    def step(self, plane: geometry.Plane) -> float | None:
        """Millimetres from slice to slice, or None where they are not places in a patient."""
        known = self.stored.sized and self.stored.placed and not self.moments
        return self.grid.spacing[self.axis(plane)] if known else None
