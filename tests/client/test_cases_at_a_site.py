"""Cases at a hospital: checked with a real training step, split by patient, and judged by their numbers of images."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedvfm.client import site_file
from fedvfm.client.gate import policy
from fedvfm.client.readiness import affected, check, document
from fedvfm.config import inputs, schema
from fedvfm.data import bags
from fedvfm.data import sample as data
from fedvfm.data.readiness import dataset, rules, survey
from tests.simulation import drawn_cases

POLICY = "[policy]\nmin_train_units = 1\n"
SITE = f'name = "north"\nrecipe = "recipe.toml"\n{POLICY}[data]\nsource = "folder"\npath = "data"\n'


def _toml(values: dict[str, Any], where: str = "") -> str:
    plain = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    tables = [_toml(value, f"{where}{key}.") for key, value in values.items() if isinstance(value, dict)]
    return "\n".join([f"[{where[:-1]}]" if where else "", *plain, *tables]) + "\n"


@pytest.fixture
def site(tmp_path: Path, tiny_dino: Path) -> Path:
    drawn_cases.volumes(tmp_path / "data", ("east",))
    (tmp_path / "recipe.toml").write_text(_toml(drawn_cases.recipe(tiny_dino)))
    (tmp_path / "site.toml").write_text(SITE)
    return tmp_path / "site.toml"


def test_a_check_reads_every_image_and_counts_cases(site: Path) -> None:
    made = check.check(site)
    assert not [one for one in made.findings if one.severity == "blocker"], made.told
    assert made.seen is not None
    assert (len(made.seen.samples), len(made.seen.found.rows)) == (8, 36)
    assert made.facts["training_step"]
    told = document._data(made.seen)
    assert (told["samples"], told["images"], told["volumes"], told["patients"]) == (8, 36, 8, 8)


@pytest.mark.parametrize("table", ["", "id,marker\nother,3\n", "id,marker\neast-1.nii.gz,3\n"])
def test_columns_that_training_would_refuse_block_the_check(site: Path, table: str) -> None:
    """Faults that come one at a time count as much as lists of them."""
    columns = {"numbers": ["marker"], "ranges": [[0.0, 9.0]], "centres": [5.0], "scales": [2.0]}
    recipe = site.parent / "recipe.toml"
    recipe.write_text(recipe.read_text() + _toml({"inputs": columns}))
    if table:
        (site.parent / "data" / "table.csv").write_text(table)
    made = check.check(site)
    assert "table" in [one.code for one in made.findings if one.severity == "blocker"]
    assert not {"rows-missing", "input-constant"} & {one.code for one in made.findings}
    assert any("marker" in text and 'table = "absent"' in text for _, code, text in made.told if code == "table")


def test_rows_of_nothing_are_told_of_the_table_of_a_target_too(site: Path, tiny_dino: Path) -> None:
    values = drawn_cases.recipe(tiny_dino)
    scale = {"ranges": [[0.0, 20.0]], "centres": [5.0], "scales": [2.0]}
    values["data"]["class_names"], values["target"] = ["marker"], {"kind": "regression", **scale}
    (site.parent / "recipe.toml").write_text(_toml(values))
    rows = "".join(f"east-{at},{at}\n" for at in range(12))
    (site.parent / "data" / "table.csv").write_text(f"id,marker\n{rows}")
    made = check.check(site)
    assert {one.code: one.count for one in made.findings}["rows-unused"] == 4
    assert made.seen is not None
    assert made.seen.info.note.endswith("; 4 row(s) of the tables of nothing that is here")


def _rows_alone(site: Path, missing: bool) -> None:
    """Two rows more, of one patient each, that are declared to be without an image; and the marker as an input."""
    data, recipe = site.parent / "data", site.parent / "recipe.toml"
    lines = (data / "index.csv").read_text().splitlines()
    rows = [f"row-{at},{('plain', 'spot')[at]},q{at},east,train,none" for at in (0, 1)]
    (data / "index.csv").write_text("\n".join([f"{lines[0]},image", *(f"{line}," for line in lines[1:]), *rows]) + "\n")
    (data / "table.csv").write_text("id,marker\neast-1,3\nrow-0,4\nrow-1,5\n")
    columns = {"numbers": ["marker"], "ranges": [[0.0, 9.0]], "centres": [5.0], "scales": [2.0]}
    recipe.write_text(recipe.read_text() + _toml({"inputs": {**columns, "images_missing": missing}}))


def test_a_check_counts_cases_without_an_image_and_trains_a_step_with_them(site: Path) -> None:
    _rows_alone(site, missing=True)
    made = check.check(site)
    assert not [one for one in made.findings if one.severity == "blocker"], made.told
    told = {one.code: one.problem for one in made.findings}
    assert told["images-missing"] == "2 of 10 samples without an image"
    assert told["rows-missing"] == "7 of 10 samples without a row of the table"
    assert made.seen is not None
    assert [len(made.seen.splits[name]) for name in ("train", "val", "test")] == [6, 2, 2]
    assert (document._data(made.seen)["images"], document._data(made.seen)["unusable"]) == (36, 0)
    assert made.facts["training_step"]
    affected.write(made, site.parent / "files.csv")
    rows = [line.split(",") for line in (site.parent / "files.csv").read_text().splitlines()]
    assert [row[4] for row in rows if row[1] == "images-missing"] == ["", ""]


def test_a_check_says_how_many_cases_a_recipe_leaves_out_and_a_site_may_have_rows_alone(site: Path) -> None:
    _rows_alone(site, missing=False)
    made = check.check(site)
    told = {one.code: (one.severity, one.problem) for one in made.findings}
    assert told["images-not-taken"] == ("note", "2 cases without an image left out")
    assert "images-missing" not in told
    recipe, index = site.parent / "recipe.toml", site.parent / "data" / "index.csv"
    recipe.write_text(recipe.read_text().replace("images_missing = false", "images_missing = true"))
    lines = index.read_text().splitlines()
    rows = [line.replace("east,train", f"east,{split}") for line in lines[-2:] for split in ("train", "test")]
    rows = [line.replace("row-", f"row-{at}").replace(",q", f",q{at}") for at, line in enumerate(rows)]
    index.write_text("\n".join([lines[0], *rows]) + "\n")
    (site.parent / "data" / "table.csv").write_text("id,marker\nrow-00,4\nrow-10,5\nrow-21,6\nrow-31,7\n")
    shutil.rmtree(site.parent / "data" / "images")
    site.write_text(SITE.replace(POLICY, f"{POLICY}min_steps = 1\n"))
    made = check.check(site)
    assert not [one for one in made.findings if one.severity == "blocker"], made.told
    assert made.facts["training_step"]
    hospital = site_file.hospital(made.own.site, made.own.recipe)  # type: ignore[arg-type]
    assert [len(part) for part in hospital.splits.values()] == [2, 0, 2]
    assert [len(case.images) for case in hospital.train] == [1, 1]


def test_a_case_with_an_unreadable_image_is_named_and_the_others_train(site: Path) -> None:
    file = site.parent / "data" / "images" / "east-1.nii.gz"
    made = nibabel.load(file)
    values = np.asarray(made.dataobj).astype(np.float32)
    values[0, 0, 2] = np.nan
    nibabel.Nifti1Image(values, made.affine).to_filename(file)
    seen = check.check(site)
    assert {number for one in seen.findings if one.severity == "blocker" for number in one.samples} == {2}


def test_images_of_a_case_with_unlike_labels_are_a_blocker(site: Path) -> None:
    table = site.parent / "data" / "index.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0] + ",case", *(f"{line},same" for line in lines[1:])]) + "\n")
    codes = {one.code: one.severity for one in check.check(site).findings}
    assert codes["case-mixed"] == "blocker"


def test_a_hospital_of_cases(site: Path) -> None:
    own = site_file.read(site)
    assert own.recipe is not None
    hospital = site_file.hospital(own.site, own.recipe)
    assert [len(part) for part in hospital.splits.values()] == [4, 2, 2]
    assert all(one.images for part in hospital.splits.values() for one in part)
    assert set(policy.leaving(own.recipe)) >= {"balanced_accuracy", "auroc"}
    assert policy.steps(own.recipe, len(hospital.train)) == 2


def test_the_list_of_affected_files_names_the_folder_of_a_case_once(tmp_path: Path, tiny_dino: Path) -> None:
    drawn_cases.pictures(tmp_path / "data", ("east",), images=3)
    for at in (1, 2):
        Image.fromarray(np.full((30, 30), 9, np.uint8)).save(tmp_path / "data" / "cases" / "east-3" / f"view-{at}.png")
    (tmp_path / "recipe.toml").write_text(_toml(drawn_cases.recipe(tiny_dino)))
    (tmp_path / "site.toml").write_text(SITE)
    made = check.check(tmp_path / "site.toml")
    affected.write(made, tmp_path / "files.csv")
    rows = [line.split(",") for line in (tmp_path / "files.csv").read_text().splitlines()]
    blank = [row for row in rows if row[1] == "blank"]
    assert [row[2:5] for row in blank] == [["4", "case-0004", str(tmp_path / "data" / "cases" / "east-3")]]


def test_cases_that_are_one_image_each_are_told() -> None:
    for images in (1, 2):
        codes = {finding.code for finding in rules.findings(_looked([(0, images), (1, 1)]))}
        assert ("cases-of-one" in codes) == (images == 1)


def _looked(counts: list[tuple[int, int]]) -> dataset.Looked:
    """Cases of (label, number of images)."""
    samples = [
        data.Sample(f"c{at}", label, images=tuple(data.Sample(f"c{at}-{number}") for number in range(images)))
        for at, (label, images) in enumerate(counts)
    ]
    info = data.SourceInfo("drawn", "classification", ("plain", "spot"), "CC0")
    return dataset.Looked(info, info.class_names, samples, survey.Survey(2), {"train": range(1, len(samples) + 1)})


@pytest.mark.parametrize(("more", "told"), [(0, False), (9, True)])
def test_numbers_of_images_that_tell_the_label_are_found(more: int, told: bool) -> None:
    seen = _looked([(at % 2, 3 + at // 2 % 3 + more * (at % 2)) for at in range(30)])
    problems = [one.problem for one in rules.findings(seen) if one.code == "parts-tell-label"]
    assert problems == (["the number of images of a case tells whether it is of plain (AUROC 1.00)"] if told else [])


def test_a_table_is_judged_before_training() -> None:
    """Rows that are missing or unused, values that are missing or all alike, and a column that is the answer."""
    names = ["age", "score", "ward", "crp"]
    columns = {"numbers": names, "ranges": [[0, 99]] * 4, "centres": [50] * 4, "scales": [10] * 4}
    chosen = schema.parse(inputs.InputsConfig, {**columns, "categories": {"drug": ["no", "yes"]}}, "inputs")
    seen = _looked([(at % 2, 2) for at in range(30)])
    rows: list[tuple[float | None, ...]] = [
        (float(at * 7 % 13), 3.0 + at % 2, 4.0, at % 5 if at % 2 else None, at % 2) for at in range(30)
    ]
    rows[0], rows[1] = (), (None, *rows[1][1:])
    tabled = [
        dataclasses.replace(case, inputs=row, without_image=case.label == 0)
        for case, row in zip(seen.samples, rows, strict=True)
    ]
    found = rules.findings(dataclasses.replace(seen, samples=tabled, inputs=chosen, unused_rows=2))
    told = {one.code: one.problem for one in found}
    assert told["rows-missing"] == "1 of 30 samples without a row of the table"
    assert told["rows-unused"] == "2 rows of the tables of nothing that is here"
    alone = rules.findings(dataclasses.replace(seen, unused_rows=2))  # of a target of columns
    assert "rows-unused" in {one.code for one in alone}
    assert told["input-missing"] == "no value in age of 1 sample, crp of 14 samples"
    assert told["input-constant"] == "no two values differ in ward"
    leaks = [one.problem for one in found if one.code == "input-tells-label"]
    told_by = (
        "column score tells",
        "whether crp is missing tells",
        "column drug tells",
        "whether the image is missing tells",
    )
    assert leaks == [f"{what} spot by itself (AUROC 1.000)" for what in told_by]


def test_few_cases_tell_nothing() -> None:
    seen = _looked([(at % 2, 3 + 9 * (at % 2)) for at in range(10)])
    assert not [one for one in rules.findings(seen) if one.code == "parts-tell-label"]
    assert bags.images_of(seen.samples[:1]) == list(seen.samples[0].images)
