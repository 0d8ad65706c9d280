"""Windows of a large image: where they lie, and how much their pixels count."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedvfm.model import sliding_window


@pytest.mark.parametrize("window", [(56, 56), (33, 70), (1, 5), (512, 7)])
def test_a_window_s_pixels_count_as_by_monai(window: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports warn of optional packages
        from monai.data.utils import compute_importance_map
    expected = compute_importance_map(window, mode="gaussian", sigma_scale=sliding_window.SIGMA, dtype=torch.float32)
    found = sliding_window._importance(window)
    assert torch.equal(found, torch.as_tensor(expected))
    assert found.shape == window
    assert float(found.min()) >= sliding_window.LEAST


def taken(
    shapes: list[tuple[int, int]], batch: int, run: Any = None, *, pick: Any = None
) -> tuple[list[Any], list[int]]:
    """Logits of images whose pixels are told by their place, and how many windows were computed at a time."""
    model = SimpleNamespace(
        recipe=SimpleNamespace(data=SimpleNamespace(input_size=(28, 28))), task=SimpleNamespace(width=2)
    )
    images = [np.full((3, *shape), number, dtype=np.float32) for number, shape in enumerate(shapes)]
    sizes = []

    def plain(parts: Any) -> torch.Tensor:
        sizes.append(len(parts))
        assert len({part.image.shape for part in parts}) == 1
        if run is not None:
            run(parts)
        stacked = torch.stack([torch.from_numpy(part.image[:2]) + sum(part.corner) for part in parts])
        return stacked.mean(dim=(2, 3)) if pick == "classes" else stacked

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
        recipe=SimpleNamespace(data=SimpleNamespace(input_size=(28, 28))), task=SimpleNamespace(width=2)
    )

    def run(parts: Any) -> torch.Tensor:
        seen.append(parts[-1].number)
        return torch.stack([torch.from_numpy(part.image[:2]) for part in parts])

    images = [np.zeros((3, 28, 28), dtype=np.float32)] * 5
    for number, _ in enumerate(sliding_window.many(model, images, run, 1)):  # type: ignore[arg-type]
        assert seen == list(range(number + 1))
