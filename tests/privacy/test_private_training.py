"""Private steps on real tiny models: one unit moves the sum by at most the clip, the noise is what was accounted for.

A ViT (DINOv2) where Opacus's hooks are right, and a SAM with windows and mask decoder where they are not.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from fedvfm import errors
from fedvfm.client.training import dp_trainer, trainer
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.model import adapted_model
from fedvfm.privacy import base, dpsgd, events, gradients, randomness, records
from fedvfm.privacy import table as mechanisms
from fedvfm.state import state

PRIVACY = {"mechanism": "record-level", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-5}
DECODER = ["upscale", "output_hypernetworks_mlps", "mask_tokens"]
WHERE = "site 'north', round 1"


@dataclass(frozen=True)
class Drawn:
    """A hospital of drawn images: a bright box on noise. Every patient has ``each`` images."""

    name: str = "north"
    count: int = 6
    side: int = 56
    each: int = 1
    val: tuple[samples.Sample, ...] = ()
    test: tuple[samples.Sample, ...] = ()
    loud: dict[str, float] = field(default_factory=dict)

    @property
    def train(self) -> tuple[samples.Sample, ...]:
        return tuple(
            samples.Sample(f"{at:03d}", label=at % 2, patient=f"p{at // self.each:03d}") for at in range(self.count)
        )

    def read(self, sample: samples.Sample) -> samples.Pixels:
        rng = np.random.default_rng(int(sample.id))
        image = rng.random((3, self.side, self.side)).astype(np.float32) * self.loud.get(sample.id, 0.6)
        mask = np.zeros((self.side, self.side), np.int64)
        top, left = rng.integers(4, self.side // 2, 2)
        mask[top : top + 16, left : left + 16] = 1
        image[:, mask == 1] += 0.4
        return samples.Pixels(np.clip(image, 0, 1), mask)


def recipe(folder: Path | str, privacy: dict[str, Any] | None = None, side: int = 56, **more: Any) -> schema.Recipe:
    adapter = {"rank": 2, **more.pop("adapter", {})}
    values = {
        "rounds": 2,
        "backbone": {"name": str(folder)},
        "adapter": adapter,
        "data": {"class_names": ["rest", "box"], "input_size": [side, side], "augment": ["flip"]},
        "optimiser": {"batch_size": 3, "learning_rate": 1e-2, "weight_decay": 0.0},
        "aggregation": {"weighting": "uniform"},
        "privacy": PRIVACY if privacy is None else privacy,
        **more,
    }
    return schema.parse(schema.Recipe, values, "recipe")


def moved(made: schema.Recipe) -> adapted_model.AdaptedModel:
    """A model whose every trained number is off its start, ready to train round 1."""
    model, rng = adapted_model.AdaptedModel(made), np.random.default_rng(0)
    start = model.initial()
    model.write(
        state.AdapterState({name: a + rng.normal(0, 0.05, a.shape).astype(np.float32) for name, a in start.items()})
    )
    model.train()
    model.select(1)
    return model


def work(model: adapted_model.AdaptedModel, site: sites.Site, step: int = 0) -> base.Work:
    """Its losses take the site's samples too, which those of the package never see."""
    groups = [group for group in model.trainable(1).values() if group]

    def losses(some: Any) -> torch.Tensor:
        if isinstance(some[0], sites.Example):
            return dp_trainer.losses_of(model, some)
        return dp_trainer.losses(model, site, some, step, 2)

    return base.Work(model, groups, WHERE, dp_trainer.made(model), losses)


@contextlib.contextmanager
def steps(
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    draws: randomness.Draws | None = None,
    hooks: bool | None = None,
) -> Iterator[tuple[dpsgd.PrivateSteps, base.Work]]:
    what = work(model, site)
    event = events.event_of(model.recipe, len(dp_trainer.units_of(model, site)))
    assert event is not None
    with dpsgd.opened(what, model.recipe, event, draws or randomness.System(), hooks=hooks) as opened:
        yield opened, what


def plain_rows(model: adapted_model.AdaptedModel, what: base.Work, some: Any) -> torch.Tensor:
    """Each sample's gradient by the most ordinary means: alone, with backward()."""
    rows = []
    for one in some:
        model.zero_grad()
        what.losses([one]).sum().backward()
        rows.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in what.parameters])
        )
    model.zero_grad()
    return torch.stack(rows)


