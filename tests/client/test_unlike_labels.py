"""A hospital's own file that says which classes it labels: its samples, its greeting, and the check of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.client import recipe_review, site_file
from fedvfm.client.batch import job, spool
from fedvfm.client.readiness import check
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.protocol import protocol

CLASSES = ["background", "liver", "spleen"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of a site that draws the liver, whose masks hold a few pixels of spleen."""
    root = tmp_path_factory.mktemp("livers")
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir()
    for at in range(8):
        mask = np.zeros((16, 16), dtype=np.uint8)
        mask[2:8, 2:8], mask[10, at] = 1, 2
        Image.fromarray((200 * rng.random((16, 16))).astype(np.uint8)).save(root / "images" / f"{at}.png")
        Image.fromarray(mask).save(root / "masks" / f"{at}.png")
    return root


def recipe(**task: Any) -> schema.Recipe:
    values = {"backbone": {"name": "unet", "options": {"channels": [8, 16]}}, "adapter": {"kind": "full"}, "task": task}
    return schema.parse(schema.Recipe, {**values, "data": {"class_names": CLASSES, "input_size": [16, 16]}}, "recipe")


def site(folder: Path, **more: Any) -> schema.SiteConfig:
    data = {"source": "folder", "path": str(folder), "options": {"class_names": CLASSES}}
    return schema.parse(schema.SiteConfig, {"name": "north", "data": data, **more}, "site")


def test_what_a_site_does_not_label_is_in_no_mask_and_no_score(folder: Path) -> None:
    asked = recipe(partial_labels=True)
    here = site_file.hospital(site(folder, labelled=["liver"]), asked)
    assert here.labelled == ("liver",)
    assert {sample.labelled for sample in (*here.train, *here.val, *here.test)} == {(0, 1)}
    mask = here.read(here.train[0]).mask
    assert mask is not None
    assert np.unique(mask).tolist() == [0, 1]


def test_without_a_word_nothing_changes(folder: Path) -> None:
    here = site_file.hospital(site(folder), recipe())
    assert here.labelled == ()
    assert here.train[0].labelled == ()


def test_a_recipe_that_does_not_ask_for_it_is_refused(folder: Path) -> None:
    with pytest.raises(errors.ConfigError, match="spleen is not labelled here"):
        site_file.hospital(site(folder, labelled=["liver"]), recipe())


@pytest.mark.parametrize("names", [(), ("liver",)])
def test_the_greeting_names_them(names: tuple[str, ...]) -> None:
    hello = protocol.Hello("north", "ab" * 32, "cd" * 32, 2, {"train": 4}, labelled=names)
    content = protocol.encode_hello(hello)
    assert protocol.decode_hello(content).labelled == names
    assert any("labelled" in record for record in content.config_records.values()) == bool(names)


@pytest.mark.parametrize("partial", [False, True])
def test_whoever_approves_reads_that_they_leave(partial: bool) -> None:
    assert ("the names of the classes" in recipe_review._greeting(recipe(partial_labels=partial))) == partial


def test_a_batch_job_has_the_same_labels(folder: Path) -> None:
    settings, asked = site(folder, labelled=["liver"]), recipe(partial_labels=True)
    here = site_file.hospital(settings, asked)
    written = spool.Job(
        kind="train",
        message="ab" * 32,
        name="north",
        data=settings.data,
        labelled=here.labelled,
        splits={name: tuple(sample.id for sample in part) for name, part in here.splits.items()},
        listing=spool.listing(here.splits),
        seconds=1.0,
    )
    there = job._site(written, protocol.Task(asked), "cpu")
    assert there.labelled == sites.Site("north", here).labelled == ("liver",)
    assert there.split("train") == here.train
    with pytest.raises(errors.DataError, match="sees other images, labels"):
        job._site(written.model_copy(update={"labelled": ()}), protocol.Task(asked), "cpu")


@pytest.mark.parametrize(("names", "code"), [(["livr"], "contract"), (["liver"], "")])
def test_the_check_knows_it(folder: Path, names: list[str], code: str) -> None:
    found = check.check(site_file.Own(site(folder, labelled=names), recipe(partial_labels=True)))
    codes = {finding.code for finding in found.findings}
    assert ("contract" in codes) == bool(code)
    assert ("class-missing" in codes) is False


def test_the_check_says_what_becomes_of_a_class_that_nobody_drew(folder: Path, tmp_path: Path) -> None:
    """The masks of a site that labels the liver alone: without its word the spleen would be background."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        for path in (folder / part).iterdir():
            pixels = np.asarray(Image.open(path))
            Image.fromarray(np.where(pixels == 2, 0, pixels) if part == "masks" else pixels).save(
                tmp_path / part / path.name
            )

    def missing(**more: Any) -> list[str]:
        made = check.check(site_file.Own(site(tmp_path, **more), recipe(partial_labels=True)))
        return [finding.remedy for finding in made.findings if finding.code == "class-missing"]

    (remedy,) = missing()
    assert "labelled in site.toml" in remedy
    assert missing(labelled=["liver"]) == []
