"""Attacks that give patients away, each shown to work on the training code alone and refused by a site's own terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvfm import errors
from fedvfm.client.gate import held_adapters, lineage, policy
from fedvfm.client.training import evaluator, trainer
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.model import adapted_model
from fedvfm.protocol import protocol
from fedvfm.state import state

SIDE, CLASSES, TRAP = 56, ("rest", "box", "rare"), 2


@dataclass(frozen=True)
class Hospital:
    """Drawn images, each of a patient, in two classes of three."""

    train: tuple[samples.Sample, ...]
    test: tuple[samples.Sample, ...] = ()
    val: tuple[samples.Sample, ...] = ()
    name: str = "north"

    def read(self, sample: samples.Sample) -> samples.Pixels:
        rng = np.random.default_rng(int(sample.id))
        coarse = np.kron(rng.random((3, 4, 4)), np.ones((1, SIDE // 4, SIDE // 4)))
        return samples.Pixels((0.8 * coarse + 0.2 * rng.random((3, SIDE, SIDE))).astype(np.float32), None)


def patients(first: int, count: int) -> tuple[samples.Sample, ...]:
    return tuple(samples.Sample(f"{n:03d}", label=n % 2, patient=f"p{n}") for n in range(first, first + count))


@pytest.fixture(scope="module")
def model(tiny_dino: Path) -> adapted_model.AdaptedModel:
    values = {
        "rounds": 2,
        "backbone": {"name": str(tiny_dino)},
        "adapter": {"kind": "head-only"},
        "task": {"kind": "classification"},
        "data": {"class_names": list(CLASSES), "input_size": [SIDE, SIDE]},
        "optimiser": {
            "name": "sgd",
            "learning_rate": 1.0,
            "warmup": 0.0,
            "batch_size": 8,
            "weight_decay": 0.0,
            "clip_norm": 0.0,
        },
    }
    return adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"))


def features(model: adapted_model.AdaptedModel, site: sites.Site, some: Sequence[samples.Sample]) -> np.ndarray:
    """What the last layer is given of each image at the first adapter. Shapes: (n, D)."""
    model.write(model.initial())
    taken: list[torch.Tensor] = []
    hook = model.head.classify.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].detach()))
    model.eval()
    with torch.no_grad():
        for one in some:
            model(*sites.collate([site.example(model, one, -1, ("epoch", 0))], model))
    hook.remove()
    return torch.cat(taken).double().numpy()


def last_layer(model: adapted_model.AdaptedModel, adapter: state.AdapterState) -> tuple[str, str]:
    """Names of the last layer's weights and biases."""
    width = model.backbone.width
    (weights,) = (name for name, array in adapter.items() if array.shape == (len(CLASSES), width))
    (biases,) = (name for name, array in adapter.items() if array.shape == (len(CLASSES),))
    return weights, biases


def step_of(
    model: adapted_model.AdaptedModel, site: sites.Site, start: state.AdapterState
) -> tuple[np.ndarray, np.ndarray]:
    """What one round moves in the last layer: weights (K, D) and biases (K,)."""
    update = trainer.train(model, site, start, 1).state
    weights, biases = last_layer(model, start)
    return tuple(start[name].astype(np.float64) - update[name].astype(np.float64) for name in (weights, biases))


def trap(
    model: adapted_model.AdaptedModel, towards: np.ndarray, threshold: float, steep: float = 1e4
) -> state.AdapterState:
    """Weights by which an image is of class ``TRAP`` if its features go further than a threshold in a direction.

    Source: Boenisch et al., "When the Curious Abandon Honesty: Federated Learning Is Not Private", EuroS&P 2023.
    """
    start = model.initial()
    weights, biases = last_layer(model, start)
    arrays: dict[str, Any] = {name: array.copy() for name, array in start.items()}
    arrays[weights][TRAP] = steep * towards
    arrays[biases][TRAP] = -steep * threshold
    return state.AdapterState(arrays)


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


def terms(model: adapted_model.AdaptedModel) -> lineage.Lineage:
    """A site that approved the recipe and has taken no adapter yet."""
    return lineage.Lineage(model.locked(), model.manifest, lineage.Taken(), held_adapters.Adapters())


