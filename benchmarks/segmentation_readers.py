"""Other programs read the DICOM-SEG that prediction writes: dcmqi (as 3D Slicer does) and pydicom-seg.

Run: ``PYTHONPATH=. python benchmarks/segmentation_readers.py --dcmqi PROGRAM --pydicom-seg PYTHON``. The first is
``segimage2itkimage`` of ``pip install dcmqi``; the second a Python with ``pydicom-seg`` and ``pydicom<3``, which it
needs. For a turned CT series, an enhanced MR, a reconstruction of nuclear medicine and a radiograph it writes an object
of random classes and counts the voxels that dcmqi puts at the same millimetres, and those of each class by pydicom-seg.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedvfm.data.volumes import volumes
from fedvfm.inference import segmentation_object
from tests.data import dicom_writer, test_places

NAMES = ["rest", "liver", "left kidney"]
COUNT = """
import sys, pydicom, pydicom_seg
reader = pydicom_seg.SegmentReader().read(pydicom.dcmread(sys.argv[1]))
print([int((reader.segment_data(number) > 0).sum()) for number in (1, 2)])
"""


def sources(folder: Path) -> Iterator[tuple[str, Path]]:
    """Images of four kinds."""
    values = np.random.default_rng(0).integers(0, 900, (22, 18, 6)).astype(np.int16)
    turn = np.array([[0.955, -0.296, 0.0], [0.296, 0.955, 0.0], [0.0, 0.0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn / np.linalg.norm(turn, axis=0) @ np.diag([0.8, 1.1, 3.0]), [-40, 25, 12]
    dicom_writer.series(folder / "ct", values, affine)
    yield "CT series", folder / "ct"
    dicom_writer.enhanced(folder / "mr.dcm", values, affine, order=[2, 0, 5, 3, 1, 4])
    yield "enhanced MR", folder / "mr.dcm"
    test_places.nuclear(folder / "nm.dcm", 6)
    yield "nuclear medicine, reconstructed", folder / "nm.dcm"
    dicom_writer.radiograph(folder / "dx.dcm", np.zeros((12, 9), np.uint16))
    yield "radiograph", folder / "dx.dcm"


def points(path: Path, number: int) -> set[tuple[float, ...]]:
    """Where voxels of a number lie, in millimetres."""
    image = nibabel.load(path)
    index = np.argwhere(np.asanyarray(image.dataobj) == number)
    return {tuple(point) for point in np.round(index @ image.affine[:3, :3].T + image.affine[:3, 3], 2) + 0.0}


def by_dcmqi(program: Path, segmentation: Path, own: Path, folder: Path) -> str:
    """What dcmqi makes of an object beside our own NIfTI of it."""
    folder.mkdir()
    asked = [program, "--inputDICOM", segmentation, "--outputDirectory", folder, "-t", "nii", "-p", "x"]
    if subprocess.run(list(map(str, asked)), capture_output=True).returncode:
        return "refused"
    same, every = 0, 0
    for number in (1, 2):
        theirs = folder / f"x-{number}.nii.gz"
        same += len(points(theirs, number) & points(own, number))
        every += len(points(theirs, number) | points(own, number))
    groups = json.loads((folder / "x-meta.json").read_text())["segmentAttributes"]
    kinds = ", ".join(part["SegmentedPropertyTypeCodeSequence"]["CodeMeaning"] for group in groups for part in group)
    return f"{same} of {every} voxels at the same place; {kinds}"


def by_pydicom_seg(python: Path, segmentation: Path, labels: NDArray[Any]) -> str:
    """The voxels of each class by pydicom-seg."""
    asked = [str(python), "-W", "ignore", "-c", COUNT, str(segmentation)]
    answer = subprocess.run(asked, capture_output=True, text=True)
    if answer.returncode:
        return f"refused ({answer.stderr.strip().splitlines()[-1]})"
    expected = [int((labels == number).sum()) for number in (1, 2)]
    return "the same voxels" if json.loads(answer.stdout) == expected else f"differs: {answer.stdout.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dcmqi", type=Path, required=True)
    parser.add_argument("--pydicom-seg", type=Path, required=True)
    asked = parser.parse_args()
    print("| images | dcmqi | pydicom-seg |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, source in sources(folder):
            header = volumes.read_header(source)
            labels = np.random.default_rng(1).integers(0, 3, header.stored.shape).astype(np.uint8)
            written = folder / f"{source.stem}-seg.dcm"
            segmentation_object.write(written, labels, header, NAMES, "f" * 64)
            own = folder / f"{source.stem}-own.nii.gz"
            volumes.write_nifti(own, labels, header)
            theirs = by_dcmqi(asked.dcmqi, written, own, folder / f"{source.stem}-dcmqi")
            print(f"| {kind} | {theirs} | {by_pydicom_seg(asked.pydicom_seg, written, labels)} |")


if __name__ == "__main__":
    main()
