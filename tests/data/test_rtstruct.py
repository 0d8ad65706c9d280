"""RT structure sets: contours land on the pixels they hold, and what cannot be drawn rightly is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import labels, structures
from fedvfm.data.sources import folder
from fedvfm.data.volumes import contours, dicom_rtstruct, dicom_seg, geometry, volumes
from tests.data import dicom_writer as writer
from tests.data import test_dicom_seg as seg

SHAPE = (24, 20, 6)  # columns, rows, slices
PLAIN = np.diag([0.8, 1.2, 3.0, 1.0])
PLAIN[:3, 3] = (-11.0, 7.0, -20.0)


def placed(points: Any, at: float, affine: np.ndarray = PLAIN) -> np.ndarray:
    """(column, row) of points on a slice, in LPS millimetres."""
    flat = np.asarray(points, float)
    index = np.column_stack([flat, np.full(len(flat), at), np.ones(len(flat))])
    return (index @ affine.T)[:, :3]


def box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


LIVER, KIDNEY = box(2.5, 3.5, 9.5, 12.5), box(14.5, 5.5, 19.5, 9.5)  # 7 x 9 and 5 x 4 pixels


def over(ring: Any, slices: Any = range(1, 4)) -> list[tuple[int, np.ndarray]]:
    """One contour on several slices."""
    return [(at, placed(ring, at)) for at in slices]


def study(root: Path, name: str, regions: Any, **options: Any) -> list[Any]:
    images = writer.series(root / "studies" / name, np.zeros(SHAPE, np.int16), PLAIN)
    writer.structure_set(root / "studies" / name / "rs.dcm", images, regions, **options)
    return images


def make(path: Path, **options: object) -> folder.Folder:
    return folder.Folder(
        schema.SourceConfig.model_validate({"source": "folder", "path": str(path), "options": options})
    )


def recipe(*names: str) -> schema.Recipe:
    values = {"backbone": {"name": "dino"}, "task": {"kind": "segmentation"}, "data": {"class_names": list(names)}}
    return schema.Recipe.model_validate(values)


def voxels(source: Any) -> dict[str, list[int]]:
    counted: dict[str, np.ndarray] = {}
    for sample in source.samples():
        counts = np.bincount(source.read(sample).mask.ravel(), minlength=len(source.info.class_names))
        counted[sample.unit] = counted.get(sample.unit, 0) + counts
    return {name: list(map(int, counts[1:])) for name, counts in counted.items()}


def drawn(root: Path, name: str = "a") -> np.ndarray:
    """What the set of a study holds in stored axes, (columns, rows, slices)."""
    header = volumes.read_header(root / "studies" / name)
    return header.stored.turn().undo(dicom_seg.read(root / "studies" / name, header))


def refused(root: Path, **options: object) -> errors.DataError:
    with pytest.raises(errors.DataError) as caught:
        voxels(make(root, **options))
    assert writer.PLANTED not in str(caught.value)
    return caught.value


# --- which pixels a contour holds -------------------------------------------------------------------------------------


def brute(ring: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Crossings to the left of every pixel, and distances to every edge, one by one."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    inside, distance = np.zeros(shape, bool), np.full(shape, np.inf)
    for start, end in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        along = end - start
        share = np.clip(((x - start[0]) * along[0] + (y - start[1]) * along[1]) / max(along @ along, 1e-30), 0, 1)
        distance = np.minimum(distance, np.hypot(x - start[0] - share * along[0], y - start[1] - share * along[1]))
        if start[1] != end[1]:
            crossing = start[0] + (y - start[1]) * along[0] / along[1]
            inside ^= ((start[1] <= y) != (end[1] <= y)) & (crossing <= x)
    return inside, distance


@pytest.mark.files(
    "contours",
    "which pixels a contour holds",
    "C.8.8.6.3",
    "those whose centre lies inside or, to 0.01 pixel, on the line",
)
@pytest.mark.parametrize("seed", range(12))
def test_a_contour_holds_the_pixels_whose_centres_lie_inside(seed: int) -> None:
    """Against a count of crossings pixel by pixel, and against Pillow's polygon, which may differ at the edge alone."""
    draws, shape = np.random.default_rng(seed), (44, 60)
    angles, radii = np.sort(draws.uniform(0, 2 * np.pi, 3 + 3 * seed)), draws.uniform(3, 30, 3 + 3 * seed)
    ring = np.stack([30 + radii * np.cos(angles), 22 + radii * np.sin(angles)], axis=1)  # some leave the image
    ring = np.round(ring) if seed % 3 == 0 else ring
    inside, line = contours.combined([ring], shape)
    expected, distance = brute(ring, shape)
    clear = distance > 2 * contours.LINE
    np.testing.assert_array_equal((inside | line)[clear], expected[clear])
    assert (inside | line)[distance <= contours.LINE].all()
    picture = Image.new("1", (shape[1], shape[0]))
    ImageDraw.Draw(picture).polygon([tuple(point) for point in ring], fill=1)
    away = distance > 1.5
    np.testing.assert_array_equal((inside | line)[away], np.asarray(picture)[away])


