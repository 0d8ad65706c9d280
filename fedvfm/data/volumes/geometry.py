"""Where voxels lie: grids in patient coordinates, the turn to anatomical axes, and how a slice is shown.

**World coordinates are RAS+ in millimetres everywhere in this project**, as in NIfTI: x grows to the patient's right, y
to the front, z to the head. DICOM and most NRRD files say LPS+; :func:`from_lps` is the one place that changes signs.

Voxel arrays are indexed (x, y, z). A *stored* grid has the axes of the file; the *canonical* grid has them turned by
whole quarter turns and mirrors, without resampling, so that they run as nearly as can be to right, front and head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedvfm.data import defect

Plane = Literal["axial", "coronal", "sagittal", "acquired"]

PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal", "acquired")
ACROSS: dict[Plane, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Plane -> the canonical axis it is cut across."""
SAME_PLACE_MM = 0.05
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

Affine = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Turn:
    """Quarter turns and mirrors from stored to canonical axes; exact and reversible.

    Attributes:
        axes: stored axis i becomes canonical axis ``axes[i]``.
        flips: whether stored axis i is read backwards.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """A stored array, (a, b, c) or (a, b, c, colours), as a view in canonical axes."""
        order = [self.axes.index(axis) for axis in range(3)]
        return self._flipped(array).transpose(*order, *range(3, array.ndim))

    def undo(self, array: NDArray[Any]) -> NDArray[Any]:
        """A canonical array as a view in stored axes: ``undo(apply(a))`` is ``a``."""
        return self._flipped(array.transpose(*self.axes, *range(3, array.ndim)))

    def _flipped(self, stored: NDArray[Any]) -> NDArray[Any]:
        return stored[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]


@functools.lru_cache(maxsize=1024)
def _turn(content: bytes) -> Turn:
    """:meth:`Grid.turn` of the bytes of an affine: it is asked several times for each slice."""
    from nibabel import orientations  # only users of volumes pay for it

    affine = np.frombuffer(content).reshape(4, 4)
    known = bool(np.isfinite(affine).all())  # of others there are no singular values
    found: NDArray[Any] = orientations.io_orientation(affine if known else np.zeros((4, 4)))
    if not np.isfinite(found).all():
        raise defect.NO_GEOMETRY.error(
            f"its header does not say how the axes lie (affine {affine.tolist()}); save it again with an affine"
        )
    a, b, c = ((int(axis), bool(sign < 0)) for axis, sign in found)
    return Turn((a[0], b[0], c[0]), (a[1], b[1], c[1]))


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Shape and place of voxels.

    Attributes:
        shape: voxels along the three axes.
        affine: voxel index to RAS millimetres, (4, 4).
        placed: whether the file says where the voxels lie in the patient; else the affine shows rows and columns as
            stored and means no place (radiographs, ultrasound, photographs).
        sized: whether the file says how large a pixel is; else sizes are 1.
    """

    shape: tuple[int, int, int]
    affine: Affine
    placed: bool = True
    sized: bool = True

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres from voxel to voxel along each axis."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return float(x), float(y), float(z)

    @property
    def codes(self) -> str:
        """To where the axes run, as nearly as letters can say: "RAS", "LPS", ..."""
        turn = self.turn()
        return "".join(("LPI" if flip else "RAS")[axis] for axis, flip in zip(turn.axes, turn.flips, strict=True))

    def world(self, index: NDArray[Any]) -> NDArray[np.float64]:
        """RAS millimetres of voxel indices, (..., 3) in and out."""
        return np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def turn(self) -> Turn:
        """The turn from these axes to canonical ones.

        Raises:
            DataError: if the affine does not say how the axes lie.
        """
        return _turn(np.asarray(self.affine, dtype=np.float64).tobytes())

    def canonical(self) -> Grid:
        """The same voxels with axes turned as nearly as can be to right, front and head."""
        turn = self.turn()
        shape, back = [0, 0, 0], np.zeros((4, 4))
        back[3, 3] = 1.0
        for stored, (axis, flip) in enumerate(zip(turn.axes, turn.flips, strict=True)):
            shape[axis] = self.shape[stored]
            back[stored, axis] = -1.0 if flip else 1.0
            back[stored, 3] = self.shape[stored] - 1 if flip else 0.0
        return Grid((shape[0], shape[1], shape[2]), self.affine @ back, self.placed, self.sized)

    def fits(self, other: Grid) -> bool:
        """Whether both have one shape and their corners lie within a tenth of a voxel (0.05 mm at least)."""
        if self.shape != other.shape:
            return False
        corners = np.array(np.meshgrid(*[(0, side - 1) for side in self.shape])).reshape(3, -1).T
        allowed = max(SAME_PLACE_MM, 0.1 * min(self.spacing))
        return bool(np.abs(self.world(corners) - other.world(corners)).max() <= allowed)

    def holds(self, other: Grid) -> tuple[int, int, int] | None:
        """Where the first voxel of a smaller grid lies in this one, both canonical; None where it does not fit in.

        It must have the same axes and spacing and lie by whole voxels, to a tenth of one, inside this grid.
        """
        first = np.linalg.inv(self.affine) @ other.affine
        start = np.rint(first[:3, 3]).astype(int)
        if np.abs(first[:3, :3] - np.eye(3)).max() * max(other.shape) > 0.1 or np.abs(first[:3, 3] - start).max() > 0.1:
            return None
        if (start < 0).any() or (start + other.shape > np.asarray(self.shape)).any():
            return None
        return int(start[0]), int(start[1]), int(start[2])


