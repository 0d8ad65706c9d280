"""A hospital trains on what the recipe asks for: its data contract reaches the source it reads from."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import nibabel
import numpy as np

from fedvfm.client import state_folder
from fedvfm.client.gate import enforcement, reply_cache
from fedvfm.config import schema


def test_volumes_are_cut_and_stacked_as_the_recipe_says(tmp_path: Path) -> None:
    """The site once read axial slices in one channel, whatever plane, stack and window had been agreed."""
    values = np.random.default_rng(0).integers(-500, 500, (8, 9, 6)).astype(np.int16)
    for part, array in (("images", values), ("masks", (values > 0).astype(np.uint8))):
        (tmp_path / part).mkdir()
        for number in range(4):
            nibabel.save(
                nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 3.0, 1.0])), tmp_path / part / f"{number}.nii.gz"
            )
    contract = {"class_names": ["rest", "bone"], "plane": "coronal", "stack": 3, "window": [0.0, 200.0]}
    recipe = schema.parse(schema.Recipe, {"backbone": {"name": "some/backbone"}, "data": contract}, "recipe")
    site = schema.parse(
        schema.SiteConfig, {"name": "north", "data": {"source": "folder", "path": str(tmp_path)}}, "site"
    )
    # What surrounds it needs a joined site; how the data are opened does not.
    builder = enforcement.SiteTerms.__new__(enforcement.SiteTerms)
    builder._device, builder.where = "cpu", state_folder.State(tmp_path / "state", cast(state_folder.About, None))
    builder._sent = reply_cache.Sent(tmp_path / "sent")
    made = builder._build(site, recipe)
    one = made.split("train")[0]
    assert one.part is not None
    assert (one.part.of, one.part.step) == (9, 1.0)
    pixels = made.hospital.read(one)
    assert pixels.image.shape == (3, 6, 8)
    assert pixels.units == (-100.0, 100.0)