@pytest.mark.files("contours", "borders traced from pixel centre to pixel centre", "C.8.8.6.3", "the traced mask")
def test_traced_borders_come_back_as_they_were() -> None:
    """As OpenCV traces a mask: from centre to centre of its border pixels, those around a hole too."""
    outer, hole = np.array(box(3, 2, 14, 12), float), np.array(box(6, 5, 10, 9), float)
    inside, line = contours.combined([outer, hole], (20, 24))
    expected = np.zeros((20, 24), bool)
    expected[2:13, 3:15] = True
    expected[6:9, 7:10] = False
    np.testing.assert_array_equal(inside | line, expected)


@pytest.mark.files(
    "contours",
    "holes, islands, keyholes, CLOSEDPLANAR_XOR",
    "C.8.8.6.1, C.8.8.6.3",
    "a contour inside of another is a hole",
)
def test_holes_islands_and_keyholes() -> None:
    rings = [
        np.array(ring, float)
        for ring in (box(1.5, 1.5, 18.5, 18.5), box(4.5, 4.5, 15.5, 15.5), box(8.5, 8.5, 11.5, 11.5))
    ]
    ringed = contours.combined(rings, (20, 24))[0]
    assert np.count_nonzero(ringed) == 17 * 17 - 11 * 11 + 3 * 3
    np.testing.assert_array_equal(contours.combined(rings[::-1], (20, 24), exclusive=True)[0], ringed)
    keyhole = np.array(
        [*box(1.5, 1.5, 18.5, 18.5), (1.5, 1.5), (4.5, 4.5), (4.5, 15.5), (15.5, 15.5), (15.5, 4.5), (4.5, 4.5)]
    )
    inside, line = contours.combined([keyhole], (20, 24))
    # The channel has no width: what lies on it belongs to the structure.
    assert np.count_nonzero(inside | line) == 17 * 17 - 11 * 11


@pytest.mark.files(
    "contours",
    "contours of one region that cross, or stand twice",
    "C.8.8.6.1",
    "taken together; XOR only where the file says so",
)
def test_contours_that_cross_or_stand_twice_are_taken_together() -> None:
    first, second = np.array(box(1.5, 1.5, 8.5, 8.5)), np.array(box(6.5, 4.5, 12.5, 10.5))
    assert np.count_nonzero(contours.combined([first, second], (20, 24))[0]) == 49 + 36 - 2 * 4
    assert np.count_nonzero(contours.combined([first, first], (20, 24))[0]) == 49
    assert np.count_nonzero(contours.combined([first, second], (20, 24), exclusive=True)[0]) == 49 + 36 - 4 * 4


# --- where they lie ---------------------------------------------------------------------------------------------------


