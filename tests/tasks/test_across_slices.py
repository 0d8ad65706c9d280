"""Logits of slices mixed with those of their neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.tasks import across_slices, segmentation

VALUES: dict[str, Any] = {
    "backbone": {"name": "unet"},
    "adapter": {"kind": "full"},
    "task": {"kind": "segmentation"},
    "data": {"class_names": ["rest", "one"], "input_size": [32, 32]},
}


def part(index: int, volume: str = "a") -> samples.Part:
    return samples.Part(volume, index, 9, 1.0)


def drawn(count: int) -> torch.Tensor:
    return torch.randn(count, 2, 3, 4, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3])
def test_slices_are_mixed_as_scipy_convolves_them(count: int, share: float) -> None:
    logits = drawn(count)
    rows = [(number, part(number), values) for number, values in enumerate(logits)]
    found = list(across_slices.mixed(rows, share))
    assert [thing for thing, _ in found] == list(range(count))
    expected = ndimage.convolve1d(
        logits.double().numpy(), np.array([share, 1 - 2 * share, share]), axis=0, mode="nearest"
    )
    np.testing.assert_allclose(torch.stack([values for _, values in found]).numpy(), expected, atol=1e-6)


def test_only_neighbours_of_one_volume_are_mixed() -> None:
    """Another volume, a gap and a picture end a row of slices."""
    parts = [part(0), part(1), part(3), None, None, part(4, "b"), part(5, "c"), part(6, "c"), part(5, "c")]
    logits = drawn(len(parts))
    alone = [2, 3, 4, 5, 8]
    found = [values for _, values in across_slices.mixed(zip(range(len(parts)), parts, logits, strict=True), 0.25)]
    for number, values in enumerate(found):
        same = torch.allclose(values, logits[number], atol=1e-6)
        assert same == (number in alone), number


def test_slices_of_a_long_volume_are_mixed_in_the_order_of_their_places() -> None:
    """A site keeps samples in the order of their names: z1000 before z101."""
    long = [samples.Sample(f"b-z{at:03d}", part=samples.Part("b", at, 1004, 1.0)) for at in range(1004)]
    short = [samples.Sample(f"a-z{at:03d}", part=samples.Part("a", at, 3, 1.0)) for at in range(3)]
    named = sorted([*long, *short, samples.Sample("c")], key=lambda sample: sample.id)
    ordered = across_slices.in_order(named)
    assert ordered == [*short, *long, samples.Sample("c")]
    logits = {sample.id: torch.full((2, 1, 1), float(at)) for at, sample in enumerate(ordered)}
    found = dict(across_slices.mixed(((one.id, one.part, logits[one.id]) for one in ordered), 0.25))
    np.testing.assert_allclose([found[f"b-z{at:03d}"].mean() for at in (100, 101, 1000)], [103, 104, 1003])


def test_without_a_share_nothing_is_held_back_or_changed() -> None:
    logits = drawn(3)
    mixed = across_slices.mixed(((number, part(number), logits[number]) for number in range(3)), 0.0)
    assert next(mixed)[1].equal(logits[0])
    assert [thing for thing, _ in mixed] == [1, 2]


def faults(**values: Any) -> list[str]:
    recipe = schema.parse(schema.Recipe, {**VALUES, **values}, "recipe")
    return segmentation.Segmentation(recipe).faults()


@pytest.mark.parametrize("share", [0.4, -0.1, "much", True, False])
def test_what_is_no_share_is_refused(share: Any) -> None:
    (fault,) = faults(task={"kind": "segmentation", "options": {"neighbours": share}})
    assert fault.endswith("give the share of each neighbouring slice, from 0 to a third")


@pytest.mark.parametrize("smooth", [0, 1e-40, -1.0, 1e4, True, False, "one"])
def test_what_is_no_smoothing_of_dice_is_refused(smooth: Any) -> None:
    (fault,) = faults(task={"kind": "segmentation", "options": {"smooth": smooth}})
    assert fault.endswith("give a number of pixels from 1e-12 to 1000")


def test_a_share_is_refused_where_slices_have_no_answer_of_their_own() -> None:
    options = {"neighbours": 0.25}
    (fault,) = faults(task={"kind": "segmentation", "prompt": "box", "options": options})
    assert "boxes and points are of one slice" in fault
    whole = {"class_names": ["rest", "one"], "input_size": [32, 32], "fit": "native", "depth": 8}
    volumes = {"name": "unet3d"}
    (fault,) = faults(task={"kind": "segmentation", "options": options}, data=whole, backbone=volumes)
    assert "data.depth sees whole volumes" in fault
    assert faults(task={"kind": "segmentation", "options": options}) == []