VIT = [
    pytest.param(kind, task, way, id=f"{kind}-{task}")
    for kind, task, way in (
        ("lora", "segmentation", "hooks"),
        ("lora", "classification", "hooks"),
        ("lora", "detection", "hooks"),
        ("core", "segmentation", "hooks"),
        ("norm", "segmentation", "hooks"),
        ("bias", "classification", "hooks"),
        ("head-only", "segmentation", "hooks"),
        ("adaptformer", "segmentation", "hooks"),
        ("prompt-tokens", "segmentation", "loop"),
    )
]
DEPTH = {"kind": "medical-sam-adapter", "layers": [1, 2], "parts": [], "options": {"depth": True}}
STACKED = {"class_names": ["rest", "box"], "input_size": [64, 64], "stack": 3}
SAM = [
    pytest.param("sam", {"rank": 2, "layers": [0, 2], "parts": []}, "pyramid", id="windows"),
    pytest.param("sam", {"rank": 2, "layers": [0, 1], "parts": []}, "pyramid", id="windows-and-global"),
    pytest.param("sam", {"rank": 2, "layers": [0, 2], "parts": []}, "unet", id="head-unet"),
    pytest.param("tinyvit", {"rank": 2, "layers": [0, 3], "parts": []}, "unet-deep", id="head-unet-deep"),
    pytest.param("sam", {"rank": 2, "parts": DECODER}, "sam-masks", id="lora-and-decoder"),
    pytest.param("sam", {"kind": "medical-sam-adapter", "parts": []}, "sam-masks", id="medical-sam-adapter"),
    pytest.param("sam", DEPTH, "sam-masks", id="depth"),
    pytest.param("tinyvit", {"rank": 2, "parts": DECODER}, "sam-masks", id="tinyvit-lora-and-decoder"),
    pytest.param("tinyvit", {"rank": 2, "layers": [0, 3], "parts": []}, "sam-masks", id="tinyvit-windows"),
    pytest.param("tinyvit", {"rank": 2, "parts": DECODER}, "automatic", id="tinyvit-automatic-prompts"),
    pytest.param("swin", {"rank": 2, "layers": [2, 4]}, "pyramid", id="swin-shifted-windows"),
]


@pytest.mark.parametrize(("kind", "task", "way"), VIT)
def test_the_way_of_a_vit_gives_each_images_own_gradient(tiny_dino: Path, kind: str, task: str, way: str) -> None:
    made = recipe(tiny_dino, adapter={"kind": kind}, task={"kind": task})
    model, site = moved(made), sites.Site("north", Drawn())
    what, train = work(model, site), site.split("train")
    before = model.read().fingerprint
    with gradients.opened(what, hooks=True) as opened:
        assert opened.name == way
        found = opened.rows([[one] for one in train], what.losses)
        assert found.shape == (len(train), sum(p.numel() for p in what.parameters))
    expected = plain_rows(model, what, train)
    assert torch.linalg.vector_norm(found - expected) < 1e-4 * torch.linalg.vector_norm(expected)
    assert torch.linalg.vector_norm(found[0] - expected[1]) > 0.1 * torch.linalg.vector_norm(expected[1])
    assert model.read().fingerprint == before  # the proof moved every number and put it back
    assert_clean(model)


def assert_clean(model: nn.Module) -> None:
    """Nothing of the hooks is left: the same model is used without privacy later."""
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
        assert not {"activations", "max_batch_len", "autograd_grad_sample_hooks", "ft_compute_sample_grad"} & set(
            module.__dict__
        )
    assert not any(hasattr(one, "grad_sample") or hasattr(one, "_forward_counter") for one in model.parameters())


@pytest.mark.parametrize(("family", "adapter", "head"), SAM)
def test_sam_is_computed_by_the_loop(
    sam_folders: dict[str, Path], tiny_swin: Path, family: str, adapter: dict[str, Any], head: str
) -> None:
    """Even where hooks are asked for: they are tried and found wrong."""
    task = {"prompt": "auto"} if head == "automatic" else {"head": head}
    more = {"data": STACKED, "privacy": {**PRIVACY, "mechanism": "patient-level"}} if adapter is DEPTH else {}
    made = recipe({**sam_folders, "swin": tiny_swin}[family], side=64, adapter=adapter, task=task, **more)
    model, site = moved(made), sites.Site("north", Drawn(side=64, count=3))
    with steps(model, site, hooks=True) as (opened, what):
        assert opened.way.name == "loop"
        units = [[one] for one in site.split("train")]
        found = opened.way.rows(units, what.losses)
        assert found.shape[0] == 3
        whole = opened.clipped(units, what.losses)
        one_less = opened.clipped(units[1:], what.losses)
    expected = plain_rows(model, what, site.split("train"))
    assert torch.linalg.vector_norm(found - expected) < 1e-4 * torch.linalg.vector_norm(expected)
    assert 0 < float(torch.linalg.vector_norm(whole - one_less)) <= PRIVACY["clip"]
    assert_clean(model)


# What stock Opacus does ----------------------------------------------------------------------------------------------