@pytest.mark.files(
    "contours",
    "oblique and sagittal series, any side first",
    "C.7.6.2",
    "in patient space, by the images named and by place",
)
@pytest.mark.parametrize("code", seg.RIGHT_HANDED[::5])
@pytest.mark.parametrize("referenced", [True, False])
def test_contours_lie_at_their_physical_points(tmp_path: Path, code: tuple[str, ...], referenced: bool) -> None:
    affine = seg.lps(code)
    images = writer.series(tmp_path / "study", np.zeros(seg.SHAPE, np.int16), affine, backwards=True)
    rings = [(at, placed(box(0.5, 1.5, 2.5, 5.5), at, affine)) for at in (1, 2)]
    writer.structure_set(tmp_path / "rs.dcm", images, [("GTV", rings)], referenced=referenced)
    header = volumes.read_header(tmp_path / "study")
    assert dicom_seg.check(tmp_path / "rs.dcm", header) == ()
    expected = np.zeros(seg.SHAPE, np.uint8)
    expected[1:3, 2:6, 1:3] = 1
    grid = geometry.Grid(seg.SHAPE, geometry.from_lps(affine))
    assert seg.places(dicom_seg.read(tmp_path / "rs.dcm", header), header.grid, 1) == seg.places(expected, grid, 1)


@pytest.mark.files("contours", "names in other capitals, numbers that change", "C.8.8.5", "by name")
def test_structure_sets_go_by_name(tmp_path: Path) -> None:
    study(tmp_path, "a", [("Liver", over(LIVER)), ("Kidney_L", over(KIDNEY))])
    study(
        tmp_path,
        "b",
        [("kidney l", over(KIDNEY)), ("BODY", over(box(0.5, 0.5, 22.5, 18.5), range(6))), ("LIVER", over(LIVER))],
    )
    expected = {"image-0001": [63 * 3, 20 * 3], "image-0002": [63 * 3, 20 * 3]}
    assert voxels(make(tmp_path, class_names=["background", "liver", "kidney L"])) == expected
    wanted = recipe("background", "liver", "kidney L")
    source = make(tmp_path).under(wanted.data)
    assert not labels.faults(wanted, source.info)
    assert voxels(source) == expected
    assert structures.REGIONS_LEFT in source.notes_of(source.samples()[-1])
    assert source.left == ("b: region 'body' of a structure set: no class",)


@pytest.mark.files(
    "contours",
    "a region that is no class",
    "C.8.8.5",
    "left out and noted where every class has its region beside it; else it has to be mapped",
)
def test_a_region_that_may_be_a_missing_class_has_to_be_mapped(tmp_path: Path) -> None:
    study(tmp_path, "a", [("liver", over(LIVER)), ("BODY", over(box(0.5, 0.5, 22.5, 18.5), range(6)))])
    study(tmp_path, "b", [("Hepar", over(LIVER)), ("BODY", over(box(0.5, 0.5, 22.5, 18.5), range(6)))])
    wanted = recipe("background", "liver")
    assert refused(tmp_path, class_names=["background", "liver"]).code == "class-unknown"
    source = make(tmp_path).under(wanted.data)
    assert labels.faults(wanted, source.info)
    with pytest.raises(errors.ConfigError):
        labels.mapped(source, {"Hepar": "liver"}, wanted.data.class_names)
    mapped = labels.mapped(source, {"Hepar": "liver", "body": "background"}, wanted.data.class_names)
    assert not labels.faults(wanted, mapped.info)
    # The outline of the body holds the liver; as background it gives way, in whichever order they stand.
    assert voxels(mapped) == {"image-0001": [63 * 3], "image-0002": [63 * 3]}


