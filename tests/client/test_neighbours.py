"""One image more or less at a hospital's real folder: it changes what its own presence does, and nothing else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.client import privacy_planning, privacy_report, recipe_review, site_file
from fedvfm.client.gate import privacy_charge
from fedvfm.client.readiness import check
from fedvfm.client.training import dp_trainer
from fedvfm.client.training import site as sites
from fedvfm.config import privacy as privacy_config
from fedvfm.config import schema
from fedvfm.privacy import base, events, randomness
from fedvfm.tasks import segmentation

PRIVACY = {"mechanism": "record-level", "clip": 1.0, "noise_multiplier": 1.1, "delta": 1e-5}
BUDGET = {"data_set": "discs", "epsilon": 8.0, "delta": 1e-5, "unit": "record"}
Make = Callable[..., schema.SiteConfig]


def recipe(privacy: dict[str, Any] | None = None, **task: Any) -> schema.Recipe:
    values = {
        "backbone": {"name": "dinov2"},
        "data": {"class_names": ["background", "disc"], "input_size": [28, 28], "augment": ["flip", "intensity"]},
        "rounds": 3,
        "task": {"kind": "segmentation", **task},
        "optimiser": {"batch_size": 5},
        "aggregation": {"weighting": "uniform"},
        "privacy": PRIVACY if privacy is None else privacy,
    }
    return schema.parse(schema.Recipe, values, "recipe")


def add(folder: Path, *names: str) -> None:
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = np.random.default_rng(int.from_bytes(name.encode()[-4:], "big")).integers(0, 255, (28, 28))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{name}.png")
        Image.fromarray((pixels > 128).astype(np.uint8)).save(folder / "masks" / f"{name}.png")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """The site's file as it is read; its folder has forty images."""
    add(tmp_path / "data", *(f"scan-{number:02d}" for number in range(40)))

    def made(budget: dict[str, Any] | None = BUDGET, **more: Any) -> schema.SiteConfig:
        data = {"source": "folder", "path": str(tmp_path / "data")}
        values = {"name": "north", "data": data, **({"privacy": budget} if budget else {}), **more}
        return schema.parse(schema.SiteConfig, values, "site")

    return made


def named(site: schema.SiteConfig, asked: schema.Recipe) -> dict[str, str]:
    """File name -> split."""
    hospital = site_file.hospital(site, asked)
    name: Any = hospital.source.stable  # type: ignore[attr-defined]
    return {name(one)[0]: split for split, members in hospital.splits.items() for one in members}


def test_one_image_more_or_less_moves_no_other_between_train_and_test(make: Make, tmp_path: Path) -> None:
    site, plain = make(), make(budget=None)
    before, without = named(site, recipe()), named(plain, recipe())
    assert set(before.values()) == {"train", "val", "test"}
    add(tmp_path / "data", "a-new-one")
    after = named(site, recipe())
    assert {name: after[name] for name in before} == before
    assert len(after) == 41
    later = named(plain, recipe())
    assert {name: later[name] for name in without} != without, "what a drawing of all together does"
    for part in ("images", "masks"):
        (tmp_path / "data" / part / "scan-07.png").unlink()
    gone = named(site, recipe())
    assert gone == {name: after[name] for name in after if name != "scan-07 0"}


def test_patients_stay_together_shares_hold_about_and_the_seed_draws(make: Make, tmp_path: Path) -> None:
    add(tmp_path / "data", *(f"more-{number:03d}" for number in range(60)))
    names = [f"scan-{number:02d}" for number in range(40)] + [f"more-{number:03d}" for number in range(60)]
    table = tmp_path / "data" / "patients.csv"
    rows = [f"{name},p{at % 25}" for at, name in enumerate(names)]
    table.write_text("\n".join(["id,patient", *rows]) + "\n")
    found = named(make(), recipe())
    for at, name in enumerate(names):
        assert found[f"{name} 0"] == found[f"{names[at % 25]} 0"]
    assert found != named(make(split={"seed": 1}), recipe())
    given = [("val", "train", "test")[at % 25 % 3] for at in range(len(names))]
    table.write_text("\n".join(["id,patient,split", *(",".join(one) for one in zip(rows, given, strict=True))]) + "\n")
    assert named(make(), recipe()) == {f"{name} 0": part for name, part in zip(names, given, strict=True)}
    table.unlink()
    shares = list(named(make(split={"val_share": 0.3, "test_share": 0.3}), recipe()).values())
    assert all(18 <= shares.count(part) <= 42 for part in ("val", "test"))
    widened = named(make(split={"val_share": 0.15, "test_share": 0.4}), recipe())
    narrow = named(make(split={"val_share": 0.15, "test_share": 0.2}), recipe())
    assert all(widened[name] == "test" for name in narrow if narrow[name] == "test")