def from_lps(affine: Affine) -> Affine:
    """An affine to LPS millimetres as one to RAS millimetres, and the reverse."""
    return _LPS @ affine


def shown(voxels: NDArray[Any], axis: int, index: int) -> NDArray[Any]:
    """One slice of a canonical array as a radiologist sees it: a view.

    Across z (axial) rows run from front to back and columns from the patient's right to left; across y (coronal) rows
    from head to feet and columns from right to left; across x (sagittal) rows from head to feet and columns from front
    to back.

    Shapes: (x, y, z) or (x, y, z, colours) in, (H, W) or (H, W, colours) out.
    """
    plane: NDArray[Any] = np.moveaxis(voxels, axis, 0)[index]
    return plane[::-1, ::-1].swapaxes(0, 1)


def hidden(picture: NDArray[Any]) -> NDArray[Any]:
    """The reverse of :func:`shown` for one slice: (H, W) to the two canonical axes in their order."""
    return picture.swapaxes(0, 1)[::-1, ::-1]


def box_back(edges: NDArray[np.float64], grid: Grid, axis: int, index: int) -> NDArray[np.float64]:
    """Boxes on a slice as shown, in the axes of the file.

    Args:
        edges: (left, top, right, bottom) of each.
        grid: as stored.
        axis: the canonical axis that the slice is cut across.
        index: of the slice.

    Shapes: (N, 4) -> (N, 6): where it begins along each stored axis, then where it ends.
    Units: pixels in, voxels out, both by edges: 0 is the near side of the first, and a slice is one voxel thick.
    """
    turn, shape = grid.turn(), grid.canonical().shape
    across, down = (kept for kept in range(3) if kept != axis)
    low, high = np.empty((len(edges), 3)), np.empty((len(edges), 3))
    left, top, right, bottom = edges.T
    low[:, axis], high[:, axis] = index, index + 1
    low[:, across], high[:, across] = shape[across] - right, shape[across] - left  # see shown
    low[:, down], high[:, down] = shape[down] - bottom, shape[down] - top
    low, high = low[:, turn.axes], high[:, turn.axes]
    size, flips = np.asarray(grid.shape), np.asarray(turn.flips)
    return np.concatenate([np.where(flips, size - high, low), np.where(flips, size - low, high)], axis=1)


def in_plane(grid: Grid, axis: int) -> tuple[tuple[int, int], tuple[float, float]]:
    """(rows, columns) and their sizes in millimetres of the slices of a canonical grid across ``axis``."""
    across, down = (kept for kept in range(3) if kept != axis)
    return (grid.shape[down], grid.shape[across]), (grid.spacing[down], grid.spacing[across])
