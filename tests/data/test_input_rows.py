"""Rows of a table that a recipe takes beside the image: read, missing, out of range, and where they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import bags
from fedvfm.data import sample as samples
from fedvfm.data.sources import table as sources
from fedvfm.inference import inputs as predicted
from tests.data.test_columns import folder
from tests.tasks.test_fusion import TWO

LABELS = "id,patient,label\na,p,x\nb,q,y\n"


def recipe(kind: str = "classification", **more: Any) -> schema.Recipe:
    values = {"backbone": {"name": "unet"}, "task": {"kind": kind}, "data": {"class_names": ["x", "y"]}, "inputs": TWO}
    return schema.parse(schema.Recipe, {**values, **more}, "recipe")


def listed(root: Path, chosen: schema.Recipe, **more: Any) -> list[samples.Sample]:
    source = sources.make(schema.SourceConfig(source="folder", path=str(root)), chosen.data)
    return list(bags.of(source, chosen, **more).samples())


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("a,40.5,F\nb,,m", [(40.5, 0.0), (None, 1.0)]),
        ("a,40.5,NA", [(40.5, None), ()]),
        ("a,,\nb,3, F ", [(), (3.0, 0.0)]),
    ],
)
def test_a_row_may_be_missing_whole_or_in_part(tmp_path: Path, rows: str, expected: list[tuple[Any, ...]]) -> None:
    root = folder(tmp_path, LABELS, table=f"id,age,sex\n{rows}\nzz,1,F\n")
    found = listed(root, recipe())
    assert [sample.inputs for sample in found] == expected
    assert [sample.label for sample in found] == [0, 1]
    assert [sample.inputs for sample in listed(root, recipe(), table=False)] == [(), ()]


def test_columns_of_the_table_of_labels_do_too_beside_a_target_of_columns(tmp_path: Path) -> None:
    root = folder(tmp_path, "id,age,sex,months\na,40,F,3\nb,50,M,4\n")
    target = {"kind": "regression", "ranges": [[0, 9]], "centres": [4], "scales": [1]}
    found = listed(root, recipe(target=target, data={"class_names": ["months"]}))
    assert [(sample.values, sample.inputs) for sample in found] == [((3.0,), (40.0, 0.0)), ((4.0,), (50.0, 1.0))]


def test_a_case_has_one_row_by_its_own_name_or_its_images(tmp_path: Path) -> None:
    labels = "id,case,label\na,one,x\nb,one,x\nc,two,y\n"
    root = folder(tmp_path / "by-case", labels, "abc", table="id,age,sex\none,40,F\ntwo,,M\n")
    assert [case.inputs for case in listed(root, recipe("case-classification"))] == [(40.0, 0.0), (None, 1.0)]
    root = folder(tmp_path / "by-image", labels, "abc", table="id,age,sex\na,40,F\nb,41,F\nc,,M\n")
    with pytest.raises(errors.DataError, match="unlike rows; a case has one row"):
        listed(root, recipe("case-classification"))
    root = folder(tmp_path / "wrong", labels, "abc", table="id,age,sex\none,400,F\nc,x,M\n")
    with pytest.raises(errors.DataError) as caught:
        listed(root, recipe("case-classification"))
    assert [str(fault).split(", column")[0] for fault in caught.value.faults] == [
        "sample 'case-0001' (table.csv line 2, id 'one')",
        "sample 'case-0002' (table.csv line 3, id 'c')",
    ]


@pytest.mark.parametrize(
    ("rows", "words", "code"),
    [
        ("a,140,F", "column 'age': 140 lies outside of 0 to 120 .recipe.inputs.; check its unit", "column-range"),
        ("a,SECRET,F", "column 'age': is no number", "table"),
        ("a,nan(1),F", "column 'age': is no number", "table"),
        ("a,40,SECRET", "column 'sex': holds none of the words F, M", "column-range"),
    ],
)
def test_a_cell_that_cannot_be_meant_is_refused(tmp_path: Path, rows: str, words: str, code: str) -> None:
    root = folder(tmp_path, LABELS, table=f"id,age,sex\n{rows}\n")
    with pytest.raises(errors.DataError, match=words) as caught:
        listed(root, recipe())
    assert [fault.code for fault in caught.value.faults] == [code]
    assert "SECRET" not in str(caught.value)


def test_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, LABELS, table="id,age\na,40\n")
    with pytest.raises(errors.DataError, match=r"no column sex, which recipe.inputs names; there are: age; a site"):
        listed(root, recipe())


@pytest.mark.parametrize("tree", [False, True])
def test_a_table_whose_ids_are_of_nothing_here_is_not_taken_for_a_missing_one(tmp_path: Path, *, tree: bool) -> None:
    root = folder(tmp_path, LABELS, table="id,age,sex\na.png,40,F\nb.png,50,M\n")
    if tree:  # without a table of labels no sample has a row at all
        (root / "labels.csv").unlink()
        (root / "images").rename(root / "x")
        (root / "y").mkdir()
        (root / "x" / "b.png").rename(root / "y" / "b.png")
    words = "no column age, sex, .* in rows of what is here" if tree else "no sample has a value in age, sex"
    with pytest.raises(errors.DataError, match=f'{words}.*; compare the column id .* table = "absent"'):
        listed(root, recipe())


def test_prediction_finds_the_row_of_an_image_in_a_study_as_training_does(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("id,age,sex\none,40,F\ntwo/b,50,M\ntwo,60,M\n")
    places = {"series-001": "one/a.dcm", "series-002": "one/deep/b.dcm", "series-003": "two/b", "series-004": "x/c"}
    items = [predicted.Item(name, "dicom", tmp_path / place) for name, place in places.items()]
    known, without = predicted.rows(tmp_path, items, table, recipe().inputs)
    assert known == {"series-001": (40.0, 0.0), "series-002": (40.0, 0.0), "series-003": (50.0, 1.0)}
    assert without == ["series-004"]