def stock_sum(model: adapted_model.AdaptedModel, what: base.Work, some: Any, clip: float) -> torch.Tensor:
    """What Opacus's own optimiser adds up before noise: its wrapper, its hooks, its clipping."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    still = [one for one in model.modules() if not one.training]
    for module in still:  # as its users do; nothing here is dropped
        module.training = True
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False)
    try:
        plain = torch.optim.SGD(what.parameters, lr=0.1)
        private_optimiser = DPOptimizer(
            plain, noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=1, loss_reduction="sum"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            what.losses(some).sum().backward()
        private_optimiser.clip_and_accumulate()
        return torch.cat([p.summed_grad.reshape(-1) for p in what.parameters])
    finally:
        wrapped.to_standard_module()
        model.zero_grad()
        for module in still:
            module.training = False


def test_stock_opacus_lets_one_image_move_a_sam_by_more_than_the_clip(sam_folders: dict[str, Path]) -> None:
    """Windowed blocks alone: it runs without a word, and takes windows for images. Ours stays below the clip."""
    clip, folder = 1e-3, sam_folders["sam"]
    made = recipe(
        folder,
        {**PRIVACY, "clip": clip},
        side=64,
        adapter={"layers": [0, 2], "parts": []},
        task={"head": "patch"},
    )
    model, site = moved(made), sites.Site("north", Drawn(side=64, count=3))
    model.head.requires_grad_(False)
    pairs = list(model.trainable(1)["adapter"])
    what = base.Work(model, [pairs], WHERE, dp_trainer.made(model), work(model, site).losses)
    train = list(site.split("train"))
    apart = float(
        torch.linalg.vector_norm(stock_sum(model, what, train, clip) - stock_sum(model, what, train[1:], clip))
    )
    assert apart > 1.2 * clip
    event = events.event_of(made, 3)
    assert event is not None
    with dpsgd.opened(what, made, event, randomness.System(), hooks=True) as opened:
        assert opened.way.name == "loop"
        whole = opened.clipped([[one] for one in train], what.losses)
        less = opened.clipped([[one] for one in train[1:]], what.losses)
    assert float(torch.linalg.vector_norm(whole - less)) <= clip


def test_stock_opacus_stops_where_windows_meet_global_attention(sam_folders: dict[str, Path]) -> None:
    made = recipe(sam_folders["sam"], side=64, adapter={"layers": [0, 1], "parts": []}, task={"head": "patch"})
    model, site = moved(made), sites.Site("north", Drawn(side=64, count=3))
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        stock_sum(model, work(model, site), list(site.split("train")), 1.0)


def test_stock_opacus_has_no_gradient_for_mask_tokens(sam_folders: dict[str, Path]) -> None:
    """The decoder reads them without a call of their module."""
    made = recipe(
        sam_folders["sam"], side=64, adapter={"kind": "head-only", "parts": ["mask_tokens"]}, task={"head": "sam-masks"}
    )
    model, site = moved(made), sites.Site("north", Drawn(side=64, count=3))
    what = work(model, site)
    with pytest.raises(ValueError, match="Per sample gradient is not initialized"):
        stock_sum(model, what, list(site.split("train")), 1.0)
    with steps(model, site) as (opened, _):
        assert bool(opened.clipped([[one] for one in site.split("train")], what.losses).any())


def test_stock_opacus_unfolds_a_channels_last_image_wrongly(tiny_dino: Path) -> None:
    """The head's convolutions take grids whose channels lie last: stock gradients miss, ours are made contiguous."""
    model, site = moved(recipe(tiny_dino)), sites.Site("north", Drawn(count=2))
    what, train = work(model, site), list(site.split("train"))
    own = [p for name, p in model.head.named_parameters() if name.startswith("project") and name.endswith("weight")]
    chosen = base.Work(model, [own], WHERE, dp_trainer.made(model), what.losses)
    for one in what.parameters:
        one.requires_grad_(any(one is other for other in own))
    expected = plain_rows(model, chosen, train).sum(dim=0)
    found = stock_sum(model, chosen, train, 1e9)
    assert torch.linalg.vector_norm(found - expected) > 0.5 * torch.linalg.vector_norm(expected)
    with gradients.opened(chosen, hooks=True) as opened:
        assert opened.name == "hooks"
        rows = opened.rows([[one] for one in train], what.losses)
    assert torch.linalg.vector_norm(rows.sum(dim=0) - expected) < 1e-4 * torch.linalg.vector_norm(expected)


def test_a_cpu_computes_one_unit_after_the_other(tiny_dino: Path) -> None:
    """As quick there, and it holds one image's activations in place of a batch's."""
    model, site = moved(recipe(tiny_dino)), sites.Site("north", Drawn())
    with steps(model, site) as (opened, _):
        assert opened.way.name == "loop"
    assert gradients.worthwhile([nn.Parameter(torch.zeros(1, device="meta"))])


