"""A hospital without labels: its file, its data, what it learns from and what it never tells."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.client import recipe_review, site_file
from fedvfm.client.batch import job, spool
from fedvfm.client.personal import personalisation
from fedvfm.client.readiness import check
from fedvfm.client.training import compute, consistency, dp_trainer, trainer
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.data import unlabelled
from fedvfm.model import adapted_model
from fedvfm.protocol import protocol
from fedvfm.tasks import base

OWN = {"threshold": 0.5, "warmup_rounds": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images and nothing else."""
    root = tmp_path_factory.mktemp("plain")
    rng = np.random.default_rng(0)
    for at in range(12):
        Image.fromarray((255 * rng.random((16, 16))).astype(np.uint8)).save(root / f"{at}.png")
    return root


def recipe(kind: str = "segmentation", **more: Any) -> schema.Recipe:
    backbone: dict[str, Any] = {"name": "unet", "options": {"channels": [4, 8]}}
    classes = {"segmentation": ["background", "liver"], "classification": ["well", "ill"]}[kind]
    values = {
        "rounds": 3,
        "backbone": backbone,
        "adapter": {"kind": "full"},
        "task": {"kind": kind},
        "data": {"class_names": classes, "input_size": [16, 16], "augment": ["flip", "noise"]},
        "unlabelled": OWN,
    }
    return schema.parse(schema.Recipe, {**values, **more}, "recipe")


def written(folder: Path, more: str = "") -> schema.SiteConfig:
    path = folder.parent / "site.toml"
    path.write_text(f'name = "north"\nrole = "unlabelled"\n{more}\n[data]\nsource = "folder"\npath = "{folder.name}"\n')
    return site_file.read_site(path)


def made(folder: Path, asked: schema.Recipe, **more: Any) -> tuple[adapted_model.AdaptedModel, sites.Site]:
    model = adapted_model.AdaptedModel(asked)
    return model, sites.Site("north", site_file.hospital(written(folder), asked), **more)


def test_images_alone_are_enough_and_test_patients_stay_apart(folder: Path) -> None:
    here = site_file.hospital(written(folder), recipe())
    assert here.without_labels
    assert 0 < len(here.train) < 12
    assert not here.val
    assert not here.test
    assert here.read(here.train[0]).mask is None
    counts = compute.counts(sites.Site("north", here), recipe())
    assert counts == {"train": len(here.train), "val": 0, "test": 0}