def test_a_region_that_is_mapped_is_never_left_out(tmp_path: Path) -> None:
    study(
        tmp_path,
        "a",
        [("liver", over(LIVER)), ("lesion", over(KIDNEY)), ("BODY", over(box(0.5, 0.5, 22.5, 18.5), range(6)))],
    )
    wanted = recipe("background", "liver")
    source = make(tmp_path).under(wanted.data)
    assert voxels(source) == {"image-0001": [63 * 3]}
    assert voxels(labels.mapped(source, {"Lesion": "liver"}, wanted.data.class_names)) == {
        "image-0001": [(63 + 20) * 3]
    }


@pytest.mark.files("contours", "classes that overlap", "", "refused, or the last counts by choice")
def test_classes_that_overlap_are_refused_or_the_last_counts(tmp_path: Path) -> None:
    study(tmp_path, "a", [("GTV", over(box(4.5, 5.5, 6.5, 7.5))), ("liver", over(LIVER))])
    names = ["background", "liver", "gtv"]
    assert refused(tmp_path, class_names=names).code == "mask-overlap"
    assert voxels(make(tmp_path, class_names=names, overlap="last")) == {"image-0001": [(63 - 4) * 3, 4 * 3]}
    with pytest.raises(errors.ConfigError):
        make(tmp_path, class_names=names, overlap="first")


@pytest.mark.files("contours", "structures that share a line", "C.8.8.6.3", "no overlap")
def test_structures_that_share_a_line_do_not_overlap(tmp_path: Path) -> None:
    study(tmp_path, "a", [("liver", over(box(2, 3, 9, 12))), ("spleen", over(box(9, 3, 15, 12)))])
    counted = voxels(make(tmp_path, class_names=["background", "liver", "spleen"]))
    # A corner on the lines of both is the first one's.
    assert counted == {"image-0001": [71 * 3, 69 * 3]}


@pytest.mark.files("contours", "on every second slice only, between slices, beyond the images", "C.8.8.6", "refused")
@pytest.mark.parametrize(
    ("slices", "referenced", "code"),
    [
        ((0, 2, 4), True, "mask-geometry"),  # every second slice
        ((1.5,), False, "mask-geometry"),  # as near to one slice as to the next
        ((6.0,), False, "mask-geometry"),  # beyond the images
    ],
)
def test_contours_that_fit_no_slice_are_refused(tmp_path: Path, slices: Any, referenced: bool, code: str) -> None:
    rings = [(int(at) if referenced else None, placed(LIVER, at)) for at in slices]
    study(tmp_path, "a", [("liver", rings)], referenced=referenced)
    assert refused(tmp_path, class_names=["background", "liver"]).code == code


@pytest.mark.files(
    "contours", "a little beside a slice, or slices missing inside", "C.8.8.6", "the nearest slice and contour; noted"
)
def test_contours_between_slices_and_gaps_are_noted(tmp_path: Path) -> None:
    """Two planes that fall on one slice are no hole in each other: the nearer one counts."""
    near, far = box(2.5, 3.5, 9.5, 12.5), box(3.5, 4.5, 8.5, 11.5)
    study(
        tmp_path,
        "a",
        [
            (
                "liver",
                [(None, placed(near, 1.1)), (None, placed(far, 1.3)), (None, placed(near, 2)), (None, placed(near, 5))],
            )
        ],
    )
    source = make(tmp_path, class_names=["background", "liver"])
    assert voxels(source) == {"image-0001": [63 * 3]}
    assert source.notes_of(source.samples()[0]) == (dicom_rtstruct.BETWEEN, dicom_rtstruct.GAPS)


@pytest.mark.parametrize("depths", [(1.024, 1.026), (0.976, 0.974), (0.99, 1.01), (1.0, 1.049)])
def test_two_contours_of_one_plane_are_both_drawn(tmp_path: Path, depths: tuple[float, float]) -> None:
    """Their millimetres were rounded, so that they lie a little apart, wherever that is beside the slice."""
    rings = [(1, placed(ring, at)) for ring, at in zip((LIVER, KIDNEY), depths, strict=True)]
    study(tmp_path, "a", [("liver", rings)])
    source = make(tmp_path, class_names=["background", "liver"])
    assert voxels(source) == {"image-0001": [63 + 20]}
    assert source.notes_of(source.samples()[0]) == ()