# One unit's influence ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.floats(1e-3, 1e3),
    st.floats(-30, 30),
    st.integers(0, 2**31),
)
def test_no_row_adds_more_than_the_clip(units: int, numbers: int, clip: float, size: float, seed: int) -> None:
    """Over shapes, clips and gradients of any size: below the clip untouched, above it scaled to it."""
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy((rng.normal(0, 1, (units, numbers)) * 10**size).astype(np.float32))
    whole = dpsgd.clipped_sum(rows.clone(), clip)
    less = dpsgd.clipped_sum(rows[1:].clone(), clip) if units > 1 else torch.zeros(numbers, dtype=torch.float64)
    moved_by = float(torch.linalg.vector_norm(whole - less))
    assert moved_by <= clip
    own = float(torch.linalg.vector_norm(rows[0].double()))
    assert moved_by == pytest.approx(min(own, clip), rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 3e38])
def test_a_row_that_is_no_gradient_adds_nothing_or_the_clip(broken: float) -> None:
    """It does not end the round: a refusal that depends on an image tells of it without any noise."""
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(0, 1, (3, 40)).astype(np.float32))
    rows[1, 7] = broken
    less = dpsgd.clipped_sum(rows[[0, 2]].clone(), 1e-6)
    moved_by = float(torch.linalg.vector_norm(dpsgd.clipped_sum(rows.clone(), 1e-6) - less))
    assert moved_by <= 1e-6 if broken == 3e38 else moved_by == 0.0


ARMS = [("dino", kind) for kind in ("lora", "core", "adaptformer", "prompt-tokens", "norm")] + [
    ("sam", "lora"),
    ("sam", "bias"),
    ("tinyvit", "lora"),
    ("dino", "detection"),
]


@pytest.fixture(scope="module")
def built(tiny_dino: Path, sam_folders: dict[str, Path]) -> dict[tuple[str, str], adapted_model.AdaptedModel]:
    """One model a backbone and kind, for all examples."""
    folders = {"dino": (tiny_dino, 56), **{name: (sam_folders[name], 64) for name in ("sam", "tinyvit")}}
    return {
        (name, kind): moved(
            recipe(folders[name][0], side=folders[name][1], task={"kind": kind})
            if kind == "detection"
            else recipe(folders[name][0], side=folders[name][1], adapter={"kind": kind})
        )
        for name, kind in ARMS
    }


@settings(max_examples=18, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(ARMS),
    st.integers(1, 5),
    st.floats(1e-4, 10.0),
    st.integers(0, 4),
    st.integers(1, 3),
    st.floats(0.1, 30.0),
    st.booleans(),
)
def test_one_image_moves_the_sum_by_at_most_the_clip(
    built: dict[tuple[str, str], adapted_model.AdaptedModel],
    arm: tuple[str, str],
    others: int,
    clip: float,
    away: int,
    held: int,
    loud: float,
    hooks: bool,
) -> None:
    """Whatever backbone, adapter, batch, clip and memory: with and without one image, however unlike the others."""
    model = built[arm]
    privacy = model.recipe.privacy.model_copy(update={"clip": clip, "microbatch": held})
    made = model.recipe.model_copy(update={"privacy": privacy})
    side = 56 if arm[0] == "dino" else 64
    site = sites.Site("north", Drawn(side=side, count=others + 1, loud={f"{away:03d}": loud}))
    units = [[one] for one in site.split("train")]
    without = [unit for at, unit in enumerate(units) if at != away % len(units)]
    what, event = work(model, site), events.event_of(made, len(units))
    assert event is not None
    with dpsgd.opened(what, made, event, randomness.System(), hooks=hooks) as opened:
        whole, less = opened.clipped(units, what.losses), opened.clipped(without, what.losses)
    # The same image beside other images is computed by other kernels: its gradient differs in the last bits.
    assert float(torch.linalg.vector_norm(whole - less)) <= clip * (1 + 1e-4)
    assert float(torch.linalg.vector_norm(whole)) <= clip * len(units)