@pytest.mark.parametrize("kind", ["pairs", "table"])
def test_labels_that_lie_beside_the_images_are_not_looked_at(kind: str, folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "data"
    (own / "images").mkdir(parents=True)
    for at in range(4):
        (own / "images" / f"{at}.png").write_bytes((folder / f"{at}.png").read_bytes())
    if kind == "pairs":
        (own / "masks").mkdir()
        (own / "masks" / "0.png").write_bytes(b"no mask")
    else:
        rows = [f"{at},{label},p{at // 2}" for at, label in enumerate(("ill", "odd", "", "well"))]
        (own / "labels.csv").write_text("\n".join(["id,label,patient", *rows]))
    asked = recipe() if kind == "pairs" else recipe("classification")
    here = site_file.hospital(written(own), asked)
    assert {sample.label for sample in here.train} == {None}
    assert len({sample.patient for sample in here.train} - {None}) == (0 if kind == "pairs" else len(here.train) // 2)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('labelled = ["liver"]', "role = 'unlabelled' and labelled exclude each other"),
        ("[policy.final]\naccept = 'score'\nmin_score = 0.5", "need scores, and nothing is labelled here"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(folder: Path, more: str, said: str) -> None:
    with pytest.raises(errors.ConfigError, match=said):
        written(folder, more)


def test_a_recipe_must_ask_for_such_sites(folder: Path) -> None:
    with pytest.raises(errors.ConfigError, match="takes no site without labels"):
        site_file.hospital(written(folder), recipe().model_copy(update={"unlabelled": None}))
    assert "unlabelled" not in recipe().model_copy(update={"unlabelled": None}).model_dump_json()


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_a_round_learns_from_what_the_adapter_is_sure_of(folder: Path, kind: str) -> None:
    model, site = made(folder, recipe(kind))
    first = model.initial()
    update = trainer.train(model, site, first, 2)
    assert update.num_examples == len(site.split("train"))
    assert update.state.fingerprint != first.fingerprint
    assert trainer.train(model, site, first, 2).state == update.state, "drawn by seed, round and site alone"


@pytest.mark.parametrize(
    ("threshold", "least"),
    [(0.999999, {}), (0.5, {"least_units": 1000}), (0.5, {"least_steps": 1000})],
    ids=["nothing sure", "few patients", "few steps"],
)
def test_nothing_leaves_where_there_is_too_little_to_learn_from(
    folder: Path, threshold: float, least: dict[str, int]
) -> None:
    model, site = made(folder, recipe("classification", unlabelled={**OWN, "threshold": threshold}), **least)
    first = model.initial()
    update = trainer.train(model, site, first, 2)
    assert update.state.fingerprint == first.fingerprint
    assert (update.num_examples, update.metrics["steps"]) == (1, 0)
    assert "loss" not in update.metrics, "of no step there is none"


def test_steps_that_meet_nothing_sure_are_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crop may hold no pixel that the adapter is sure of: no gradient, and no learning rate to raise."""
    asked = recipe()
    still = asked.optimiser.model_copy(update={"weight_decay": 0.0})
    model, site = made(folder, asked.model_copy(update={"optimiser": still}))
    monkeypatch.setattr(type(model.task), "consistency", lambda self, logits, target: 0.0 * logits.mean(dim=(1, 2, 3)))
    first = model.initial()
    assert trainer.train(model, site, first, 2).state.fingerprint == first.fingerprint


@pytest.mark.parametrize("views", [0, 2])
def test_a_pseudo_mask_turns_with_its_image(folder: Path, views: int) -> None:
    asked = recipe()
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"views": views, "augment": ("flip",)})})
    model, site = made(folder, asked)
    taught = consistency.taught(model, site, model.initial(), 2).site
    assert taught.pseudo_masks is not None
    for sample in taught.split("train"):
        whole, mask = site.whole(model, sample), taught.pseudo_masks[sample.id]
        view = taught.example(model, sample, 0 if views else -1, ("epoch", 0)).prepared
        turned = [axes for axes in ((), (-1,), (-2,), (-2, -1)) if (np.flip(whole.image, axes) == view.image).all()]
        assert view.mask is not None
        assert [axes for axes in turned if (np.flip(mask, axes) == view.mask).all()]
        assert mask.shape == whole.image.shape[1:]


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_under_a_mechanism_what_one_image_gives_does_not_depend_on_another(folder: Path, kind: str) -> None:
    own = {"mechanism": "record-level", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}
    asked = recipe(kind, privacy=own, aggregation={"weighting": "uniform"}, unlabelled={**OWN, "threshold": 0.51})
    model, site = made(folder, asked, simulated=True)
    first, train = model.initial(), site.split("train")
    fewer = dataclasses.replace(site, hospital=dataclasses.replace(site.hospital, train=train[1:]))
    both = [consistency.taught(model, each, first, 2).site for each in (site, fewer)]
    assert [len(each.split("train")) for each in both] == [len(train), len(train) - 1], "none is left out of the draw"
    found = []
    for each in both:
        model.write(first)
        model.train()
        found.append(dp_trainer.losses(model, each, each.split("train")[-3:], 5, 10))
    assert (found[0] == found[1]).all()
    update = trainer.train(model, site, first, 2)
    assert update.metrics.get("loss") is None


@pytest.mark.parametrize("yes", [False, True])
def test_the_greeting_says_it_only_where_it_is_so(yes: bool) -> None:
    hello = protocol.Hello("north", "ab" * 32, "cd" * 32, 2, {"train": 4}, without_labels=yes)
    content = protocol.encode_hello(hello)
    assert protocol.decode_hello(content).without_labels == yes
    assert any("without_labels" in record for record in content.config_records.values()) == yes


def test_whoever_approves_reads_it() -> None:
    asked = recipe()
    assert "whether this site has labels" in recipe_review._greeting(asked)
    assert "probability of 0.5 or more" in asked.unlabelled.said  # type: ignore[union-attr]
    assert recipe_review.without_labels(asked).startswith("trains without labels")
    assert recipe_review.without_labels(asked.model_copy(update={"unlabelled": None})).startswith("REFUSES")


def test_a_batch_job_is_without_labels_too(folder: Path) -> None:
    settings, asked = written(folder), recipe()
    here = site_file.hospital(settings, asked)
    about = spool.Job(
        kind="train",
        message="ab" * 32,
        name="north",
        data=settings.data,
        without_labels=True,
        splits={name: tuple(sample.id for sample in part) for name, part in here.splits.items()},
        listing=spool.listing(here.splits),
        least_units=3,
        seconds=1.0,
    )
    there = job._site(about, protocol.Task(asked), "cpu")
    assert there.without_labels
    assert there.least_units == 3
    assert there.split("train") == here.train
    assert "without_labels" not in about.model_copy(update={"without_labels": False}).model_dump_json()


def test_the_check_asks_for_no_labels_and_makes_a_step(folder: Path) -> None:
    settings = written(folder, "[policy]\nmin_train_units = 2\nmin_steps = 1")
    found = check.check(site_file.Own(settings, recipe()))
    codes = {finding.code for finding in found.findings if finding.severity in ("blocker", "warning")}
    assert found.ready, [finding for finding in found.findings if finding.severity == "blocker"]
    assert not codes & {*check.OF_LABELS, "contract", "step-failed", "mask-missing"}
    assert found.facts["training_step"] is not None
    refused = check.check(site_file.Own(written(folder), recipe().model_copy(update={"unlabelled": None})))
    assert "contract" in {finding.code for finding in refused.findings}


def test_nothing_is_chosen_or_trained_on_for_the_site_itself(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="nothing can be trained on or chosen by here"):
        personalisation.run(tmp_path, written(folder))  # type: ignore[arg-type]


def test_a_source_without_labels_keeps_names_and_rows() -> None:
    class Rows:
        info = samples.SourceInfo("rows", "classification", ("well", "ill"), "none")

        def samples(self) -> list[samples.Sample]:
            image = samples.Sample("a", label=1)
            return [image, samples.Sample("case", label=0, images=(image,), inputs=(1.0,))]

        def read(self, sample: samples.Sample) -> samples.Pixels:
            return samples.Pixels(np.zeros((1, 2, 2), dtype=np.float32), np.ones((2, 2), dtype=np.int64))

        def row(self, sample: samples.Sample) -> dict[str, str]:
            return {"age": "70"}

    bare = unlabelled.Unlabelled(Rows())
    first, case = bare.samples()
    assert (first.label, case.label, case.images[0].label, case.inputs) == (None, None, None, (1.0,))
    assert bare.read(first).mask is None
    assert bare.row(first) == {"age": "70"}
    assert bare.info.class_names == ()
    kept = unlabelled.Unlabelled(Rows(), ["a"])
    assert kept.samples()[0].label == 1
    assert kept.read(first).mask is not None
    assert kept.info == Rows.info


def test_what_nobody_is_sure_of_is_unsure(folder: Path) -> None:
    model, site = made(folder, recipe())
    blank = consistency.untaught(model, site)
    view = blank.example(model, blank.split("train")[0], -1, ("step", 0)).prepared
    assert view.mask is not None
    assert (view.mask == base.UNSURE).all()
    assert len(trainer.trial(model, site)) == 2
