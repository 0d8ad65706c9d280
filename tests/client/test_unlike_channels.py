"""Lacking channels between a site and its coordinator: greeting, handshake, review."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.client import recipe_review, site_file
from fedvfm.client.batch import job, spool
from fedvfm.client.readiness import check
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.protocol import protocol
from fedvfm.server.rounds import handshake
from tests.inference.test_predict_channels import nnunet
from tests.server import numpy_sites

NAMED = ["FLAIR", "T1w", "T2w"]


def locked(*optional: str) -> numpy_sites.locked_recipe.LockedRecipe:
    data = {"class_names": ["rest", "cell"], "channels": NAMED, "augment": ["channel-dropout"]}
    return numpy_sites.lock(numpy_sites.make_recipe(data={**data, "optional_channels": list(optional)}))


def hello(*lacking: str) -> protocol.Hello:
    rows = numpy_sites.manifest()
    counts = {"train": 4, "val": 1, "test": 1}
    return protocol.Hello("north", numpy_sites.SHA, rows.fingerprint, 3, counts, numpy_sites.SETTINGS, lacking=lacking)


def test_a_greeting_names_what_lacks_and_no_other_greeting_has_the_key() -> None:
    for lacking in ((), ("T1w",)):
        content = protocol.encode_hello(hello(*lacking))
        assert protocol.decode_hello(content).lacking == lacking
        assert any("lacking" in record for record in content.config_records.values()) == bool(lacking)


@pytest.mark.parametrize(
    ("optional", "lacking", "refused"),
    [
        (("T1w",), (), False),
        (("T1w",), ("T1w",), False),
        (("T1w",), ("T2w",), True),
        ((), ("T1w",), True),
        (("T1w",), ("T1w", "T1w"), True),
    ],
)
def test_only_what_the_recipe_allows_may_lack(
    optional: tuple[str, ...], lacking: tuple[str, ...], refused: bool
) -> None:
    asked = locked(*optional)
    call = handshake.RollCall(asked, rules.make(asked.recipe.aggregation), {"north"})
    if refused:
        with pytest.raises(errors.HandshakeRefused, match=r"data\.channels"):
            call.take(7, hello(*lacking))
        return
    call.take(7, hello(*lacking))
    assert call.members()["north"].lacking == lacking


def test_who_approves_is_told_that_the_names_travel() -> None:
    said = [dict(recipe_review.words(locked(*optional)))["leaves at the start"] for optional in ((), ("T1w",))]
    assert ["channels that this site lacks" in text for text in said] == [False, True]


def test_a_site_and_its_batch_job_lack_the_same(tmp_path: Path) -> None:
    """Cases of three files of which the site names two."""
    folder = nnunet(tmp_path / "set", cases="abcdefgh")
    data = {"source": "folder", "path": str(folder), "channels": {"FLAIR": "FLAIR", "T2w": "T2w"}}
    settings = schema.parse(schema.SiteConfig, {"name": "north", "data": data}, "site")
    contract = {"class_names": ["rest", "cell", "wall"], "channels": NAMED, "input_size": [16, 16]}
    values = {"backbone": {"name": "unet", "options": {"channels": [8, 16]}}, "adapter": {"kind": "full"}}
    values["data"] = {**contract, "optional_channels": ["T1w"], "augment": ["channel-dropout"]}
    asked = schema.parse(schema.Recipe, values, "recipe")
    here = site_file.hospital(settings, asked)
    assert here.lacking == sites.Site("north", here).lacking == ("T1w",)
    assert here.read(here.train[0]).absent == (1,)
    written = spool.Job(
        kind="train",
        message="ab" * 32,
        name="north",
        data=settings.data,
        splits={name: tuple(sample.id for sample in part) for name, part in here.splits.items()},
        listing=spool.listing(here.splits),
        seconds=1.0,
    )
    there = job._site(written, protocol.Task(asked), "cpu")
    assert there.lacking == ("T1w",)
    assert there.split("train") == here.train
    for optional, codes in ((["T1w"], set()), ([], {"channels"})):
        chosen = schema.parse(schema.Recipe, {**values, "data": {**values["data"], "optional_channels": optional}}, "r")
        findings = check.check(site_file.Own(settings, chosen)).findings
        assert {finding.code for finding in findings} & {"channels", "contract"} == codes