def test_a_patient_counts_once_however_many_images(tiny_dino: Path) -> None:
    """The gradient of a patient is the mean over some images; all patients' images go and come together."""
    privacy = {**PRIVACY, "mechanism": "patient-level", "clip": 1e-3, "images_per_patient": 2}
    model = moved(recipe(tiny_dino, privacy))
    site = sites.Site("north", Drawn(count=12, each=4))
    units = dp_trainer.units_of(model, site)
    assert [[one.id for one in unit] for unit in units] == [[f"{4 * p + k:03d}" for k in range(4)] for p in range(3)]
    with steps(model, site, hooks=True) as (opened, what):
        assert opened.event.unit == "patient"
        assert opened.way.name == "hooks"
        chosen = [opened.choose(4) for _ in range(200)]
        assert all(len(set(one)) == 2 for one in chosen)
        assert len({tuple(one) for one in chosen}) == 6  # every pair of four comes up
        assert opened.choose(1) == [0]
        sub = [[unit[0], unit[3]] for unit in units]
        whole, less = opened.clipped(sub, what.losses), opened.clipped(sub[1:], what.losses)
        assert float(torch.linalg.vector_norm(whole - less)) <= 1e-3 * (1 + 1e-4)
        rows = opened.way.rows(sub, what.losses)
    each = plain_rows(model, what, [one for unit in sub for one in unit]).reshape(3, 2, -1).mean(dim=1)
    assert torch.linalg.vector_norm(rows - each) < 1e-4 * torch.linalg.vector_norm(each)
    loop = gradients.Loop(what.parameters).rows(sub, what.losses)
    assert torch.linalg.vector_norm(loop - each) < 1e-4 * torch.linalg.vector_norm(each)


# Noise and draws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.5, 4.0])
def test_the_noise_is_the_multiplier_times_the_clip_over_the_batch(tiny_dino: Path, clip: float) -> None:
    """An empty draw is a step of noise alone: level, shape and independence, and nothing of the run's seed in it."""
    made = recipe(tiny_dino, {**PRIVACY, "clip": clip, "noise_multiplier": 1.5})
    model, site = moved(made), sites.Site("north", Drawn())
    found = []
    with steps(model, site) as (opened, what):
        for _ in range(4):
            torch.manual_seed(0)
            opened.gradient([], what.losses)
            found.append(torch.cat([p.grad.reshape(-1) for p in what.parameters]).double().numpy())
    noise = np.stack(found) * 3 / (1.5 * clip)
    bound = 5.4 / math.sqrt(noise.size)
    assert abs(noise.std() - 1) < bound
    assert abs(noise.mean()) < bound
    assert stats.kstest(noise.reshape(-1), "norm").pvalue > 1e-7
    for one in range(4):
        for other in range(one):
            assert abs(np.corrcoef(noise[one], noise[other])[0, 1]) < 5.4 / math.sqrt(noise.shape[1])


def test_noise_is_added_to_the_clipped_sum(tiny_dino: Path) -> None:
    """What the optimiser gets is (sum + noise) / batch, parameter by parameter."""
    model, site = moved(recipe(tiny_dino)), sites.Site("north", Drawn(count=3))
    units = [[one] for one in site.split("train")]
    with steps(model, site, randomness.Seeded(1, "x")) as (opened, what):
        total = opened.clipped(units, what.losses)
        opened.gradient(units, what.losses)
        found = torch.cat([p.grad.reshape(-1) for p in what.parameters]).double()
    noise = torch.from_numpy(randomness.Seeded(1, "x").normal(len(total)))
    assert torch.allclose(found, (total + PRIVACY["clip"] * noise) / 3, atol=1e-5)


def test_draws_are_poisson(tiny_dino: Path) -> None:
    """Every unit by itself with the rate that the accountant is told; sizes vary and may be 0."""
    model, site = moved(recipe(tiny_dino)), sites.Site("north", Drawn(count=30))
    with steps(model, site) as (opened, _):
        assert opened.event.sample_rate == 0.1
        drawn = np.zeros((4000, 30))
        for row in drawn:
            row[opened.draw(30)] = 1
    sizes = drawn.sum(axis=1)
    assert abs(sizes.mean() - 3) < 5.4 * math.sqrt(2.7 / 4000)
    assert abs(sizes.var() / 2.7 - 1) < 5.4 * math.sqrt(2 / 4000) * 1.1  # binomial, not a fixed batch
    assert (sizes == 0).any()
    assert np.abs(drawn.mean(axis=0) - 0.1).max() < 5.4 * math.sqrt(0.09 / 4000)
    together = np.corrcoef(drawn.T) - np.eye(30)
    assert np.abs(together).max() < 5.8 / math.sqrt(4000)


# A whole round -------------------------------------------------------------------------------------------------------


