"""Windows of a large image: where they lie, and how much their pixels count."""

from __future__ import annotations

import warnings

import pytest
import torch

from fedvfm.client import windows


@pytest.mark.parametrize("window", [(56, 56), (33, 70), (1, 5), (512, 7)])
def test_a_window_s_pixels_count_as_by_monai(window: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports warn of optional packages
        from monai.data.utils import compute_importance_map
    expected = compute_importance_map(window, mode="gaussian", sigma_scale=windows.SIGMA, dtype=torch.float32)
    found = windows._importance(window)
    assert torch.equal(found, torch.as_tensor(expected))
    assert found.shape == window
    assert float(found.min()) >= windows.LEAST
