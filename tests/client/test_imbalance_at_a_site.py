"""The check of a hospital whose classes are unequal proposes what the recipe lacks, and is silent where it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvfm.client import site_file
from fedvfm.client.readiness import check
from fedvfm.config import schema


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("x-rays"), np.random.default_rng(0)
    for name, count in (("clear", 22), ("opacity", 2)):
        (root / name).mkdir()
        for at in range(count):
            Image.fromarray((255 * rng.random((16, 16))).astype(np.uint8)).save(root / name / f"{at}.png")
    return root


@pytest.mark.parametrize(
    ("task", "said"),
    [({}, True), ({"options": {"sampling": "balanced"}}, False), ({"class_weights": [0.5, 6.0]}, False)],
)
def test_the_line_is_proposed_where_nothing_balances(folder: Path, task: dict[str, Any], said: bool) -> None:
    backbone = {"backbone": {"name": "unet", "options": {"channels": [8, 16]}}, "adapter": {"kind": "full"}}
    values = {**backbone, "task": {"kind": "classification", **task}}
    recipe = schema.parse(
        schema.Recipe, {**values, "data": {"class_names": ["clear", "opacity"], "input_size": [16, 16]}}, "recipe"
    )
    data = {"source": "folder", "path": str(folder)}
    site = schema.parse(schema.SiteConfig, {"name": "north", "data": data}, "site")
    found = {finding.code: finding for finding in check.check(site_file.Own(site, recipe)).findings}
    assert ("imbalance" in found) == said
    assert not said or 'options = { sampling = "balanced" }' in found["imbalance"].remedy
