"""One case moves a private step by at most the clip, whatever its images, on every head: one gradient a case."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvfm.client.training import dp_trainer
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.privacy import gradients
from tests.privacy import test_private_training as images

CLIP = 1e-2
COUNTS = (3, 1, 5, 2)


@dataclass(frozen=True)
class Cases(images.Drawn):
    """A hospital of cases of unlike numbers of images; the first one's are unlike all others."""

    count: int = len(COUNTS)

    @property
    def train(self) -> tuple[samples.Sample, ...]:
        made = []
        for at in range(self.count):
            parts = tuple(samples.Sample(f"{10 * at + number:03d}") for number in range(COUNTS[at]))
            made.append(samples.Sample(f"case-{at}", at % 2, patient=f"p{at // self.each}", images=parts))
        return tuple(made)


def _recipe(folder: Path, head: str, adapter: dict[str, Any], mechanism: str = "record-level") -> Any:
    contract = {"class_names": ["rest", "box"], "input_size": [28, 28], "augment": ["flip"]}
    task = {"kind": "case-classification", "head": head, "options": {"parts": 3}}
    privacy = {**images.PRIVACY, "clip": CLIP, "mechanism": mechanism}
    return images.recipe(folder, privacy, task=task, adapter=adapter, data=contract)


@pytest.mark.parametrize("adapter", [{"kind": "head-only"}, {"kind": "lora", "layers": [3]}], ids=["frozen", "lora"])
@pytest.mark.parametrize("head", ["attention-mil", "mst", "mean", "max"])
def test_one_case_moves_the_sum_by_at_most_the_clip(tiny_dino: Path, head: str, adapter: dict[str, Any]) -> None:
    hospital = Cases(side=28, loud={f"{number:03d}": 60.0 for number in range(3)})
    site = sites.Site(hospital.name, hospital, simulated=True)  # type: ignore[arg-type]
    model = images.moved(_recipe(tiny_dino, head, adapter))
    with images.steps(model, site) as (opened, what):
        units = dp_trainer.units_of(model, site)
        assert [unit[0].id for unit in units] == [f"case-{at}" for at in range(len(COUNTS))]
        whole, less = opened.clipped(units, what.losses), opened.clipped(units[1:], what.losses)
        rows = images.plain_rows(model, what, [unit[0] for unit in units])
    moved = float(torch.linalg.vector_norm(whole - less))
    assert 0 < moved <= CLIP * (1 + 1e-4)
    # The sum is that of one clipped row a case, however many images it has.
    sizes = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    expected = (rows * torch.clamp(CLIP / sizes, max=1.0)).sum(dim=0)
    assert torch.allclose(whole.float(), expected, atol=CLIP * 1e-3)
    assert float(sizes.max()) > CLIP, "the clip is reached, or nothing was shown"


@dataclass(frozen=True)
class Answered(Cases):
    """The same with values of two columns, one of them missing at the last case where ``missing``."""

    missing: bool = True

    @property
    def train(self) -> tuple[samples.Sample, ...]:
        values = [
            (float(at % 2), None if self.missing and at == self.count - 1 else 1.0 - at % 2) for at in range(self.count)
        ]
        return tuple(dataclasses.replace(case, values=own) for case, own in zip(super().train, values, strict=True))


@pytest.mark.parametrize(
    "target",
    [
        {"kind": "ordinal"},
        {"kind": "multi-label", "prevalence": [0.01, 0.5]},
        {"kind": "survival", "bins": [0.5, 2]},
        {"kind": "regression", "ranges": [[0, 9], [0, 9]], "centres": [1, 1], "scales": [0.1, 1]},
    ],
    ids=lambda target: target["kind"],
)
def test_of_every_target_one_case_moves_the_sum_by_at_most_the_clip(tiny_dino: Path, target: dict[str, Any]) -> None:
    loud = {f"{number:03d}": 60.0 for number in range(3)}
    missing = target["kind"] != "survival"
    hospital = Cases(28, loud=loud) if target["kind"] == "ordinal" else Answered(28, loud=loud, missing=missing)
    site = sites.Site(hospital.name, hospital, simulated=True)  # type: ignore[arg-type]
    recipe = _recipe(tiny_dino, "mean", {"kind": "head-only"})
    values = {**recipe.model_dump(mode="json"), "target": target}
    model = images.moved(schema.parse(schema.Recipe, values, "recipe"))
    with images.steps(model, site) as (opened, what):
        units = dp_trainer.units_of(model, site)
        whole, less = opened.clipped(units, what.losses), opened.clipped(units[1:], what.losses)
        rows = images.plain_rows(model, what, [unit[0] for unit in units])
    assert 0 < float(torch.linalg.vector_norm(whole - less)) <= CLIP * (1 + 1e-4)
    sizes = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    expected = (rows * torch.clamp(CLIP / sizes, max=1.0)).sum(dim=0)
    assert torch.allclose(whole.float(), expected, atol=CLIP * 1e-3)
    assert float(sizes.max()) > CLIP, "the clip is reached, or nothing was shown"