def test_a_part_that_chance_left_empty_says_what_helps(make: Make, tmp_path: Path) -> None:
    with pytest.raises(errors.DataError, match=r"no test sample. With \[privacy\] .* its 40 patients .*split.seed"):
        site_file.hospital(make(split={"val_share": 0.0, "test_share": 0.000001}), recipe())
    assert site_file.hospital(make(budget=None, split={"val_share": 0.0, "test_share": 0.1}), recipe()).test


def test_no_share_for_testing_is_no_bad_luck(make: Make, tmp_path: Path) -> None:
    none = {"test_share": 0, "val_share": 0.2}
    with pytest.raises(
        errors.DataError, match=r"split.test_share = 0, and with \[privacy\] no patient .* raise"
    ) as caught:
        site_file.hospital(make(split=none), recipe())
    assert "seed" not in str(caught.value), "no other seed helps"
    file = written(tmp_path, "[split]\ntest_share = 0\n")
    (found,) = [one for one in check.check(file).findings if one.code == "no-test-sample"]
    assert (found.severity, "split.test_share = 0" in found.problem) == ("blocker", True)
    assert "raise split.test_share" in found.remedy
    hospital = site_file.hospital(make(split={"val_share": 0}), recipe())
    assert (hospital.val, bool(hospital.train), bool(hospital.test)) == ((), True, True), "nothing needs validation"
    names = [f"scan-{number:02d}" for number in range(40)]
    rows = [f"{name},{name},{'test' if at < 9 else 'train'}" for at, name in enumerate(names)]
    (tmp_path / "data" / "patients.csv").write_text("\n".join(["id,patient,split", *rows]) + "\n")
    assert len(site_file.hospital(make(split=none), recipe()).test) == 9, "the data says it; shares count for nothing"


@pytest.mark.parametrize("budget", [None, BUDGET])
def test_a_patient_in_two_splits_is_never_trained_on(make: Make, tmp_path: Path, budget: dict[str, Any] | None) -> None:
    """Folds of a datalist that cut patients apart: no table is there whose rows would be refused."""

    def written_list(tested: int) -> None:
        entries = [
            {"image": f"images/scan-{at:02d}.png", "label": f"masks/scan-{at:02d}.png", "patient": f"smith-{at // 2}"}
            for at in range(40)
        ]
        folds = [{**one, "fold": int(at >= tested)} for at, one in enumerate(entries)]
        listed = {"labels": {"0": "background", "1": "disc"}, "training": folds}
        (tmp_path / "data" / "dataset.json").write_text(json.dumps(listed))

    data = {"source": "folder", "path": str(tmp_path / "data"), "options": {"layout": "datalist", "fold": 0}}
    site = make(budget=budget, data=data)
    written_list(11)
    said = "1 patient has images in train and test; .* Keep each patient in one split"
    with pytest.raises(errors.PartitionError, match=said) as caught:
        site_file.hospital(site, recipe())
    assert "smith" not in str(caught.value), "whose images they are is for the list of files alone"
    with pytest.raises(errors.PartitionError, match=said):
        privacy_planning._train(recipe(), site)
    written_list(10)
    hospital = site_file.hospital(site, recipe())
    assert (len(hospital.train), len(hospital.test)) == (30, 10)


def written(folder: Path, more: str = "") -> Path:
    """The site's file on disk."""
    text = f'name = "north"\n[data]\nsource = "folder"\npath = "{folder / "data"}"\n{more}[privacy]\n'
    text += "".join(f"{key} = {value!r}\n" for key, value in BUDGET.items()).replace("'", '"')
    (folder / "site.toml").write_text(text)
    return folder / "site.toml"


def test_check_plan_and_training_see_one_split(make: Make, tmp_path: Path) -> None:
    written(tmp_path)
    hospital = site_file.hospital(make(), recipe())
    seen = check.check(tmp_path / "site.toml").seen
    assert seen is not None
    ids = [one.id for one in seen.samples]
    for part in ("train", "val", "test"):
        assert {ids[number - 1] for number in seen.splits[part]} == {one.id for one in hospital.splits[part]}
    units, names, _ = privacy_planning._units(recipe(), site_file.read_site(tmp_path / "site.toml"), {})
    assert (units, names) == (len(hospital.train), privacy_charge.names(recipe(), hospital))


# -- views -------------------------------------------------------------------------------------------------------------