@pytest.mark.files("contours", "contours across the slices", "C.8.8.6.1", "refused")
def test_contours_across_the_slices_are_refused(tmp_path: Path) -> None:
    points = placed(LIVER, 1) + np.array([[0, 0, 0], [0, 0, 0], [0, 0, 2.0], [0, 0, 2.0]])
    study(tmp_path, "a", [("liver", [(1, points)])])
    assert refused(tmp_path, class_names=["background", "liver"]).code == "mask-geometry"


@pytest.mark.files("contours", "made on other images, or in another frame of reference", "C.8.8.5", "refused")
def test_a_set_of_other_images_is_refused(tmp_path: Path) -> None:
    images = writer.series(tmp_path / "other", np.zeros(SHAPE, np.int16), PLAIN)
    writer.series(tmp_path / "studies" / "a", np.zeros(SHAPE, np.int16), PLAIN)
    writer.structure_set(tmp_path / "studies" / "a" / "rs.dcm", images, [("liver", over(LIVER))])
    assert refused(tmp_path, class_names=["background", "liver"]).code == "mask-geometry"
    for image in images:
        image.FrameOfReferenceUID = "1.2.3.4"
    writer.structure_set(tmp_path / "studies" / "a" / "rs.dcm", images, [("liver", over(LIVER))], referenced=False)
    assert refused(tmp_path, class_names=["background", "liver"]).code == "mask-geometry"


@pytest.mark.files(
    "contours", "one region of a set in another frame of reference", "C.8.8.5", "refused where it is a class"
)
def test_a_region_of_other_images_is_not_drawn_on_these(tmp_path: Path) -> None:
    """A set of two series that were registered elsewhere: millimetres of one are no places in the other."""
    others = writer.series(tmp_path / "other", np.zeros(SHAPE, np.int16), PLAIN)
    images = writer.series(tmp_path / "studies" / "a", np.zeros(SHAPE, np.int16), PLAIN)
    path = tmp_path / "studies" / "a" / "rs.dcm"
    whole = writer.structure_set(path, images, [("liver", over(LIVER)), ("gtv", over(KIDNEY))])
    whole.StructureSetROISequence[1].ReferencedFrameOfReferenceUID = "1.2.3.4"
    whole.save_as(path, enforce_file_format=True)
    assert voxels(make(tmp_path, class_names=["background", "liver", "gtv"])) == {"image-0001": [63 * 3, 20 * 3]}
    for contour in whole.ROIContourSequence[1].ContourSequence:
        contour.ContourImageSequence = [writer.reference(others[1])]
    whole.save_as(path, enforce_file_format=True)
    assert "another frame of reference" in str(refused(tmp_path, class_names=["background", "liver", "gtv"]))
    assert voxels(make(tmp_path, class_names=["background", "liver"])) == {"image-0001": [63 * 3]}


@pytest.mark.files(
    "contours",
    "regions without a closed contour, rejected sets",
    "C.8.8.6, C.8.8.16",
    "count as not drawn, noted; left out",
)
def test_what_has_no_area_or_was_rejected_is_no_mask(tmp_path: Path) -> None:
    study(tmp_path, "a", [("liver", over(LIVER)), ("not drawn", []), ("couch", [])])
    source = make(tmp_path, class_names=["background", "liver"])
    assert source.notes_of(source.samples()[0]) == (dicom_rtstruct.UNDRAWN,)
    study(tmp_path, "b", [("liver", over(LIVER))], ApprovalStatus="REJECTED")
    error = refused(tmp_path, class_names=["background", "liver"])
    assert error.code == "mask-missing"


def test_a_structure_beside_the_images_is_refused(tmp_path: Path) -> None:
    study(tmp_path, "a", [("liver", over(box(40, 40, 50, 50)))])
    assert refused(tmp_path, class_names=["background", "liver"]).code == "mask-geometry"