def test_a_round_of_a_real_site_cannot_be_repeated(tiny_dino: Path) -> None:
    """And its update tells nothing but the adapter; a virtual one repeats to the last bit."""
    made = recipe(tiny_dino)
    model = adapted_model.AdaptedModel(made)
    start = model.initial()
    real, virtual = sites.Site("north", Drawn()), sites.Site("north", Drawn(), simulated=True)
    first, second = (trainer.train(model, real, start, 1) for _ in range(2))
    assert first.state.fingerprint != second.state.fingerprint
    assert (first.num_examples, dict(first.metrics), dict(first.extra)) == (1, {}, {})
    assert first.base_fingerprint == start.fingerprint
    third, fourth = (trainer.train(model, virtual, start, 1) for _ in range(2))
    assert third.state.fingerprint == fourth.state.fingerprint
    assert third.state.fingerprint != trainer.train(model, virtual, start, 2).state.fingerprint
    assert_clean(model)


@pytest.mark.parametrize("factors", ["freeze-A", "alternate"])
def test_only_what_trains_in_a_round_is_clipped_noised_and_sent(tiny_dino: Path, factors: str) -> None:
    made = recipe(tiny_dino, adapter={"factors": factors})
    model = adapted_model.AdaptedModel(made)
    start = model.initial()
    update = trainer.train(model, sites.Site("north", Drawn()), start, 1)
    assert set(update.state) == {spec.name for spec in model.manifest if spec.role != "A"}
    assert all(not np.array_equal(update.state[name], start[name]) for name in update.state)
    still = model.read()
    assert all(np.array_equal(still[spec.name], start[spec.name]) for spec in model.manifest if spec.role == "A")


