"""Windows of a large image: where they lie, and how much their pixels count."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedvfm.model import sliding_window


@pytest.mark.parametrize("window", [(56, 56), (33, 70), (1, 5), (512, 7), (9, 12, 20)])
def test_a_window_s_pixels_count_as_by_monai(window: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports warn of optional packages
        from monai.data.utils import compute_importance_map
    expected = compute_importance_map(window, mode="gaussian", sigma_scale=sliding_window.SIGMA, dtype=torch.float32)
    found = sliding_window._importance(window)
    assert torch.equal(found, torch.as_tensor(expected))
    assert found.shape == window
    assert float(found.min()) >= sliding_window.LEAST


def taken(
    shapes: Sequence[tuple[int, ...]],
    batch: int,
    run: Any = None,
    *,
    pick: Any = None,
    size: tuple[int, ...] = (28, 28),
) -> tuple[list[Any], list[int]]:
    """Logits of images whose pixels are told by their place, and how many windows were computed at a time."""
    model = SimpleNamespace(
        recipe=SimpleNamespace(data=SimpleNamespace(patch_size=size)), task=SimpleNamespace(width=2)
    )
    images = [np.full((3, *shape), number, dtype=np.float32) for number, shape in enumerate(shapes)]
    sizes = []

    def plain(parts: Any) -> torch.Tensor:
        sizes.append(len(parts))
        assert len({part.image.shape for part in parts}) == 1
        if run is not None:
            run(parts)
        stacked = torch.stack([torch.from_numpy(part.image[:2]) + sum(part.corner) for part in parts])
        return stacked.flatten(2).mean(dim=2) if pick == "classes" else stacked

    return list(sliding_window.many(model, images, plain, batch)), sizes  # type: ignore[arg-type]


SHAPES = [(28, 28), (28, 28), (44, 28), (28, 60), (28, 28), (70, 70), (20, 33)]


@pytest.mark.parametrize("pick", ["pixels", "classes"])
@pytest.mark.parametrize("batch", [2, 3, 8, 100])
def test_windows_in_batches_give_what_they_give_alone(batch: int, pick: str) -> None:
    alone, ones = taken(SHAPES, 1, pick=pick)
    together, sizes = taken(SHAPES, batch, pick=pick)
    assert set(ones) == {1}
    assert max(sizes) <= batch
    assert sum(sizes) == len(ones)
    assert [found.shape[1:] for found in together] == ([()] * len(SHAPES) if pick == "classes" else SHAPES)
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


def test_windows_of_volumes_lie_in_three_directions() -> None:
    """Every voxel is covered, and where all windows say the same, so does the whole."""
    shapes = [(8, 16, 16), (12, 25, 24), (30, 16, 50)]
    found, sizes = taken(shapes, 4, size=(8, 16, 16))
    assert [logits.shape for logits in found] == [(2, *shape) for shape in shapes]
    assert sum(sizes) > len(shapes)
    tiled = [sliding_window._corners(shape, (8, 16, 16)) for shape in shapes[2:]]
    covered = np.zeros(shapes[2])
    for corner in tiled[0]:
        covered[sliding_window.place(corner, (8, 16, 16))] = 1
    assert covered.all()

    class Same:
        recipe = SimpleNamespace(data=SimpleNamespace(patch_size=(8, 16, 16)))
        task = SimpleNamespace(width=1)

    grey = np.random.default_rng(0).random((3, 30, 16, 50), dtype=np.float32)
    (alike,) = sliding_window.many(Same(), [grey], _first, 3)  # type: ignore[arg-type]
    torch.testing.assert_close(alike[0], torch.from_numpy(grey[0]))


def _first(parts: Any) -> torch.Tensor:
    return torch.stack([torch.from_numpy(part.image[:1]) for part in parts])


def test_what_does_not_fit_into_a_gpu_is_computed_in_halves() -> None:
    def small(parts: Any) -> None:
        if len(parts) > 3:
            raise torch.OutOfMemoryError

    expected, _ = taken(SHAPES, 1)
    found, sizes = taken(SHAPES, 16, small)
    assert {size for size in sizes if size <= 3} <= {1, 2, 3}
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))

    def full(parts: Any) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        taken(SHAPES, 4, full)


def test_an_image_is_let_go_once_its_windows_are_there() -> None:
    """However many images follow: nothing is held for those that are done."""
    seen: list[int] = []
    model = SimpleNamespace(
        recipe=SimpleNamespace(data=SimpleNamespace(patch_size=(28, 28))), task=SimpleNamespace(width=2)
    )

    def run(parts: Any) -> torch.Tensor:
        seen.append(parts[-1].number)
        return torch.stack([torch.from_numpy(part.image[:2]) for part in parts])

    images = [np.zeros((3, 28, 28), dtype=np.float32)] * 5
    for number, _ in enumerate(sliding_window.many(model, images, run, 1)):  # type: ignore[arg-type]
        assert seen == list(range(number + 1))
