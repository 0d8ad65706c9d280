"""Columns of a hospital's table as a recipe's target declares them: read, missing, out of range, where they stand."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import bags, columns, labels
from fedvfm.data import sample as samples
from fedvfm.data.readiness import duplicates
from fedvfm.data.sources import table as sources

AGE = {"kind": "regression", "ranges": [[0.0, 120.0]], "centres": [60.0], "scales": [15.0]}


def folder(root: Path, text: str, names: str = "ab", **tables: str) -> Path:
    (root / "images").mkdir(parents=True)
    for name in names:
        Image.fromarray(np.full((8, 8), 90, np.uint8)).save(root / "images" / f"{name}.png")
    (root / "labels.csv").write_text(text)
    for name, rows in tables.items():
        (root / f"{name}.csv").write_text(rows)
    return root


def recipe(target: dict[str, Any], *names: str, kind: str = "classification") -> schema.Recipe:
    values = {
        "backbone": {"name": "unet"},
        "task": {"kind": kind},
        "target": target,
        "data": {"class_names": list(names)},
    }
    return schema.parse(schema.Recipe, values, "recipe")


def listed(root: Path, chosen: schema.Recipe) -> list[samples.Sample]:
    source = sources.make(schema.SourceConfig(source="folder", path=str(root)), chosen.data)
    assert labels.faults(chosen, source.info) == []
    return list(bags.of(source, chosen).samples())


def test_columns_of_labels_csv_are_values(tmp_path: Path) -> None:
    root = folder(tmp_path, "id,patient,oedema,mass\na,p,1,0\nb,q,,1\n")
    found = listed(root, recipe({"kind": "multi-label"}, "mass", "oedema"))
    assert [sample.values for sample in found] == [(0.0, 1.0), (1.0, None)]
    assert [sample.label for sample in found] == [None, None]
    assert found[0].truth == (0.0, 1.0)
    assert len({sample.patient for sample in found}) == 2


def test_columns_may_stand_beside_labels_and_in_any_table(tmp_path: Path) -> None:
    root = folder(tmp_path, "id,label\na,x\nb,y\n", patients="id,patient,age\na,p,40.5\nb,q,NA\n", names="ab")
    (root / "labels.csv").write_text("id,label,age2\na,x,1\nb,y,2\n")
    two = recipe({**AGE, "ranges": [[0, 120]] * 2, "centres": [60, 60], "scales": [9, 9]}, "age", "age2")
    assert [sample.values for sample in listed(root, two)] == [(40.5, 1.0), (None, 2.0)]


@pytest.mark.parametrize(
    ("rows", "words", "code"),
    [
        ("a,140\nb,3", "column 'age': 140 lies outside of 0 to 120", "column-range"),
        ("a,1\nb,inf", r"'image-0002' \(labels\.csv line 3, id 'b'\), column 'age': is no number", "table"),
        ("a,inf\nb,3", "is no number", "table"),
        ("a,SECRET\nb,3", "is no number", "table"),
        ("a,1_5\nb,3", "is no number", "table"),
        ("a,12,5\nb,3", "line 2: more cells than the 2 columns; write decimals with a point", "table"),
        ("a,\nb,3", r"'image-0001' \(labels\.csv line 2, id 'a'\): no value in age", "label-missing"),
    ],
)
def test_a_cell_that_cannot_be_meant_is_refused(tmp_path: Path, rows: str, words: str, code: str) -> None:
    root = folder(tmp_path, f"id,age\n{rows}\n")
    with pytest.raises(errors.DataError, match=words) as caught:
        listed(root, recipe(AGE, "age"))
    assert [fault.code for fault in caught.value.faults] == [code]
    assert "SECRET" not in str(caught.value)


def test_a_label_is_there_or_not(tmp_path: Path) -> None:
    root = folder(tmp_path, "id,mass,oedema\na,0.5,1\nb,0,1\n")
    with pytest.raises(errors.DataError, match="neither 0 nor 1"):
        listed(root, recipe({"kind": "multi-label"}, "mass", "oedema"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a,-1,1\nb,3,0", "column 'months': -1 lies outside"),
        ("a,1,2\nb,3,0", "column 'died': 2 is neither 0 nor 1"),
        ("a,1,\nb,3,0", "no value in died"),
    ],
)
def test_a_time_without_an_event_is_refused(tmp_path: Path, rows: str, words: str) -> None:
    root = folder(tmp_path, f"id,months,died\n{rows}\n")
    with pytest.raises(errors.DataError, match=words):
        listed(root, recipe({"kind": "survival", "bins": [6.0, 12.0]}, "months", "died"))


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    root = folder(tmp_path, "id,weight\na,1\nb,2\n")
    with pytest.raises(errors.DataError, match=r"no column age, .*there are: weight"):
        listed(root, recipe(AGE, "age"))


def test_a_sample_without_a_row_is_the_one_that_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path, "id,age\nb,2\n", patients="id,patient\na,p\nb,q\n")
    with pytest.raises(errors.DataError, match=r"\(labels\.csv has no row with id 'a'\): no value in age") as caught:
        listed(root, recipe(AGE, "age"))
    assert [fault.code for fault in caught.value.faults] == ["label-missing"]


def test_a_volume_without_a_value_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in "ab":
        scan = nibabel.Nifti1Image(np.zeros((8, 8, 5), np.int16), np.eye(4))  # type: ignore[attr-defined]
        nibabel.save(scan, tmp_path / "images" / f"{name}.nii.gz")  # type: ignore[attr-defined]
    (tmp_path / "labels.csv").write_text("id,age\na,\nb,3\n")
    with pytest.raises(errors.DataError, match="no value in age") as caught:
        listed(tmp_path, recipe(AGE, "age"))
    assert len(caught.value.faults) == 1


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, "id,age,age,,\na,1,2,,\nb,2,3,,\n")
    with pytest.raises(errors.DataError, match="column age stands twice") as caught:
        listed(root, recipe(AGE, "age"))
    assert caught.value.code == "table"
    (root / "labels.csv").write_text("id,age,,\na,1,,,\nb,2,,\n")  # empty columns, as spreadsheets write them
    assert [sample.values for sample in listed(root, recipe(AGE, "age"))] == [(1.0,), (2.0,)]


def test_one_column_in_two_tables_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, "id,age\na,1\nb,2\n", patients="id,patient,age\na,p,3\nb,q,4\n")
    with pytest.raises(errors.DataError, match=r"column 'age' is in patients\.csv too"):
        listed(root, recipe(AGE, "age"))


def test_images_of_a_case_have_one_value(tmp_path: Path) -> None:
    root = folder(tmp_path, "id,case,age\na,one,40\nb,one,41\n")
    with pytest.raises(errors.DataError, match="unlike values") as caught:
        listed(root, recipe(AGE, "age", kind="case-classification"))
    assert "case-mixed" in {fault.code for fault in caught.value.faults}


def test_a_table_without_labels_is_for_no_classes(tmp_path: Path) -> None:
    root = folder(tmp_path, "id,age\na,40\nb,41\n")
    chosen = recipe({}, "x", "y")
    source = sources.make(schema.SourceConfig(source="folder", path=str(root)), chosen.data)
    assert any("has no column label" in fault for fault in labels.faults(chosen, source.info))


def test_a_source_without_a_table_is_refused() -> None:
    class Bare:
        info = samples.SourceInfo("bare", "classification", ("x", "y"), "none")

        def samples(self) -> list[samples.Sample]:
            return [samples.Sample("a", 0)]

        def read(self, sample: samples.Sample) -> samples.Pixels:
            raise NotImplementedError

    with pytest.raises(errors.DataError, match="has no table of columns"):
        columns.Columns(Bare(), recipe(AGE, "age"))


def test_a_split_that_could_not_be_scored_is_refused_before_training(tmp_path: Path) -> None:
    root = folder(tmp_path, "id,months,died\na,5,1\nb,30,0\n")
    chosen = recipe({"kind": "survival", "bins": [6.0, 12.0]}, "months", "died")
    early, late = listed(root, chosen)
    columns.require_follow_up(chosen, "north", {"val": [], "test": [early, late]})
    with pytest.raises(errors.DataError, match="site 'north': no case of val is followed up beyond 6"):
        columns.require_follow_up(chosen, "north", {"val": [early], "test": [late]})


def test_coxs_target_needs_cases_that_can_be_compared() -> None:
    chosen = recipe({"kind": "cox", "bins": [12.0]}, "months", "died")
    truths = ((5.0, 1.0), (30.0, 0.0), (30.0, 1.0), (5.0, 1.0))
    early, censored, late, same = (samples.Sample(str(at), values=truth) for at, truth in enumerate(truths))
    columns.require_follow_up(chosen, "north", {"train": [early, censored], "val": [], "test": [late, censored]})
    for alone in ([early], [censored, censored], [early, same]):
        with pytest.raises(errors.DataError, match="no two cases of train can be compared"):
            columns.require_follow_up(chosen, "north", {"train": alone, "test": [early, late]})
    part = samples.Part("a", 0, 2, 1.0)
    slices = [dataclasses.replace(each, part=part) for each in (early, late)]
    with pytest.raises(errors.DataError, match="slices of a volume"):
        columns.require_follow_up(chosen, "north", {"test": slices})


def test_copies_of_an_image_with_unlike_values_are_a_conflict() -> None:
    rows: Any = [
        types.SimpleNamespace(mask="", number=at, sample=samples.Sample(str(at), values=(float(at), 1.0)))
        for at in (1, 2)
    ]
    seen: Any = types.SimpleNamespace(segmentation=False)
    assert [found.code for found in duplicates._conflicts(seen, [rows])] == ["duplicate-conflict"]
    assert duplicates._conflicts(seen, [[rows[0], rows[0]]]) == []
