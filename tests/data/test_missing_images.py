"""Cases that a table declares to be without an image: listed, left out, refused, and never read as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import bags, labels
from fedvfm.data import sample as samples
from fedvfm.data.sources import table as sources
from tests.data.test_columns import folder
from tests.data.test_input_rows import recipe
from tests.tasks.test_fusion import TWO

BARE = {**TWO, "images_missing": True}
LABELS = "id,patient,label,image\na,p,x,\nb,q,y,scan.png\nc,p,y, None\nd,r,x,none\n"
TABLE = "id,age,sex\na,40,F\nc,50,M\nd,,F\n"


def source(root: Path, chosen: schema.Recipe) -> samples.Source:
    listed = sources.make(schema.SourceConfig(source="folder", path=str(root)), chosen.data)
    return bags.of(labels.mapped(listed, {"x": "y", "y": "x"}, ("x", "y")), chosen)


def test_rows_without_an_image_are_samples_of_a_recipe_that_takes_them(tmp_path: Path) -> None:
    made = source(folder(tmp_path, LABELS, table=TABLE), recipe(inputs=BARE))
    told = [(each.id, each.without_image, each.label, each.inputs, each.patient) for each in made.samples()]
    assert told == [
        ("image-0001", False, 1, (40.0, 0.0), "patient-0001"),
        ("image-0002", False, 0, (), "patient-0002"),
        ("row-0003", True, 0, (50.0, 1.0), "patient-0001"),
        ("row-0004", True, 1, (None, 0.0), "patient-0003"),
    ]
    with pytest.raises(errors.DataError, match="'row-0003' has no image"):
        made.read(made.samples()[2])
    assert made.stable(made.samples()[2]) == ("c 0", "p")  # type: ignore[attr-defined]


@pytest.mark.parametrize("inputs", [TWO, {}], ids=["table", "images-alone"])
@pytest.mark.parametrize("bare", [{}, {"c": "0", "d": "A"}], ids=["behind", "before"])
def test_any_other_recipe_sees_none_of_them(tmp_path: Path, inputs: dict[str, object], bare: dict[str, str]) -> None:
    """Its samples are those of a folder in which nobody wrote down such rows, whatever these are called."""
    text = LABELS.replace("d,r,", "d,0,")
    for name, other in bare.items():
        text = text.replace(f"\n{name},", f"\n{other},")
    shown = source(folder(tmp_path / "some", text, table=TABLE), recipe(inputs=inputs))
    plain = "\n".join(LABELS.splitlines()[:3])
    alone = source(folder(tmp_path / "none", plain, table="id,age,sex\na,40,F\n"), recipe(inputs=inputs))
    assert shown.samples() == alone.samples()
    assert "2 case(s) without an image left out" in shown.info.note
    only = folder(tmp_path / "only", "id,label,image\nc,x,none\nd,y,none\n", "", table=TABLE)
    with pytest.raises(errors.DataError, match="all 2 cases are declared to be without an image, and the recipe takes"):
        source(only, recipe(inputs=inputs))


def test_a_site_may_have_no_image_at_all(tmp_path: Path) -> None:
    root = folder(tmp_path, "id,label,image\nc,x,none\nd,y,none\n", "", table=TABLE)
    (root / "images").rmdir()
    assert [each.without_image for each in source(root, recipe(inputs=BARE)).samples()] == [True, True]
    (root / "labels.csv").write_text("id,label,image\nc,x,none\nd,y,\n")
    with pytest.raises(errors.DataError):
        source(root, recipe(inputs=BARE))


def test_a_case_without_images_is_a_case_of_one_that_stands_for_none(tmp_path: Path) -> None:
    text = "id,case,label,image\na,one,x,\nb,one,x,\nc,two,y,none\nd,two,y,none\n"
    made = source(
        folder(tmp_path, text, table="id,age,sex\none,40,F\ntwo,,M\n"), recipe("case-classification", inputs=BARE)
    )
    assert [(case.id, case.without_image, len(case.images)) for case in made.samples()] == [
        ("case-0001", False, 2),
        ("case-0002", True, 1),
    ]
    assert made.samples()[1].bag
    assert made.stable(made.samples()[1]) == ("case two", "two")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "table", "words"),
    [
        (LABELS, "id,age,sex\na,40,F\n", "neither an image nor a value in any column"),
        (LABELS.replace("a,p,x,", "a,p,x,none"), TABLE, "id 'a' has image = none, and there is an image of that name"),
        (LABELS.replace(", None", ",c.png"), TABLE, "id 'c' has no image; remove the row or bring the file"),
        ("id,label,case,image\na,x,one,\nb,y,two,\nc,x,one,none\n", TABLE, "unlike declaration of an image"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, table: str, words: str) -> None:
    root = folder(tmp_path, text, table=table)
    with pytest.raises(errors.DataError, match=words):
        source(root, recipe("case-classification", inputs=BARE))


def test_a_table_that_is_absent_leaves_a_case_without_an_image_with_nothing(tmp_path: Path) -> None:
    root, chosen = folder(tmp_path, LABELS, table=TABLE), recipe(inputs=BARE)
    listed = sources.make(schema.SourceConfig(source="folder", path=str(root)), chosen.data)
    with pytest.raises(errors.DataError, match="neither an image nor a value") as caught:
        bags.of(listed, chosen, table=False)
    assert [fault.code for fault in caught.value.faults] == ["case-empty"] * 2