def views(site: schema.SiteConfig, asked: schema.Recipe, view: int) -> dict[str, list[Any]]:
    """File name -> pixels, mask and prompts as a step takes them."""
    hospital = site_file.hospital(site, asked)
    node = sites.Site("north", hospital)
    model: Any = SimpleNamespace(
        recipe=asked,
        backbone=SimpleNamespace(patch=14, sha256="", config_sha256=""),
        frozen_blocks=0,
        taps=(),
        device="cpu",
    )
    found = {}
    for one in hospital.train:
        made = node.example(model, one, view, ("step", 3))
        drawn = [] if made.prompts is None else [made.prompts.boxes, made.prompts.points]
        arrays = [made.prepared.image, made.prepared.mask, *drawn]
        found[hospital.source.stable(one)[0]] = [None if array is None else array.tolist() for array in arrays]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("view", [-1, 0])
def test_one_image_more_gives_no_other_one_another_view(make: Make, tmp_path: Path, view: int) -> None:
    asked = recipe(prompt="box")
    before = views(make(), asked, view)
    add(tmp_path / "data", "a-new-one")
    after = views(make(), asked, view)
    assert {name: after[name] for name in before} == before
    assert asked.task.oracle


# -- how many there are ------------------------------------------------------------------------------------------------


class Noted:
    """A mechanism's part at a site that notes what a round is made from."""

    def __init__(self) -> None:
        self.events: list[base.PrivacyEvent] = []

    @contextlib.contextmanager
    def prepare(
        self, work: base.Work, asked: schema.Recipe, event: base.PrivacyEvent, draws: randomness.Draws
    ) -> Iterator[Any]:
        self.events.append(event)
        yield None


def trained(hospital: Any, asked: schema.Recipe, units: int) -> base.PrivacyEvent:
    part, model = Noted(), SimpleNamespace(recipe=asked, task=segmentation.Segmentation(asked))
    node = sites.Site("north", hospital, simulated=True, units=units)
    optimiser = SimpleNamespace(param_groups=[])
    with dp_trainer.opened(part, model, node, optimiser, 1):  # type: ignore[arg-type]
        return part.events[0]


@pytest.mark.parametrize("aim", [{}, {"epsilon": 4.0}])
def test_from_a_public_number_a_round_is_the_same_whoever_is_there(
    make: Make, tmp_path: Path, aim: dict[str, float]
) -> None:
    privacy = {**PRIVACY, **aim}
    asked = recipe({key: value for key, value in privacy.items() if not (aim and key == "noise_multiplier")})
    site, found = make(budget={**BUDGET, "units": 26}), []
    for new in ("a-new-one", "one-more", "and-one-more", "the-last-one"):
        hospital = site_file.hospital(site, asked)
        account = privacy_charge.account(asked, 1, "ab" * 32, hospital, _at(site, tmp_path / new), [])
        seen = privacy_report.look(asked, hospital, site.privacy)
        assert seen is not None
        event = trained(hospital, asked, 26)
        assert account.claim.event == event == events.event_of(asked, 26)
        assert (seen.noise_multiplier, seen.sample_rate, seen.steps) == (event.noise_multiplier, 5 / 26, 6)
        assert (seen.units, seen.public) == (len(hospital.train), 26)
        assert len(account.claim.names) == len(hospital.train), "charged to those that are there"
        assert privacy_charge.counted(asked, hospital, site.privacy) == 26
        assert "counted as 26, each drawn" in privacy_report.words(seen)[0]
        found.append((len(hospital.train), event))
        add(tmp_path / "data", new, f"{new}-too", f"{new}-three")
    assert len({count for count, _ in found}) > 1
    assert len({event for _, event in found}) == 1


def _at(site: schema.SiteConfig, folder: Path) -> privacy_config.Budget:
    assert site.privacy is not None
    return site.privacy.model_copy(update={"ledger": str(folder)})


def test_without_one_it_is_said_that_the_number_is_public(make: Make) -> None:
    asked, site = recipe(), make()
    hospital = site_file.hospital(site, asked)
    event = trained(hospital, asked, 0)
    assert event == events.event_of(asked, len(hospital.train))
    found = privacy_report.look(asked, hospital, site.privacy)
    assert found is not None
    assert "about how many records there are is taken as public" in "\n".join(privacy_report.words(found))
    said = recipe_review._privacy(asked)
    assert "It hides what one record adds, not about how many there are, unless [privacy]" in said


def test_a_public_number_is_of_records_and_patients(make: Make) -> None:
    with pytest.raises(errors.ConfigError, match="units: only with unit = 'record' or 'patient'"):
        make(budget={**BUDGET, "unit": "site", "units": 3})
    with pytest.raises(errors.ConfigError, match="units"):
        make(budget={**BUDGET, "units": 0})
    assert events.counted(7, "patient", make(budget={**BUDGET, "units": 3}).privacy) == 7, "of another unit"
    assert events.counted(0, "record", make(budget={**BUDGET, "units": 3}).privacy) == 0, "nothing to train on"
