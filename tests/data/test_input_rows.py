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
