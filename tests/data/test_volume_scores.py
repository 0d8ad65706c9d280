"""From files to scores: slices of volumes go through a site's evaluator and come out as volumes, in millimetres."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from fedvfm.client.training import evaluator
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.sources import table
from fedvfm.model import adapted_model, feature_cache
from fedvfm.protocol import protocol
from fedvfm.tasks import metrics

AFFINE = np.diag([-1.5, -1.0, 4.0, 1.0])


def volume(folder: Path, name: str, seed: int) -> None:
    """(x, y, z) = (24, 32, 5): noise with a bright box, and the box as the mask."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((24, 32, 5), dtype=np.uint8)
    mask[5 + seed : 14, 8:20, 1:4] = 1
    grey = (rng.random(mask.shape) * 300 + 500.0 * mask - 200).astype(np.int16)
    for part, array in (("imagesTr", grey), ("labelsTr", mask)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        ending = "_0000.nii.gz" if part == "imagesTr" else ".nii.gz"
        nibabel.save(nibabel.Nifti1Image(array, AFFINE), folder / part / f"{name}{ending}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[sites.Site, adapted_model.AdaptedModel]:
    folder = tmp_path_factory.mktemp("nnunet")
    for number, name in enumerate(("a", "b", "c", "d")):
        volume(folder, name, number)
    settings = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "box": 1}, "numTraining": 4}
    (folder / "dataset.json").write_text(json.dumps(settings))
    recipe = schema.Recipe.model_validate(
        {
            "threads": 1,
            "backbone": {"name": "unet", "options": {"channels": [4, 8]}},
            "adapter": {"kind": "full"},
            "data": {
                "class_names": ["background", "box"],
                "input_size": [32, 24],
                "window": [200.0, 800.0],
                "stack": 3,
            },
        }
    )
    source = table.make(schema.SourceConfig(source="folder", path=str(folder)), recipe.data)
    (hospital,) = virtual_hospitals.make_hospitals(
        source, schema.PartitionConfig(kind="iid", sites=1, val_share=0.0, test_share=0.5), 0
    )
    return sites.Site("one", hospital, cache=feature_cache.FeatureCache(2**24)), adapted_model.AdaptedModel(recipe)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_site_reports_volumes(made: tuple[sites.Site, adapted_model.AdaptedModel], share: float) -> None:
    """Equal to scoring by hand, whole volume by whole volume, what the model says of each slice among its neighbours.

    Neighbours are mixed before the class is chosen, and the report shows a slice as it is scored.
    """
    site, plain = made
    model = adapted_model.AdaptedModel(
        plain.recipe.model_copy(
            update={"task": plain.recipe.task.model_copy(update={"options": {"neighbours": share}})}
        )
    )
    model.write(plain.initial())
    members = site.split("test")
    assert len(members) == 10
    task = protocol.Task(model.recipe, 1, model.read(), "test", surface=True, per_sample=True)
    found = evaluator.evaluate(model, site, model.read(), task)
    assert found.num_examples == 2
    assert list(found.ids) == sorted({one.unit for one in members})
    expected = metrics.SegmentationScores(("background", "box"))
    for name in found.ids:
        own = sorted((one for one in members if one.unit == name), key=lambda one: one.part.index)  # type: ignore[union-attr]
        whole = [site.whole(model, one) for one in own]
        logits = [evaluator.logits(model, site, one, seen) for one, seen in zip(own, whole, strict=True)]
        mixed = ndimage.convolve1d(np.stack(logits), [share, 1 - 2 * share, share], axis=0, mode="nearest")
        expected.add(name, mixed.argmax(axis=1), np.stack([seen.truth for seen in whole]), (4.0, 1.0, 1.5))
        for one, seen, values in zip(own, whole, mixed, strict=True):
            np.testing.assert_allclose(evaluator.among(model, site, one, seen, members), values, atol=1e-5)
    assert dict(found.metrics) == pytest.approx(expected.value())
    assert {"dice", "hd95", "assd", "nsd"} <= found.metrics.keys()


def test_three_channels_are_neighbours_in_the_window(made: tuple[sites.Site, adapted_model.AdaptedModel]) -> None:
    site, model = made
    first: Any = site.split("test")[0]
    second: Any = site.split("test")[1]
    one, two = (site.whole(model, sample).image for sample in (first, second))
    np.testing.assert_array_equal(one[2], two[1])
    np.testing.assert_array_equal(one[1], two[0])
    raw = site.hospital.read(second)
    assert raw.units == (-200.0, 600.0)
    np.testing.assert_array_equal(two, raw.image)  # the window is the whole stretch