def word(
    model: adapted_model.AdaptedModel, kind: str, number: int, adapter: state.AdapterState, split: str = ""
) -> str:
    try:
        terms(model).require(kind, protocol.Task(model.recipe, number, adapter, split), 100.0)
    except errors.PolicyRefused as refusal:
        return refusal.reason
    return ""


def test_gradient_inversion_of_a_single_image(model: adapted_model.AdaptedModel) -> None:
    """The gradient of the last layer is (p - y) f, of its bias p - y: the quotient is the image's features."""
    site = sites.Site("north", Hospital(patients(0, 1)))
    truth = features(model, site, site.split("train"))[0]
    weights, biases = step_of(model, site, model.initial())
    assert cosine(weights[1] / biases[1], truth) > 1 - 1e-6
    assert np.abs(weights[1] / biases[1] - truth).max() < 1e-2 * np.abs(truth).max()

    with pytest.raises(errors.PolicyRefused) as refused:
        policy.require_enough(schema.PolicyConfig(), model.recipe, 1, 1)
    assert refused.value.reason == "policy-units"
    few = model.recipe.model_copy(update={"optimiser": model.recipe.optimiser.model_copy(update={"batch_size": 1})})
    allowed = schema.PolicyConfig(optimisers=("sgd",))
    for recipe, reasons in ((few, {"policy-training"}), (model.recipe, set())):
        facts = dataclasses.replace(policy.Facts.of(model.locked()), recipe=recipe)
        verdicts = policy.check(allowed, facts)
        said = {row.reason for row in verdicts if not row.accepted and row.rule in ("min_batch", "optimisers")}
        assert said == reasons


def test_trap_weights_take_one_image_out_of_a_batch(model: adapted_model.AdaptedModel) -> None:
    site = sites.Site("north", Hospital(patients(0, 8)))
    truth = features(model, site, site.split("train"))
    towards = np.random.default_rng(3).normal(size=truth.shape[1]) / np.sqrt(truth.shape[1])
    reach = np.sort(truth @ towards)
    caught = int(np.argmax(truth @ towards))
    hostile = trap(model, towards, float(reach[-2:].mean()))
    weights, biases = step_of(model, site, hostile)
    assert cosine(weights[TRAP] / biases[TRAP], truth[caught]) > 1 - 1e-5
    honest, shift = step_of(model, site, model.initial())
    mixed = max(cosine(honest[row] / shift[row], truth[caught]) for row in range(3))
    assert mixed < cosine(truth.mean(axis=0), truth[caught]) + 1e-4 < 1 - 1e-5, "without the trap a mixture of all"

    assert word(model, protocol.TRAIN, 1, model.initial()) == ""
    assert word(model, protocol.TRAIN, 1, hostile) == "policy-base"


def test_membership_by_evaluation(model: adapted_model.AdaptedModel) -> None:
    """Weights that get one known image wrong: the score of the split says whether it is there."""
    members, others = patients(20, 10), patients(40, 5)
    site = sites.Site("north", Hospital((), members))
    known = (*members[:5], *others)
    vectors = features(model, sites.Site("north", Hospital(known)), known)

    def score(adapter: state.AdapterState) -> float:
        task = protocol.Task(model.recipe, 1, adapter, "test")
        return evaluator.evaluate(model, site, adapter, task).metrics["brier"]

    # What images are like the asker knows from his own.
    own = patients(100, 80)
    cloud = features(model, sites.Site("south", Hospital(own)), own)
    middle, apart = cloud.mean(axis=0), np.linalg.pinv(np.cov(cloud.T), rcond=1e-6)
    nobody, said = score(trap(model, np.zeros(len(middle)), 1.0)), []
    for vector in vectors:
        towards = apart @ (vector - middle)
        towards /= float(towards @ (vector - middle))
        hostile = trap(model, towards, float(towards @ middle) + 0.9, steep=1e3)
        said.append(score(hostile) > nobody + 0.5 / len(members))
    assert said == [True] * 5 + [False] * 5

    for number in (0, 1, 2):
        assert word(model, protocol.EVALUATE, number, hostile, "test") == "policy-base"
    assert word(model, protocol.EVALUATE, 0, model.initial(), "test") == ""
