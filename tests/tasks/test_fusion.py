"""A row of a table beside the image: encoded by hand, fused without mixing samples, refused where it does not fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedvfm.config import inputs, schema
from fedvfm.model import adapted_model
from fedvfm.tasks import case_heads, fusion, heads, table
from tests.simulation import drawn_cases

TWO: dict[str, Any] = {
    "numbers": ["age"],
    "ranges": [[0.0, 120.0]],
    "centres": [60.0],
    "scales": [10.0],
    "categories": {"sex": ["F", "M"]},
}
NAN = math.nan


def chosen(**more: Any) -> inputs.InputsConfig:
    return schema.parse(inputs.InputsConfig, {**TWO, **more}, "inputs")


def test_a_row_is_encoded_by_public_constants_and_says_what_is_missing() -> None:
    rows = torch.tensor([[75.0, 1.0], [NAN, 0.0], [60.0, NAN], [NAN, NAN]])
    expected = [
        [1.5, 0.0, 1.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 1.0],
        [0.0, 0.0, 0.0, 1.0, 1.0],
    ]
    found = fusion.encoded(rows, chosen())
    assert found.tolist() == expected
    assert found.shape[1] == fusion.width(chosen())
    absent = fusion.stacked([(), (75.0, None)], chosen(), [False, False])
    assert absent is not None
    assert fusion.encoded(absent, chosen()).tolist() == [expected[3], [1.5, 0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("kind", fusion.TABLE.names())
@pytest.mark.parametrize("head", ["linear", *case_heads.TABLE.names()])
def test_every_head_takes_a_row_and_mixes_no_samples(kind: str, head: str) -> None:
    torch.manual_seed(0)
    own = fusion.argument(16, chosen(fusion=kind))
    made = (heads if head == "linear" else case_heads).TABLE.get(head)(16, 3, **own).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    vectors, rows = torch.randn(3, 16), torch.tensor([[75.0, 1.0], [NAN, 0.0], [20.0, NAN]])

    def answer(which: list[int], table: torch.Tensor) -> torch.Tensor:
        if head == "linear":
            return made(type("Features", (), {"pooled": vectors[which]})(), table[which])  # type: ignore[no-any-return]
        return made(case_heads.bags(vectors[which], [(0,)] * len(which)), table[which])  # type: ignore[no-any-return]

    whole = answer([0, 1, 2], rows)
    assert torch.allclose(torch.cat([answer([at], rows) for at in range(3)]), whole, atol=1e-5)
    changed = rows.clone()
    changed[1, 0] = 30.0
    moved = (answer([0, 1, 2], changed) - whole).abs().amax(dim=1) > 1e-4
    assert moved.tolist() == [False, True, False]
    with pytest.raises(ValueError, match="no rows were given"):
        made(case_heads.bags(vectors, [(0,)] * 3)) if head != "linear" else made(
            type("Features", (), {"pooled": vectors})()
        )


def test_film_changes_nothing_at_the_start_and_images_can_be_left_out() -> None:
    vectors, rows = torch.randn(2, 16), torch.tensor([[75.0, 1.0], [NAN, 0.0]])
    film = fusion.argument(16, chosen(fusion="film"))["fusion"]
    assert torch.equal(film(vectors, rows), vectors)
    for kind in fusion.TABLE.names():
        alone = fusion.argument(16, chosen(fusion=kind, images=False))["fusion"]
        assert torch.equal(alone(vectors, rows), alone(torch.randn(2, 16), rows))


@pytest.mark.parametrize("kind", fusion.TABLE.names())
def test_of_an_image_that_is_missing_nothing_is_seen_but_that_it_is(kind: str) -> None:
    torch.manual_seed(0)
    own = chosen(fusion=kind, images_missing=True)
    made = case_heads.TABLE.get("attention-mil")(16, 3, **fusion.argument(16, own))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = [(75.0, 1.0), (75.0, 1.0), ()]
    bare, shown = (fusion.stacked(inputs, own, [False, missing, False]) for missing in (True, False))
    assert bare is not None
    assert shown is not None
    assert bare.shape == (3, own.numbers_a_row)
    assert fusion.encoded(bare, own).shape == (3, fusion.width(own))
    vectors = torch.randn(3, 16, requires_grad=True)
    other = vectors.detach() + torch.tensor([[0.0], [9.0], [0.0]])
    cases = [case_heads.bags(given, [(0,)] * 3) for given in (vectors, other)]
    answers = made(cases[0], bare)
    answers.square().sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().amax(dim=1).gt(0).tolist() == [True, False, True]
    assert torch.equal(made(cases[1], bare), answers)
    moved = (made(cases[0], shown) - answers).abs().amax(dim=1) > 1e-4
    assert moved.tolist() == [False, True, False]
    with pytest.raises(ValueError, match="images_missing is false"):
        fusion.stacked(inputs, chosen(), [False, True, False])


def test_a_recipe_with_a_table_has_the_hash_that_it_had_before_images_could_be_missing() -> None:
    plain, bare = _recipe(TWO), _recipe({**TWO, "images_missing": True})
    assert "images_missing" not in plain.model_dump(mode="json")["inputs"]
    assert plain.hash != bare.hash
    assert "give at most 0.5" in str(chosen(images_missing=True, dropout=0.6).faults(()))
    assert not [*chosen(images_missing=True, dropout=0.5).faults(()), *chosen(dropout=0.6).faults(())]
    named = chosen(images_missing=True, categories={"image": ["none", "some"]}).faults(())
    assert "says where an image is missing" in str(named)
    cut = {"class_names": ["a", "b"], "fit": "native"}
    assert "nobody can say how large" in str(
        adapted_model.examine(_recipe({**TWO, "images_missing": True}, data=cut))[1]
    )


@pytest.mark.parametrize(
    "target",
    [
        {"kind": "regression", "ranges": [[0, 9]] * 2, "centres": [4, 4], "scales": [1, 1]},
        {"kind": "multi-label", "prevalence": [0.2, 0.4]},
        {"kind": "survival", "bins": [1, 2, 3]},
        {"kind": "cox", "bins": [3]},
        {"kind": "ordinal"},
    ],
    ids=lambda target: target["kind"],
)
def test_heads_of_every_target_take_a_row(target: dict[str, Any]) -> None:
    recipe = _recipe(TWO, target=target, task={"kind": "case-classification", "head": "mean"})
    task = table.TABLE.get("case-classification")(recipe)
    head = task.head(type("Backbone", (), {"width": 16})())
    cases = case_heads.bags(torch.randn(2, 16), [(0,), (0,)])
    first, second = (head(cases, torch.tensor([[age, 1.0], [NAN, NAN]])) for age in (40.0, 80.0))
    assert first.shape == (2, task.width)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])


def _recipe(values: dict[str, Any], **more: Any) -> schema.Recipe:
    plain = {"backbone": {"name": "unet"}, "task": {"kind": "classification"}, "data": {"class_names": ["a", "b"]}}
    return schema.parse(schema.Recipe, {**plain, "inputs": values, **more}, "recipe")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"ranges": []}, "recipe.inputs.ranges: 0 given for 1 of recipe.inputs.numbers"),
        ({"units": ["years", "kg"]}, "recipe.inputs.units: 2 given for 1"),
        ({"centres": [200.0]}, "age has the range 0 to 120 and the centre 200"),
        ({"categories": {"age": ["F", "M"]}}, "a column is named twice"),
        ({"categories": {"label": ["F", "M"]}}, "column 'label' is no input"),
        ({"categories": {"sex": ["F", "f "]}}, "differ in capitals or spaces alone"),
        ({"categories": {"sex": ["F", " "]}}, "a word is blank"),
        (
            {"numbers": [], "ranges": [], "centres": [], "scales": [], "categories": {}, "dropout": 0.5},
            "dropout: nothing reads",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused(more: dict[str, Any], words: str) -> None:
    faults = adapted_model.examine(_recipe({**TWO, **more}))[1]
    assert any(words in fault for fault in faults), faults


def test_what_the_target_learns_is_no_input_and_masks_take_no_table() -> None:
    target = {"kind": "regression", "ranges": [[0, 120]], "centres": [60], "scales": [15]}
    learned = _recipe(TWO, target=target, data={"class_names": ["age"]})
    assert "column 'age' is what the target learns" in str(adapted_model.examine(learned)[1])
    masks = _recipe(TWO, task={"kind": "segmentation"})
    assert "takes no table beside the image" in str(adapted_model.examine(masks)[1])


def test_without_inputs_a_recipe_has_the_hash_and_the_arrays_that_it_had() -> None:
    plain = schema.parse(
        schema.Recipe,
        {"backbone": {"name": "unet"}, "task": {"kind": "classification"}, "data": {"class_names": ["a", "b"]}},
        "recipe",
    )
    assert "inputs" not in plain.model_dump(mode="json")
    assert plain.hash == "c98f216dbf50fa7d5e7894ad44ce4c4d6895f2de6c00f8d8640dbe65d11d7eec"
    assert _recipe(TWO).hash != plain.hash


@pytest.mark.parametrize("task", ["classification", "case-classification"])
def test_answers_are_float32_where_the_model_computes_in_bfloat16(tiny_dino: Path, task: str) -> None:
    """Three digits would make scores of cases tie."""
    values = drawn_cases.recipe(tiny_dino, task={"kind": task})
    values["data"] = {"class_names": ["none", "spot"], "input_size": [28, 28]}
    model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"))
    model.precision = "bfloat16"
    images = torch.randn(5, 3, 28, 28, generator=torch.manual_seed(0))
    parts = case_heads.Parts(((0, 1), (0,), (0, 1)), None)
    with torch.no_grad():
        numbers = model(images, None, None, parts) if task == "case-classification" else model(images)
    assert numbers.dtype == torch.float32
    assert not torch.equal(numbers, numbers.bfloat16().float())
