"""A hospital that labels some of the recipe's classes: what its data become, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import defect, partial_labels
from fedvfm.data import sample as data
from fedvfm.data.partition import virtual_hospitals

CLASSES = ("background", "liver", "spleen")


def recipe(kind: str = "segmentation", partial: bool = True, classes: tuple[str, ...] = CLASSES) -> schema.Recipe:
    values = {"backbone": {"name": "none"}, "task": {"kind": kind, "partial_labels": partial}}
    return schema.parse(schema.Recipe, {**values, "data": {"class_names": list(classes)}}, "recipe")


class Drawn:
    """Twelve samples of three patients a site; masks hold every class."""

    def __init__(self, kind: str = "segmentation") -> None:
        self.kind = kind
        self.info = data.SourceInfo("drawn", kind, CLASSES, "none")

    def samples(self) -> list[data.Sample]:
        labels = (lambda at: at % 3) if self.kind == "classification" else (lambda at: None)
        splits = ("train",) * 3 + ("val",) * 3 + ("test",) * 3
        return [
            data.Sample(f"{site}-{at}", labels(at), site, f"{site} {at}", split)
            for site in ("east", "west")
            for at, split in enumerate(splits)
        ]

    def read(self, sample: data.Sample) -> data.Pixels:
        mask = np.arange(9, dtype=np.int64).reshape(3, 3) % 3 if self.kind == "segmentation" else None
        return data.Pixels(np.zeros((1, 3, 3), dtype=np.float32), mask)


def test_pixels_of_a_class_that_is_not_labelled_are_not_labelled() -> None:
    source = partial_labels.declared(Drawn(), ("spleen",), recipe())
    first = source.samples()[0]
    assert first.labelled == (0, 2), "the background is always among them"
    mask = source.read(first).mask
    assert mask is not None
    assert np.unique(mask).tolist() == [0, 2]


@pytest.mark.parametrize("names", [(), CLASSES, CLASSES[1:]])
def test_all_classes_are_no_declaration(names: tuple[str, ...]) -> None:
    source = Drawn()
    assert partial_labels.declared(source, names, recipe(partial=False)) is source


@pytest.mark.parametrize(
    ("names", "made", "fault"),
    [
        (("livr",), recipe(), "nearest: 'liver'"),
        (("background",), recipe(), "at least 1 of liver, spleen"),
        (("liver",), recipe("classification"), "at least 2 of background, liver, spleen"),
        (("liver",), recipe(partial=False), "task.partial_labels = true"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(names: tuple[str, ...], made: schema.Recipe, fault: str) -> None:
    with pytest.raises(errors.ConfigError, match="labelled: ") as caught:
        partial_labels.declared(Drawn(made.task.kind), names, made)
    assert fault in str(caught.value)


def test_an_image_of_a_class_that_is_not_labelled_is_refused() -> None:
    source = partial_labels.declared(Drawn("classification"), CLASSES[1:], recipe("classification"))
    with pytest.raises(errors.DataError, match="6 samples are of background") as caught:
        source.samples()
    assert defect.of(caught.value) is defect.LABEL_NOT_DECLARED


def test_a_class_that_nobody_labels() -> None:
    some = {"east": ("liver",), "west": ("liver",)}
    assert partial_labels.nobody(recipe(), some) == ("spleen",)
    assert "no site labels spleen (east: liver; west: liver)" in partial_labels.said(recipe(), some)
    assert partial_labels.nobody(recipe(), {**some, "north": ()}) == ()
    assert partial_labels.said(recipe(), {"east": ("liver",), "west": ("spleen",)}) == ""


def test_a_recipe_without_it_keeps_its_bytes() -> None:
    assert "partial_labels" not in recipe(partial=False).model_dump_json()
    assert recipe().hash != recipe(partial=False).hash


def hidden(kind: str, **labelled: Any) -> list[virtual_hospitals.Hospital]:
    partition = schema.parse(schema.PartitionConfig, {"labelled": labelled}, "partition")
    made = virtual_hospitals.make_hospitals(Drawn(kind), partition, 0)
    return virtual_hospitals.partly_labelled(made, partition, recipe(kind))


def test_a_virtual_hospital_hides_classes() -> None:
    east, west = hidden("segmentation", east=["liver"])
    assert (east.labelled, west.labelled) == (("liver",), ())
    assert {sample.labelled for sample in (*east.train, *east.val, *east.test)} == {(0, 1)}
    assert any("labels only liver" in note for note in east.notes)
    pooled = virtual_hospitals.pooled([east, west])
    masks = [pooled.read(sample).mask for sample in (east.train[0], west.train[0])]
    assert [np.unique(np.asarray(mask)).tolist() for mask in masks] == [[0, 1], [0, 1, 2]], "each through its own site"


def test_images_of_hidden_classes_are_left_out() -> None:
    east, _ = hidden("classification", east=["liver", "spleen"])
    assert [len(part) for part in (east.train, east.val, east.test)] == [2, 2, 2]
    assert any("3 samples of other classes are left out" in note for note in east.notes)


@pytest.mark.parametrize(
    ("labelled", "fault"),
    [
        ({"east": ["liver"], "west": ["liver"]}, "no site labels spleen"),
        ({"eastern": ["liver"]}, "no such hospital; nearest: 'east'"),
        ({"east": ["kidney"]}, "is no class of the recipe"),
    ],
)
def test_a_partition_that_cannot_be_is_refused(labelled: dict[str, list[str]], fault: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        hidden("segmentation", **labelled)
    assert fault in str(caught.value)
