"""Cases of many images: what belongs together, in which order, under which names, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import bags, defect
from fedvfm.data import sample as data
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.sources import folder, layouts
from fedvfm.privacy import records
from tests.data.test_several_images import labelled, make, views
from tests.simulation import drawn_cases


class Listed:
    """A source of samples that are given."""

    info = data.SourceInfo("listed", "classification", ("plain", "spot"), "CC0")

    def __init__(self, samples: Sequence[data.Sample]) -> None:
        self._samples = tuple(samples)

    def samples(self) -> Sequence[data.Sample]:
        return self._samples

    def read(self, sample: data.Sample) -> data.Pixels:
        return data.Pixels(np.zeros((1, 4, 4), dtype=np.float32))


def _of(path: Path, **options: Any) -> bags.Bags:
    made = bags.Bags(make(path, **options))
    assert isinstance(made, bags.Bags)
    return made


def test_slices_of_a_volume_are_one_case(tmp_path: Path) -> None:
    source = _of(drawn_cases.volumes(tmp_path, ("east",)))
    first, second = source.samples()[:2]
    assert (first.id, first.label, first.patient, first.site, first.split) == (
        "image-0001",
        0,
        "patient-0001",
        "east",
        "train",
    )
    assert [len(one.images) for one in (first, second)] == [4, 5]
    assert [one.part.index for one in first.images if one.part] == [0, 1, 2, 3]
    assert source.stable(first) == ("case east-0", "p east 0")
    assert source.stable(first.images[2]) == ("east-0 2", "p east 0")
    assert source.read(first.images[0]).image.shape == (1, 30, 30)
    with pytest.raises(errors.DataError, match="is a case of 4 images"):
        source.read(first)


def test_a_folder_of_pictures_is_a_case_in_the_order_of_numbers(tmp_path: Path) -> None:
    source = _of(drawn_cases.pictures(tmp_path, ("east",)), ids="names")
    first = source.samples()[0]
    assert first.id == "east-0"
    assert [one.id for one in first.images] == [f"east-0/view-{at}" for at in range(1, 12)]
    hidden = _of(tmp_path).samples()[0]
    assert (hidden.id, hidden.images[0].id, hidden.patient) == ("case-0001", "image-0001", "patient-0001")


@pytest.mark.parametrize("table", ["index.csv", "labels.csv"])
def test_a_column_says_which_images_are_one_case(tmp_path: Path, table: str) -> None:
    (tmp_path / "images").mkdir()
    rows = []
    for name in ("a-10", "a-9", "b-1", "c-1"):
        Image.fromarray(np.full((6, 6), 7, dtype=np.uint8)).save(tmp_path / "images" / f"{name}.png")
        case = name.partition("-")[0]
        rows.append({"id": name, "label": "spot" if case == "a" else "plain", "case": case, "patient": f"p{case}"})
    drawn_cases.table(tmp_path / table, rows)
    found = {one.id: one for one in _of(tmp_path, ids="names").samples()}
    assert sorted(found) == ["a", "b", "c"]
    assert [one.id for one in found["a"].images] == ["a-9", "a-10"], "numbers count by their value"
    assert (found["a"].label, found["a"].patient) == (1, "pa"), "labels.csv says patients as index.csv does"
    without = make(tmp_path, ids="names").samples()
    assert len(without) == 4, "for other tasks every image is a sample"


def test_a_case_is_of_one_patient_where_nobody_says_whose_it_is(tmp_path: Path) -> None:
    drawn_cases.volumes(tmp_path, ("east",))
    rows = [{"id": f"east-{at}", "label": "plain" if at < 4 else "spot", "case": f"c{at // 2}"} for at in range(8)]
    drawn_cases.table(tmp_path / "index.csv", rows)
    source = _of(tmp_path, ids="names")
    assert [(one.id, one.patient, len(one.images)) for one in source.samples()] == [
        (f"c{at}", f"c{at}", 9) for at in range(4)
    ]
    assert source.stable(source.samples()[0]) == ("case c0", "c0")


def test_a_column_case_that_is_not_read_is_a_fault(tmp_path: Path) -> None:
    drawn_cases.volumes(tmp_path, ("east",))
    drawn_cases.table(tmp_path / "labels.csv", [{"id": f"east-{at}", "case": "a"} for at in range(8)])
    with pytest.raises(errors.DataError, match=r"labels\.csv: has a column case, but index\.csv is read"):
        make(tmp_path)


@pytest.mark.parametrize("column", ["patient", "split", "site"])
def test_a_column_beside_the_labels_is_not_lost_because_of_another_table(tmp_path: Path, column: str) -> None:
    """Images that the table of labels keeps for testing would be trained on, and nobody told."""
    drawn_cases.volumes(tmp_path, ("east",))
    said = ["test" if at < 3 else "train" for at in range(8)]
    drawn_cases.table(tmp_path / "labels.csv", [{"id": f"east-{at}", column: cell} for at, cell in enumerate(said)])
    drawn_cases.table(tmp_path / "index.csv", [{"id": f"east-{at}", "label": "ab"[at % 2]} for at in range(8)])
    with pytest.raises(errors.DataError, match=rf"labels\.csv: has a column {column}, but index\.csv is read"):
        make(tmp_path)
    rows = [{"id": f"east-{at}", "label": "ab"[at % 2], column: cell} for at, cell in enumerate(said)]
    drawn_cases.table(tmp_path / "index.csv", rows)
    assert make(tmp_path).samples(), "both say the same"
    drawn_cases.table(tmp_path / "index.csv", [*rows[:-1], {**rows[-1], column: "val"}])
    with pytest.raises(errors.DataError, match=rf"has a column {column}"):
        make(tmp_path)


def test_views_of_a_study_are_one_case(tmp_path: Path) -> None:
    views(tmp_path / "studies" / "a", (12, 9), (10, 14))
    views(tmp_path / "studies" / "b", (12, 9))
    first, second = _of(labelled(tmp_path), ids="names").samples()
    assert [one.id for one in first.images] == ["a/1", "a/2"]
    assert [len(one.images) for one in (first, second)] == [2, 1]
    assert _of(tmp_path).stable(_of(tmp_path).samples()[0]) == ("case a", "a")


@pytest.mark.parametrize("key", bags.SHARED)
def test_images_of_a_case_must_agree(key: str) -> None:
    first = data.Sample("a", 0, "east", "p", "train", case="one")
    other = dataclasses.replace(first, id="b", **{key: 1 if key == "label" else "test"})
    with pytest.raises(errors.DataError, match=f"unlike {bags.SHARED[key]}s") as caught:
        bags.Bags(Listed([first, other]))
    assert caught.value.faults[0].code == defect.CASE_MIXED


def test_a_case_without_images_and_a_row_without_a_case_are_faults(tmp_path: Path) -> None:
    drawn_cases.pictures(tmp_path, ("east",), images=1)
    (tmp_path / "cases" / "east-1" / "view-1.png").unlink()
    (tmp_path / "cases" / "east-2" / "view-1.png").rename(tmp_path / "cases" / "loose.png")
    (tmp_path / "cases" / "east-2").rmdir()
    with pytest.raises(errors.DataError) as caught:
        make(tmp_path)
    assert {fault.code for fault in caught.value.faults} == {defect.CASE_EMPTY, defect.TABLE}
    faults: list[str] = []
    source = folder.Folder.tolerant(schema.SourceConfig(source="folder", path=str(tmp_path)), faults)
    assert any("loose.png: an image beside" in text for text in source.left)


def test_pooled_hospitals_know_the_images_of_their_cases(tmp_path: Path) -> None:
    source = _of(drawn_cases.volumes(tmp_path, ("east", "west")))
    made = virtual_hospitals.make_hospitals(source, schema.PartitionConfig(kind="natural"), 0)
    together = virtual_hospitals.pooled(made)
    case = together.train[0]
    assert len(together.train) == 8
    assert together.read(case.images[0]).image.shape == (1, 30, 30)


def test_a_budget_is_charged_for_the_case_and_for_its_images(tmp_path: Path) -> None:
    source = _of(drawn_cases.volumes(tmp_path, ("east",)))
    own = source.samples()[:1]
    assert records.ids("record", own, source) == ["sample case east-0"]
    assert records.charged("record", own, source) == [
        "sample case east-0",
        *(f"sample east-0 {at}" for at in range(4)),
    ]
    assert "patient p east 0" in records.charged("patient", own, source)
    assert records.charged("site", own, source) == ["site"]


def test_names_sort_by_their_numbers() -> None:
    names = ["s10", "s9", "s9b", "s1", "t", "s" + "9" * 40]
    assert sorted(names, key=layouts.natural) == ["s1", "s9", "s9b", "s10", "s" + "9" * 40, "t"]
