"""A hospital that lacks channels of the recipe: named files, black channels that stay black, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import channels, transforms
from fedvfm.data import sample as data
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.sources import table
from tests.data.test_augmentation import both, prepared
from tests.inference.test_predict_channels import nnunet

NAMED = ("FLAIR", "T1w", "T2w")
OURS = {"class_names": ["rest", "cell", "wall"], "channels": list(NAMED), "input_size": [24, 24]}


def contract(*optional: str, **more: Any) -> schema.DataContract:
    values = {**OURS, "optional_channels": list(optional), "augment": ["channel-dropout"], **more}
    return schema.parse(schema.DataContract, values, "data")


def source(folder: Path, named: dict[str, Any], asked: schema.DataContract) -> data.Source:
    values = {"source": "folder", "path": str(folder), "options": {"ids": "names"}, "channels": named}
    return table.make(schema.parse(schema.SourceConfig, values, "data"), asked)


def test_files_are_found_by_name_and_what_is_not_named_is_black(tmp_path: Path) -> None:
    folder, asked = nnunet(tmp_path / "set"), contract("T1w")
    whole = source(folder, {}, asked)
    some = source(folder, {"T2w": "T2W", "FLAIR": 0}, asked)
    for sample in some.samples():
        full, less = whole.read(sample), some.read(sample)
        assert (full.absent, less.absent) == ((), (1,))
        assert not less.image[1].any()
        np.testing.assert_array_equal(less.image[[0, 2]], full.image[[0, 2]])
    turned = nnunet(tmp_path / "turned")
    text = (turned / "dataset.json").read_text()
    (turned / "dataset.json").write_text(text.replace("FLAIR", "dark fluid").replace("T1w", "FLAIR"))
    right = source(turned, {"FLAIR": "flair", "T2w": "T2w"}, asked)
    assert right.read(right.samples()[0]).absent == (1,)
    for named in ({"FLAIR": 0, "T1w": 1, "T2w": 2}, {}):
        with pytest.raises(errors.DataError, match=r"file 1 is FLAIR, and it is taken for the recipe's T1w"):
            source(turned, named, asked)


def test_a_grey_picture_saved_in_colour_is_one_channel_and_one_in_colour_is_none(tmp_path: Path) -> None:
    for at in range(3):
        (tmp_path / "imagesTr").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (40 + 40 * at,) * 3).save(tmp_path / "imagesTr" / f"a_{at:04d}.png")
    (tmp_path / "labelsTr").mkdir()
    Image.new("L", (32, 32), 1).save(tmp_path / "labelsTr" / "a.png")
    names = {str(at): name for at, name in enumerate(NAMED)}
    labels = {"rest": 0, "cell": 1, "wall": 2}
    (tmp_path / "dataset.json").write_text(
        json.dumps({"channel_names": names, "labels": labels, "file_ending": ".png"})
    )
    for named, shown in (({}, [40, 80, 120]), ({"FLAIR": 0, "T2w": "T2w"}, [40, 0, 120])):
        some = source(tmp_path, named, contract("T1w"))
        assert (255 * some.read(some.samples()[0]).image[:, 0, 0]).round().tolist() == shown
    Image.new("RGB", (32, 32), (1, 2, 3)).save(tmp_path / "imagesTr" / "a_0002.png")
    some = source(tmp_path, {"FLAIR": 0, "T2w": 2}, contract("T1w"))
    with pytest.raises(errors.DataError, match=r"a_0002\.png: in colour, and one of several files"):
        some.read(some.samples()[0])


@pytest.mark.parametrize(
    ("named", "fault"),
    [
        (
            {"FLAIR": 0, "T2w": 2, "T1": 1},
            "data.channels.T1: no channel of the recipe; it has FLAIR, T1w, T2w; nearest",
        ),
        ({"FLAIR": "flare", "T2w": 2}, "data.channels.FLAIR = 'flare': no channel of the data; it has FLAIR, T1w, T2w"),
        ({"FLAIR": 0, "T2w": 0}, "FLAIR and T2w are both file 0"),
        ({"FLAIR": 0, "T1w": 1}, "channel T2w is lacking, and recipe.data.optional_channels allows T1w"),
        ({"FLAIR": 2, "T2w": 0}, "dataset.json: the channels taken are T2w, FLAIR"),
    ],
)
def test_what_does_not_fit_is_refused_before_an_image_is_read(
    tmp_path: Path, named: dict[str, Any], fault: str
) -> None:
    with pytest.raises(errors.DataError) as caught:
        source(nnunet(tmp_path / "set", cases="a"), named, contract("T1w"))
    assert fault in str(caught.value)


def test_a_name_that_two_channels_of_the_data_have_is_refused(tmp_path: Path) -> None:
    folder = nnunet(tmp_path / "set", cases="a")
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace("T2w", "t1W"))
    with pytest.raises(errors.DataError, match="several channels of the data have this name"):
        source(folder, {"FLAIR": 0, "T1w": "T1w"}, contract("T2w"))


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"optional_channels": ["T1"]}, "optional_channels: T1; name some of channels"),
        ({"augment": ["mirror"]}, "add channel-dropout to augment"),
    ],
)
def test_a_recipe_that_lets_a_channel_lack_trains_for_it(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(errors.ConfigError, match=fault):
        contract(**{"optional_channels": ["T1w"], **values})
    assert "optional_channels" not in contract().model_dump_json()


def test_every_channel_cannot_lack_and_other_sources_read_no_names() -> None:
    everything = channels.lacking_faults(NAMED, contract(*NAMED))
    assert [fault.partition(",")[0] for fault in everything] == ["every channel of the recipe is lacking"]
    named = schema.parse(schema.SourceConfig, {"source": "brain-mri", "channels": {"FLAIR": 0}}, "data")
    for read in (table.make, lambda source: table.survey(source, [])):
        with pytest.raises(errors.ConfigError, match="source 'brain-mri' does not read it"):
            read(named)


def test_intensities_are_those_of_what_is_there_and_an_absent_channel_is_black() -> None:
    rng = np.random.default_rng(1)
    image = (0.5 + 0.4 * rng.random((3, 24, 24))).astype(np.float32)
    asked = contract("T1w")
    less = transforms.prepare(channels.blackened(data.Pixels(image), (1,)), asked, 3)
    assert (less.absent, less.image[1].any()) == ((1,), False)
    alone = transforms.stretch(image[[0, 2]])
    np.testing.assert_array_equal(less.image[[0, 2]], alone)
    windowed = contract("T1w", window=[10.0, 20.0], intensity="none")
    units = dataclasses.replace(channels.blackened(data.Pixels(image), (1,)), units=(-5.0, 30.0))
    shown = transforms.prepare(units, windowed, 3).image
    assert not shown[1].any(), "0 is a value within this window, and no value is black"
    assert shown[0].any()


def test_a_view_keeps_it_black_on_both_ways_and_is_never_all_black() -> None:
    asked, dropped = contract("T1w", augment=["mirror", "intensity", "invert", "channel-dropout"]), set()
    for absent in ((1,), (0, 2)):
        base = dataclasses.replace(prepared(), absent=absent)
        base.image[list(absent)] = 0.0
        for seed in range(24):
            numpy, there, left = both(base, asked, seed)
            assert left[0] == left[1]
            np.testing.assert_allclose(there.image.numpy(), numpy.image, rtol=1e-5, atol=1e-6)
            dark = tuple(at for at in range(3) if not numpy.image[at].any())
            assert set(absent) <= set(dark)
            assert len(dark) < 3
            dropped.add(dark)
    assert dropped == {(1,), (0, 1), (1, 2), (0, 2)}


def test_what_a_simulation_hides_is_what_a_hospital_lacks(tmp_path: Path) -> None:
    asked = contract("T1w")
    here = source(nnunet(tmp_path / "set"), {"T2w": "T2w", "FLAIR": "FLAIR"}, asked)
    partition = schema.PartitionConfig(kind="iid", sites=1, lacking={"site-0": ("T1w",)})
    made = virtual_hospitals.make_hospitals(source(tmp_path / "set", {}, asked), partition, 0)
    partition = partition.model_copy(update={"lacking": {made[0].name: ("T1w",)}})
    with pytest.raises(errors.ConfigError, match="every site lacks channel T1w"):
        virtual_hospitals.without_channels(made, partition, asked)
    other = dataclasses.replace(made[0], name="other")
    hidden, full = virtual_hospitals.without_channels([*made, other], partition, asked)
    assert (hidden.lacking, full.lacking, sites.Site("here", hidden).lacking) == (("T1w",), (), ("T1w",))
    assert "lacks channel T1w" in hidden.notes[-1]
    for sample in here.samples():
        one, two = here.read(sample), hidden.read(sample)
        assert one.absent == two.absent
        np.testing.assert_array_equal(one.image, two.image)
    for lacking, fault in (({"nowhere": ("T1w",)}, "no such hospital"), ({"other": ("T2w",)}, "allows T1w")):
        asked_for = partition.model_copy(update={"lacking": lacking})
        with pytest.raises(errors.ConfigError, match=fault):
            virtual_hospitals.without_channels([*made, other], asked_for, asked)


def test_a_hospital_says_what_it_lacks() -> None:
    values = {"source": "folder", "path": ".", "channels": {"FLAIR": 0, "T2w": 1}}
    settings = schema.parse(schema.SourceConfig, values, "data")
    assert channels.lacking(contract("T1w"), settings) == ("T1w",)
    assert channels.lacking(contract("T1w"), settings.model_copy(update={"channels": {}})) == ()