@pytest.mark.parametrize("data", [b"1\\2", b"1\\2\\x", b"1\\2\\nan", b"1\\2\\3e999", b""])
def test_damaged_contours_are_refused(tmp_path: Path, data: bytes) -> None:
    images = writer.series(tmp_path / "studies" / "a", np.zeros(SHAPE, np.int16), PLAIN)
    path = tmp_path / "studies" / "a" / "rs.dcm"
    whole = writer.structure_set(path, images, [("liver", over(LIVER))])
    element = whole.ROIContourSequence[0].ContourSequence[1]["ContourData"]
    element.VR, element._value = "UN", data
    whole.save_as(path, enforce_file_format=True)
    assert refused(tmp_path, class_names=["background", "liver"]).code == "unreadable"


@pytest.mark.files("contours", "DICOM-SEG and RTSTRUCT in one study", "", "DICOM-SEG counts, noted")
def test_a_segmentation_counts_and_not_the_structure_set_it_was_made_from(tmp_path: Path) -> None:
    images = study(tmp_path, "a", [("liver", over(KIDNEY))])
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:4, 3:5, 1] = 1
    writer.segmentation(tmp_path / "studies" / "a" / "seg.dcm", images, mask, described=[(seg_code(), "liver")])
    source = make(tmp_path, class_names=["background", "liver"])
    assert voxels(source) == {"image-0001": [4]}
    assert source.notes_of(source.samples()[0]) == ("1 structure set(s) left out beside DICOM-SEG",)


def seg_code() -> Any:
    from pydicom.sr.codedict import codes

    return codes.SCT.Liver


def test_a_damaged_set_is_skipped_by_choice_and_counted(tmp_path: Path) -> None:
    study(tmp_path, "a", [("liver", over(LIVER))])
    images = study(tmp_path, "b", [("liver", over(LIVER))])
    whole = writer.structure_set(tmp_path / "studies" / "b" / "rs.dcm", images, [("liver", over(LIVER))])
    whole.ROIContourSequence[0].ContourSequence[1]["ContourData"]._value = ["1", "2", "nan"]
    whole.save_as(tmp_path / "studies" / "b" / "rs.dcm", enforce_file_format=True)
    options = {"class_names": ["background", "liver"]}
    values = {"source": "folder", "path": str(tmp_path), "unreadable": "skip", "options": options}
    source = folder.Folder(schema.SourceConfig.model_validate(values))
    assert voxels(source) == {"image-0001": [63 * 3]}
    assert len(source.left) == 1
    assert "1 case(s) skipped" in source.info.note


@pytest.mark.files("contours", "two structure sets with other outlines of one region (revisions)", "", "refused")
@pytest.mark.files("contours", "a Contour Offset Vector", "C.8.8.6 (retired)", "refused by that name")
def test_revisions_and_shifted_contours_are_refused(tmp_path: Path) -> None:
    images = study(tmp_path, "a", [("Liver", over(LIVER))])
    moved = over([(x + 1, y) for x, y in LIVER])
    writer.structure_set(tmp_path / "studies" / "a" / "later.dcm", images, [("Liver", moved)])
    source = make(tmp_path, class_names=["rest", "liver"])
    with pytest.raises(errors.DataError, match="two versions"):
        source.read(source.samples()[1])
    whole = writer.structure_set(tmp_path / "studies" / "a" / "later.dcm", images, [("Liver", moved)])
    whole.ROIContourSequence[0].ContourSequence[0].ContourOffsetVector = [0.0, 0.0, 3.0]
    whole.save_as(tmp_path / "studies" / "a" / "rs.dcm", enforce_file_format=True)
    (tmp_path / "studies" / "a" / "later.dcm").unlink()
    source = make(tmp_path, class_names=["rest", "liver"])
    with pytest.raises(errors.DataError, match="Contour Offset Vector"):
        source.read(source.samples()[1])
