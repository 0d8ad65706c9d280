"""HD95, ASSD and NSD against MONAI's three functions, by both ways to search; edges and boxes by hand."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm.tasks import metrics, surfaces

WAYS = pytest.mark.parametrize("share", [0.0, surfaces.DENSE_SHARE, 1e9], ids=["transform", "by size", "tree"])


def by_monai(
    predicted: surfaces.Mask, truth: surfaces.Mask, spacing: tuple[float, ...] | None, tolerance: float
) -> tuple[float, float, float]:
    """(HD95, ASSD, NSD) of whole arrays: MONAI crops by itself."""
    import torch
    from monai import metrics as monai_metrics

    reference: Any = monai_metrics
    pair = [torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (predicted, truth)]
    options = {"include_background": True, "spacing": spacing}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        return (
            float(reference.compute_hausdorff_distance(*pair, percentile=95, **options)),
            float(reference.compute_average_surface_distance(*pair, symmetric=True, **options)),
            float(reference.compute_surface_dice(*pair, [tolerance], **options)),
        )


def sphere(shape: tuple[int, ...], centre: tuple[int, ...], radius: float) -> surfaces.Mask:
    grid = np.indices(shape)
    inside: surfaces.Mask = sum((axis - at) ** 2 for axis, at in zip(grid, centre, strict=True)) <= radius**2
    return inside


def corner(shape: tuple[int, ...], *starts: int) -> surfaces.Mask:
    mask = np.zeros(shape, dtype=np.bool_)
    mask[tuple(slice(start, start + 4) for start in starts)] = True
    return mask


def voxel(shape: tuple[int, ...], *at: int) -> surfaces.Mask:
    mask = np.zeros(shape, dtype=np.bool_)
    mask[at] = True
    return mask


FLAT, DEEP = (40, 52), (9, 20, 24)
PAIRS = {
    "discs": (sphere(FLAT, (20, 25), 15), sphere(FLAT, (22, 26), 13)),
    "inside": (sphere(FLAT, (20, 25), 2), sphere(FLAT, (20, 25), 19)),
    "apart, at opposite corners": (corner(FLAT, 0, 0), corner(FLAT, 36, 48)),
    "at the border against everything": (corner(FLAT, 0, 30), np.ones(FLAT, dtype=np.bool_)),
    "equal": (sphere(FLAT, (20, 25), 15), sphere(FLAT, (20, 25), 15)),
    "one pixel each": (voxel(FLAT, 3, 4), voxel(FLAT, 30, 9)),
    "one pixel against a disc": (voxel(FLAT, 0, 0), sphere(FLAT, (20, 25), 15)),
    "one row": (corner(FLAT, 39, 3), sphere((40, 52), (39, 8), 0.5)),
    "balls": (sphere(DEEP, (4, 9, 11), 4), sphere(DEEP, (5, 10, 13), 4)),
    "apart, at opposite corners of a volume": (corner(DEEP, 0, 0, 0), corner(DEEP, 6, 17, 21)),
    "in one slice of a volume each": (corner(DEEP, 8, 2, 2), voxel(DEEP, 0, 10, 10) | voxel(DEEP, 0, 11, 10)),
    "a whole volume": (np.ones(DEEP, dtype=np.bool_), sphere(DEEP, (4, 9, 11), 4)),
    "one voxel each": (voxel(DEEP, 0, 0, 0), voxel(DEEP, 8, 19, 23)),
}


@WAYS
@pytest.mark.parametrize("spacing", [None, (1.7, 0.6, 0.9), (0.3, 0.1, 0.1), (5.0, 1.0, 1.0)])
@pytest.mark.parametrize("name", PAIRS)
def test_equal_to_monai(
    name: str, spacing: tuple[float, ...] | None, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surfaces, "DENSE_SHARE", share)
    pair = PAIRS[name]
    spacing = spacing and spacing[: pair[0].ndim]
    for tolerance in (0.3, 2.0):
        expected = by_monai(*pair, spacing, tolerance)
        assert surfaces.scores(*pair, spacing, tolerance) == pytest.approx(expected, abs=1e-4)
        scores = metrics.SegmentationScores(("background", "organ"), nsd_tolerance=tolerance)
        scores.add("a", *(mask.astype(np.int64) for mask in pair), spacing)
        value = scores.value()
        assert (value["hd95"], value["assd"], value["nsd"]) == pytest.approx(expected, abs=1e-4)


@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_any_masks_are_scored_as_by_monai(data: st.DataObject) -> None:
    """Through the metric set, which crops each class to its box; several classes, any density, anisotropic spacing."""
    dimensions = data.draw(st.sampled_from([2, 3]))
    shape = tuple(data.draw(st.integers(2, 24 if dimensions == 2 else 10)) for _ in range(dimensions))
    steps = st.sampled_from([0.1, 0.3, 0.7, 1.0, 2.5, 5.0])
    spacing = data.draw(st.none() | st.tuples(*[steps] * dimensions))
    tolerance = data.draw(st.sampled_from([0.3, 0.6, 1.0, 2.0, 2.5]))
    density = data.draw(st.sampled_from([0.02, 0.1, 0.3, 0.6, 0.95]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    predicted, truth = (np.where(rng.random(shape) < density, rng.integers(1, 4, shape), 0) for _ in range(2))
    if data.draw(st.booleans()):
        predicted = np.where(rng.random(shape) < 0.1, predicted, truth)
    scores = metrics.SegmentationScores(("background", "a", "b", "c"), nsd_tolerance=tolerance)
    scores.add("sample", predicted, truth, spacing)
    diagonal = float(np.linalg.norm(np.multiply(shape, spacing or 1.0)))
    rows = []
    for k in (1, 2, 3):
        sizes = (predicted == k).sum(), (truth == k).sum()
        if all(sizes):
            rows.append(by_monai(predicted == k, truth == k, spacing, tolerance))
        else:
            rows.append((diagonal, diagonal, 0.0) if any(sizes) else (0.0, 0.0, 1.0))
    value = scores.value()
    assert (value["hd95"], value["assd"], value["nsd"]) == pytest.approx(np.mean(rows, axis=0), abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), density=st.sampled_from([0.01, 0.1, 0.5, 0.99]), deep=st.booleans())
def test_both_ways_to_search_find_the_same_distances(seed: int, density: float, deep: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = (6, 9, 11) if deep else (17, 23)
    pair = [rng.random(shape) < density for _ in range(2)]
    for mask in pair:
        mask[tuple(rng.integers(0, n) for n in shape)] = True
    sizes = np.array([2.5, 0.7, 0.9][: len(shape)])
    edges = [surfaces.edge(mask) for mask in pair]
    for start, target in (edges, edges[::-1]):
        by_tree, by_transform = surfaces._by_tree(start, target, sizes), surfaces._by_transform(start, target, sizes)
        np.testing.assert_allclose(by_tree, by_transform, rtol=1e-6, atol=1e-6)
        assert len(by_tree) == start.sum()


def test_an_edge_by_hand() -> None:
    """The inside of a 4 x 5 block is 2 x 3; at the array's border nothing is beyond, so the border is an edge."""
    mask = np.zeros((6, 8), dtype=np.bool_)
    mask[2:, 1:6] = True
    expected = mask.copy()
    expected[3:5, 2:5] = False
    np.testing.assert_array_equal(surfaces.edge(mask), expected)
    assert surfaces.edge(np.ones((3, 3, 3), dtype=np.bool_)).sum() == 26


def test_boxes_by_hand() -> None:
    predicted, truth = np.zeros((2, 5, 9), dtype=np.uint8)
    predicted[1:3, 4], truth[4, 0] = 2, 2
    predicted[0, 0] = 3
    (absent, nothing), (here, there), (only, missing) = surfaces.boxes(predicted, truth, 4)
    assert absent is None
    assert nothing is None
    assert missing is None
    assert only == (slice(0, 1), slice(0, 1))
    assert here is not None
    assert there is not None
    assert surfaces.around(here, there) == (slice(1, 5), slice(0, 5))