@dataclass(frozen=True)
class Tabled(Cases):
    """The same with a row of a table each; the first one's lies far outside of the others'."""

    @property
    def train(self) -> tuple[samples.Sample, ...]:
        rows = [(1e4, 1.0), (None, 0.0), (), (61.0, None)]
        return tuple(dataclasses.replace(case, inputs=row) for case, row in zip(super().train, rows, strict=True))


@dataclass(frozen=True)
class Bare(Tabled):
    """The same, and the first case has no image."""

    @property
    def train(self) -> tuple[samples.Sample, ...]:
        first, *others = super().train
        images = tuple(dataclasses.replace(image, without_image=True) for image in first.images[:1])
        return (dataclasses.replace(first, images=images, without_image=True), *others)


@pytest.mark.parametrize("fusion", ["concat", "film"])
@pytest.mark.parametrize(("head", "kind"), [("attention-mil", Tabled), ("mst", Tabled), ("attention-mil", Bare)])
def test_with_a_table_one_case_moves_the_sum_by_at_most_the_clip(
    tiny_dino: Path, head: str, fusion: str, kind: type[Tabled]
) -> None:
    """Its row is of the case: whatever stands in it, and if it or the image is missing, one gradient is clipped."""
    hospital = kind(side=28)
    site = sites.Site(hospital.name, hospital, simulated=True)  # type: ignore[arg-type]
    inputs = {"numbers": ["crp"], "ranges": [[0, 2e4]], "centres": [60], "scales": [10], "fusion": fusion}
    inputs |= {"categories": {"sex": ["F", "M"]}, "dropout": 0.5, "images_missing": kind is Bare}
    values = {**_recipe(tiny_dino, head, {"kind": "head-only"}).model_dump(mode="json"), "inputs": inputs}
    model = images.moved(schema.parse(schema.Recipe, values, "recipe"))
    with images.steps(model, site) as (opened, what):
        units = dp_trainer.units_of(model, site)
        whole, less = opened.clipped(units, what.losses), opened.clipped(units[1:], what.losses)
        rows = images.plain_rows(model, what, [unit[0] for unit in units])
    assert 0 < float(torch.linalg.vector_norm(whole - less)) <= CLIP * (1 + 1e-4)
    sizes = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    expected = (rows * torch.clamp(CLIP / sizes, max=1.0)).sum(dim=0)
    assert torch.allclose(whole.float(), expected, atol=CLIP * 1e-3)
    assert float(sizes.max()) > CLIP, "the clip is reached, or nothing was shown"


def test_a_patient_of_several_cases_counts_once(tiny_dino: Path) -> None:
    hospital = Cases(side=28, each=2)
    site = sites.Site(hospital.name, hospital, simulated=True)  # type: ignore[arg-type]
    model = images.moved(_recipe(tiny_dino, "mst", {"kind": "head-only"}, "patient-level"))
    with images.steps(model, site) as (opened, what):
        units = dp_trainer.units_of(model, site)
        assert [len(unit) for unit in units] == [2, 2]
        apart = opened.clipped(units, what.losses) - opened.clipped(units[1:], what.losses)
    assert 0 < float(torch.linalg.vector_norm(apart)) <= CLIP * (1 + 1e-4)


@pytest.mark.parametrize("head", ["attention-mil", "mst"])
def test_hooks_are_right_or_are_not_used(tiny_dino: Path, head: str) -> None:
    """Opacus's hooks see images or padded cases; only rows that are the loop's are taken."""
    hospital = Cases(side=28)
    site = sites.Site(hospital.name, hospital, simulated=True)  # type: ignore[arg-type]
    model = images.moved(_recipe(tiny_dino, head, {"kind": "head-only"}))
    with images.steps(model, site, hooks=True) as (opened, what):
        units = dp_trainer.units_of(model, site)
        found = opened.clipped(units, what.losses)
    way = gradients.Loop(what.parameters)
    expected = way.rows(units, what.losses)
    sizes = torch.linalg.vector_norm(expected, dim=1, keepdim=True)
    assert torch.allclose(found.float(), (expected * torch.clamp(CLIP / sizes, max=1)).sum(dim=0), atol=CLIP * 1e-2)


def test_made_cases_are_of_unlike_length(tiny_dino: Path) -> None:
    model = images.moved(_recipe(tiny_dino, "mst", {"kind": "head-only"}))
    first, second = dp_trainer.made(model)
    assert (first.places, second.places) == ((0, 1), (0, 1, 2))
    assert np.isfinite(dp_trainer.losses_of(model, [first, second]).detach().numpy()).all()
