"""Context vectors under differential privacy: one gradient a unit, which moves the sum by the clip at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedvfm.client.training import dp_trainer
from fedvfm.client.training import site as sites
from fedvfm.privacy import gradients
from tests.privacy import test_private_training as images
from tests.support import two_towers

CLIP = 1e-3
WORDS = {"mode": "prompt-learning", "templates": ["{}"], "context": 3}


def _recipe(folder: Path, adapter: str, words: dict[str, Any], mechanism: str = "record-level") -> Any:
    contract = {"class_names": ["rest", "box"], "input_size": [32, 32], "augment": ["flip"], **two_towers.NORM}
    privacy = {**images.PRIVACY, "clip": CLIP, "mechanism": mechanism}
    task = {"kind": "classification"}
    return images.recipe(folder, privacy, task=task, adapter={"kind": adapter}, data=contract, words=words)


@pytest.mark.parametrize("mechanism", ["record-level", "patient-level"])
@pytest.mark.parametrize("adapter", ["head-only", "lora"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_one_unit_moves_the_sum_by_at_most_the_clip(
    tower_folders: dict[str, Path], kind: str, adapter: str, mechanism: str
) -> None:
    each = 2 if mechanism == "patient-level" else 1
    hospital = images.Drawn(side=32, each=each, loud={"000": 60.0, "001": 60.0})
    site = sites.Site(hospital.name, hospital, simulated=True)  # type: ignore[arg-type]
    model = images.moved(_recipe(tower_folders[kind], adapter, WORDS, mechanism))
    with images.steps(model, site) as (opened, what):
        units = dp_trainer.units_of(model, site)
        assert len(units) == 6 // each
        whole, less = opened.clipped(units, what.losses), opened.clipped(units[1:], what.losses)
        rows = torch.stack([images.plain_rows(model, what, unit).mean(dim=0) for unit in units])
    moved = float(torch.linalg.vector_norm(whole - less))
    assert 0 < moved <= CLIP * (1 + 1e-4)
    # The sum is that of one clipped row a unit.
    sizes = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    expected = (rows * torch.clamp(CLIP / sizes, max=1.0)).sum(dim=0)
    assert torch.allclose(whole.float(), expected, atol=CLIP * 1e-3)
    assert float(sizes.max()) > CLIP, "the clip is reached, or nothing was shown"


@pytest.mark.parametrize("words", [WORDS, {}, WORDS | {"per_class": True}], ids=["shared", "fixed", "per-class"])
def test_hooks_are_used_only_where_they_are_right(tower_folders: dict[str, Path], words: dict[str, Any]) -> None:
    """Context is read without a call of a layer, which Opacus does not see: the loop computes it."""
    model = images.moved(_recipe(tower_folders["clip"], "lora", words))
    site = sites.Site("north", images.Drawn(side=32))  # type: ignore[arg-type]
    what, train = images.work(model, site), site.split("train")
    with gradients.opened(what, hooks=True) as opened:
        assert opened.name == ("hooks" if not words else "loop")
        rows = opened.rows([[sample] for sample in train], what.losses)
    expected = images.plain_rows(model, what, train)
    assert torch.linalg.vector_norm(rows - expected) < 1e-4 * torch.linalg.vector_norm(expected)