def test_private_training_without_noise_or_clip_learns_what_plain_training_does(
    tiny_dino: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sum over a batch of all units, divided by the batch, is the mean: without its noise it is plain training."""
    quiet = {**PRIVACY, "clip": 1e4}
    monkeypatch.setattr(randomness.System, "normal", lambda self, shape: np.zeros(shape))
    optimiser = {"batch_size": 6, "learning_rate": 0.1, "weight_decay": 0.0, "name": "sgd", "clip_norm": 0.0}
    more: dict[str, Any] = {"optimiser": optimiser, "rounds": 1}
    contract = {"class_names": ["rest", "box"], "input_size": [56, 56]}
    found = []
    for privacy in (quiet, {}):
        model = adapted_model.AdaptedModel(recipe(tiny_dino, privacy, data=contract, **more))
        found.append(trainer.train(model, sites.Site("north", Drawn()), model.initial(), 1).state)
    start = model.initial()
    assert (found[0] - found[1]).norm() < 1e-3 * (found[1] - start).norm()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ("frozen", "no gradient reaches what trains"),
        ("detached", "no gradient reaches what trains"),
        ("still", "the adapter did not change in 1 step"),
        ("infinite", "of a made image a gradient is not finite"),
    ],
)
def test_what_learns_nothing_is_refused_before_it_leaves(
    tiny_dino: Path, wrong: str, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tiny_dino)
    if wrong == "still":
        made = recipe(tiny_dino, optimiser={"batch_size": 3, "learning_rate": 1e-30, "weight_decay": 0.0})
    model = adapted_model.AdaptedModel(made)
    if wrong == "frozen":  # nothing at all gets a gradient
        monkeypatch.setattr(model.task, "loss", lambda logits, target: logits.sum() * 0)
    if wrong == "infinite":
        monkeypatch.setattr(model.task, "loss", lambda logits, target: logits.sum() * math.nan)
    if wrong == "detached":  # the head learns, the adapter does not
        features = model.backbone.features

        def cut(*arguments: Any) -> Any:
            with torch.no_grad():
                return features(*arguments)

        monkeypatch.setattr(model.backbone, "features", cut)
    start = model.initial() if wrong != "still" else _large(model.initial())
    with pytest.raises(errors.TrainingError, match=match):
        trainer.train(model, sites.Site("north", Drawn()), start, 1)


def _large(start: state.AdapterState) -> state.AdapterState:
    return state.AdapterState({name: array + np.float32(1.0) for name, array in start.items()})


def test_layers_that_mix_images_are_refused(tiny_dino: Path) -> None:
    model = adapted_model.AdaptedModel(recipe(tiny_dino))
    model.head.add_module("mixing", nn.BatchNorm2d(3))
    with pytest.raises(errors.ConfigError, match="BatchNorm2d layers, which mix the images"):
        trainer.train(model, sites.Site("north", Drawn()), model.initial(), 1)


def test_a_row_that_is_missing_stops_the_round(tiny_dino: Path) -> None:
    """Rows are counted at every step, not only when the way is chosen; a way that gives too few is not used."""
    model, site = moved(recipe(tiny_dino)), sites.Site("north", Drawn())
    units = [[one] for one in site.split("train")]
    with steps(model, site, hooks=True) as (opened, what):
        assert opened.way.name == "hooks"

        def halves(some: Any) -> torch.Tensor:
            return what.losses(some) if len(some) == 1 else torch.cat([what.losses(some[:3]), what.losses(some[3:])])

        assert isinstance(opened.way, gradients.Hooks)
        with pytest.raises(errors.TrainingError, match=r"per-sample gradients of a parameter .* for 6 images"):
            opened.way.together(units, halves)
        found = opened.way.rows(units, halves)  # the loop takes over, so that no image can end the round
        assert torch.equal(found, gradients.Loop(what.parameters).rows(units, what.losses))
        assert_clean(model)
        opened.way.rows = lambda some, losses: torch.zeros(1, 1)  # type: ignore[method-assign]
        with pytest.raises(errors.TrainingError, match="6 units gave gradients"):
            opened.clipped(units, what.losses)


@pytest.mark.parametrize("hooks", [True, False])
def test_no_image_can_end_a_round(tiny_dino: Path, hooks: bool) -> None:
    """Of one image the loss is no number: its row is nought, the others' are what they are without it."""
    model, site = moved(recipe(tiny_dino)), sites.Site("north", Drawn())
    units = [[one] for one in site.split("train")]

    def broken(some: Any) -> torch.Tensor:
        bad = torch.tensor([math.nan if one.id == "002" else 1.0 for one in some])
        return what.losses(some) * bad

    with steps(model, site, hooks=hooks) as (opened, what):
        whole = opened.clipped(units, broken)
        assert opened.way.name == ("hooks" if hooks else "loop")
    with steps(model, site, hooks=False) as (opened, what):
        less = opened.clipped(units[:2] + units[3:], what.losses)
    assert bool(less.any())
    assert torch.allclose(whole, less, atol=1e-6)
    assert_clean(model)


@pytest.mark.parametrize("hooks", [True, False])
def test_whether_a_round_begins_depends_on_no_image(tiny_dino: Path, hooks: bool) -> None:
    """Gradients are looked for, and hooks proven, with made images: black ones, all alike, are trained on as others."""
    model = moved(recipe(tiny_dino, task={"kind": "classification"}))
    seen: list[str] = []
    read = Drawn.read

    class Watched(Drawn):
        def read(self, sample: samples.Sample) -> samples.Pixels:
            seen.append(sample.id)
            return read(self, sample)

    site = sites.Site("north", Watched(loud={f"{at:03d}": 0.0 for at in range(6)}))
    with steps(model, site, hooks=hooks) as (opened, what):
        assert opened.way.name == ("hooks" if hooks else "loop")
        assert seen == []
        assert not bool(opened.clipped([[one] for one in site.split("train")], lambda some: _nothing(some)).any())
    again = dp_trainer.made(model)
    assert all(np.array_equal(a.prepared.image, b.prepared.image) for a, b in zip(what.examples, again, strict=True))


def _nothing(some: Any) -> torch.Tensor:
    """Losses that depend on nothing that trains."""
    return torch.zeros(len(some))


def test_hooks_that_cannot_be_put_in_leave_nothing(tiny_dino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.grad_sample import grad_sample_module

    def late(self: Any) -> None:
        raise RuntimeError("late")

    model, site = moved(recipe(tiny_dino)), sites.Site("north", Drawn())
    modes = [one.training for one in model.modules()]
    monkeypatch.setattr(grad_sample_module.GradSampleHooks, "enable_hooks", late)
    with pytest.raises(RuntimeError, match="late"):
        gradients.Hooks(model, work(model, site).parameters)
    assert_clean(model)
    assert [one.training for one in model.modules()] == modes
    with steps(model, site, hooks=True) as (opened, _):
        assert opened.way.name == "loop"
    assert_clean(model)


def test_class_weights_count_where_images_stand_alone(tiny_dino: Path) -> None:
    """A weighted mean over one image is unweighted; and what an image counts for depends on no other one."""
    weights, made = [1.0, 5.0], {"kind": "classification"}
    plain = adapted_model.AdaptedModel(recipe(tiny_dino, task=made)).task
    task = adapted_model.AdaptedModel(recipe(tiny_dino, task={**made, "class_weights": weights})).task
    logits, target = torch.tensor([[0.3, -1.0], [2.0, 0.1], [0.0, 0.4]]), torch.tensor([0, 1, 1])
    each = plain.losses(logits, target)
    assert torch.allclose(each.mean(), plain.loss(logits, target))
    found = task.losses(logits, target)
    assert torch.allclose(found, each * torch.tensor([1 / 3, 5 / 3, 5 / 3]))
    assert torch.equal(found[1:2], task.losses(logits[1:2], target[1:2]))
    wrong = recipe(tiny_dino, task={**made, "class_weights": [0.0, 0.0]})
    assert "class_weights: all are 0" in adapted_model.examine(wrong)[1][0]


def test_the_units_are_those_of_the_ledger(tiny_dino: Path) -> None:
    site = sites.Site("north", Drawn(count=12, each=4))
    for mechanism, unit in (("record-level", "record"), ("patient-level", "patient")):
        model = adapted_model.AdaptedModel(recipe(tiny_dino, {**PRIVACY, "mechanism": mechanism}))
        names = records.ids(unit, site.split("train"))
        assert len(dp_trainer.units_of(model, site)) == len(names)
        assert list(events.members(unit, site.split("train"))) == names


def test_what_a_round_spends() -> None:
    made = recipe("x", {**PRIVACY, "noise_multiplier": 1.1})
    event = events.event_of(made, 40)
    assert event == base.PrivacyEvent("record-level", "record", 1.1, 3 / 40, 14, 0.5)
    assert events.event_of(recipe("x", {}), 40) is None
    with pytest.raises(errors.DataError, match="no record to draw"):
        events.event_of(made, 0)
    aimed = {key: value for key, value in PRIVACY.items() if key != "noise_multiplier"}
    found = events.event_of(recipe("x", {**aimed, "epsilon": 8.0}), 40)
    longer = events.event_of(recipe("x", {**aimed, "epsilon": 8.0}, rounds=20), 40)
    assert found is not None
    assert longer is not None
    assert found.noise_multiplier < longer.noise_multiplier
    from fedvfm.privacy import accountant

    spent = accountant.epsilon(accountant.curve([longer] * 20), 1e-5).value
    assert 7.9 < spent <= 8.0
    with pytest.raises(errors.ConfigError, match="no noise reaches it"):
        events.event_of(recipe("x", {**aimed, "epsilon": 1e-3}), 40)


def test_recipes_that_would_tell_more_are_refused(tiny_dino: Path) -> None:
    for weighting in ("examples", "loss"):
        wrong = recipe(tiny_dino, aggregation={"weighting": weighting})
        assert "use weighting 'uniform'" in mechanisms.faults(wrong)[0]
        with pytest.raises(errors.ConfigError, match="neither the number of images nor a loss may leave"):
            adapted_model.AdaptedModel(wrong)
    assert "only 'patient-level' reads it" in mechanisms.faults(recipe("x", {**PRIVACY, "images_per_patient": 2}))[0]
    assert mechanisms.faults(recipe("x", {})) == []
    stacked = {"class_names": ["rest", "box"], "input_size": [56, 56], "stack": 3}
    assert "use mechanism 'patient-level'" in mechanisms.faults(recipe("x", data=stacked))[0]
    assert mechanisms.faults(recipe("x", {**PRIVACY, "mechanism": "patient-level"}, data=stacked)) == []
    with pytest.raises(errors.ConfigError, match="images_per_patient: mechanism is 'none'"):
        recipe("x", {"images_per_patient": 2})


def test_a_trial_takes_private_steps_and_full_batches(tiny_dino: Path) -> None:
    model = adapted_model.AdaptedModel(recipe(tiny_dino))
    taken = trainer.trial(model, sites.Site("north", Drawn()), steps=2)
    assert len(taken) == 2
    assert_clean(model)


def test_memory_alone_depends_on_the_microbatch(tiny_dino: Path) -> None:
    found = []
    for held in (0, 1, 4):
        model = moved(recipe(tiny_dino, {**PRIVACY, "microbatch": held}))
        site = sites.Site("north", Drawn())
        with steps(model, site, hooks=True) as (opened, what):
            found.append(opened.clipped([[one] for one in site.split("train")], what.losses))
    assert all(float(torch.linalg.vector_norm(one - found[0])) < 1e-4 * PRIVACY["clip"] for one in found)


def test_dropout_is_drawn_from_the_same_entropy(tiny_dino: Path) -> None:
    """From the run's seed, whoever knows it could tell who else was in the batch by what was dropped."""
    model = moved(recipe(tiny_dino, adapter={"dropout": 0.3}))
    with steps(model, sites.Site("north", Drawn()), hooks=True) as (opened, _):
        assert opened.way.name == "hooks"  # proven with dropout off, used with it on
    seeds: dict[bool, list[int]] = {True: [], False: []}
    part = mechanisms.get(model.recipe.privacy).site()
    assert part is not None
    optimiser = torch.optim.SGD([one for group in model.trainable(1).values() for one in group], lr=0.1)
    for simulated in (True, False, True, False):
        site = sites.Site("north", Drawn(), simulated=simulated)
        torch.manual_seed(0)
        with dp_trainer.opened(part, model, site, optimiser, 1):
            seeds[simulated].append(torch.initial_seed())
    assert seeds[True][0] == seeds[True][1] != 0
    assert len({*seeds[False], seeds[True][0], 0}) == 4
