"""Batches prepared ahead, and images augmented on the device: the training that it is without, only quicker fed."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvfm import errors
from fedvfm.client.training import feed, trainer
from fedvfm.client.training import site as sites
from fedvfm.config import privacy, schema
from fedvfm.data import sample as samples
from fedvfm.model import adapted_model, feature_cache


def numbers(log: list[int], stop: int, until: int = 10**9) -> Iterator[int]:
    for number in range(stop):
        if number == until:
            raise errors.DataError(f"number {number}")
        log.append(number)
        yield number


@pytest.mark.parametrize("wanted", [True, False])
def test_the_same_batches_in_the_same_order(wanted: bool) -> None:
    log: list[int] = []
    with feed.ahead(numbers(log, 7), wanted) as ready:
        assert list(ready) == list(range(7))
    assert log == list(range(7))


def test_the_next_batch_is_prepared_while_this_one_is_used() -> None:
    log: list[int] = []
    with feed.ahead(numbers(log, 100), True) as ready:
        assert next(ready) == 0
        deadline = time.monotonic() + 20
        while log != [0, 1] and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert log == [0, 1]  # one ahead, and no more
    assert not [one for one in threading.enumerate() if one.name.startswith("batches")]


def test_an_endless_row_of_batches_ends_with_its_use() -> None:
    with feed.ahead(itertools.count(), True) as ready:
        assert [next(ready) for _ in range(3)] == [0, 1, 2]
    assert not [one for one in threading.enumerate() if one.name.startswith("batches")]


def test_a_fault_comes_where_its_batch_would() -> None:
    with feed.ahead(numbers([], 9, until=2), True) as ready:
        assert [next(ready), next(ready)] == [0, 1]
        with pytest.raises(errors.DataError, match="number 2"):
            next(ready)


# -- training ----------------------------------------------------------------------------------------------------------


class Drawn:
    """A hospital of drawn images, each with a box."""

    name = "north"
    train = tuple(samples.Sample(str(number)) for number in range(5))
    val = test = ()

    def read(self, sample: samples.Sample) -> samples.Pixels:
        rng = np.random.default_rng(int(sample.id))
        mask = np.zeros((40, 44), np.int64)
        mask[8:20, 10 : 20 + int(sample.id)] = 1
        return samples.Pixels((0.5 * rng.random((3, 40, 44)) + 0.4 * mask).astype(np.float32), mask)


def recipe(tiny_dino: Path, **more: Any) -> schema.Recipe:
    values: dict[str, Any] = {
        "backbone": {"name": str(tiny_dino)},
        "adapter": {"rank": 2},
        "data": {"class_names": ["rest", "box"], "input_size": [28, 28], "augment": ["flip", "rot90", "intensity"]},
        "optimiser": {"batch_size": 2, "local_epochs": 2, "learning_rate": 1e-2},
        "precision": "float32",
        **more,
    }
    return schema.parse(schema.Recipe, values, "recipe")


def trained(asked: schema.Recipe, *, simulated: bool = True) -> Any:
    model = adapted_model.AdaptedModel(asked)
    cache = feature_cache.FeatureCache(2**24)
    site = sites.Site("north", Drawn(), cache=cache, simulated=simulated)  # type: ignore[arg-type]
    return trainer.train(model, site, model.initial(), 1)


@pytest.mark.parametrize("fit", ["resize", "native"])
def test_a_thread_changes_no_bit(tiny_dino: Path, monkeypatch: pytest.MonkeyPatch, fit: str) -> None:
    asked = recipe(tiny_dino)
    contract = asked.data.model_copy(update={"fit": fit, "augment": ("flip", "rot90", "intensity", "noise")})
    asked = asked.model_copy(update={"data": contract})
    found = []
    for wanted in (False, True):
        monkeypatch.setattr(feed, "helps", lambda model, site, wanted=wanted: wanted)
        found.append(trained(asked))
    assert found[0].state.fingerprint == found[1].state.fingerprint
    assert found[0].metrics["loss"] == found[1].metrics["loss"]


def test_a_thread_where_it_helps(tiny_dino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model.AdaptedModel(recipe(tiny_dino))
    own, virtual = (sites.Site("north", Drawn(), simulated=simulated) for simulated in (False, True))  # type: ignore[arg-type]
    monkeypatch.setattr(feed.capacity, "cores", lambda: torch.get_num_threads() + 1)
    assert feed.helps(model, own)
    assert not feed.helps(model, virtual)
    monkeypatch.setattr(feed.capacity, "cores", lambda: torch.get_num_threads())
    assert not feed.helps(model, own)
    monkeypatch.setattr(model, "device", "cuda")
    assert feed.helps(model, own)
    assert feed.helps(model, virtual)
    model.recipe = model.recipe.model_copy(update={"data": model.recipe.data.model_copy(update={"views": 2})})
    assert not feed.helps(model, own)


@pytest.mark.parametrize("mechanism", [privacy.NO_MECHANISM, "record-level"])
def test_views_made_on_the_device_train_alike(tiny_dino: Path, monkeypatch: pytest.MonkeyPatch, mechanism: str) -> None:
    """The device is the CPU here, so what differs is who augments: values agree to the rounding of float32."""
    private = {"mechanism": mechanism, "clip": 1.0, "noise_multiplier": 0.01, "delta": 1e-5}
    more = {"privacy": private, "aggregation": {"weighting": "uniform"}}
    asked, found = recipe(tiny_dino, **({} if mechanism == privacy.NO_MECHANISM else more)), []
    for there in (False, True):
        monkeypatch.setattr(sites, "augments_there", lambda model, there=there: there)
        found.append(trained(asked))
    start = adapted_model.AdaptedModel(asked).initial()
    for name, value in found[0].state.items():
        moved = np.abs(value - start[name]).max()
        assert np.abs(value - found[1].state[name]).max() <= max(1e-5, 0.02 * moved)
    if mechanism == privacy.NO_MECHANISM:
        assert found[0].metrics["loss"] == pytest.approx(found[1].metrics["loss"], rel=1e-4)
        assert math.isfinite(found[0].metrics["loss"])


def test_what_the_device_cannot_augment_is_left_to_numpy(tiny_dino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model.AdaptedModel(recipe(tiny_dino))
    assert not sites.augments_there(model)
    monkeypatch.setattr(model, "device", "cuda")
    assert sites.augments_there(model)
    for changed in (
        {"data": model.recipe.data.model_copy(update={"augment": ("flip", "elastic")})},
        {"task": model.recipe.task.model_copy(update={"prompt": "box"})},
    ):
        model.recipe = recipe(tiny_dino).model_copy(update=changed)
        assert not sites.augments_there(model)


def test_a_class_is_the_target_whatever_the_mask(tiny_dino: Path) -> None:
    asked = recipe(tiny_dino, task={"kind": "classification"})
    model = adapted_model.AdaptedModel(asked)
    base = sites.Site("north", Drawn()).whole(model, Drawn.train[0])  # type: ignore[arg-type]
    view = sites.augmentation.View(torch.zeros(3, 28, 28), torch.ones(28, 28, dtype=torch.int64))
    example = sites.Example(samples.Sample("0", label=1), base, None, view=view)
    assert sites.targets([example, example], model).tolist() == [1, 1]
