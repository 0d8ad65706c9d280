"""A table beside the images through the real simulation: trained, scored, predicted as scored, exported, left out."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvfm import errors
from fedvfm.client.training import consistency, dp_trainer, evaluator, trainer
from fedvfm.client.training import site as sites
from fedvfm.inference import case_graph, export, forms, graph, predict
from fedvfm.model import adapted_model, memory
from fedvfm.simulation import baselines, experiment, run
from fedvfm.tasks import case_heads
from tests.simulation import drawn_cases

INPUTS = {
    "numbers": ["marker"],
    "ranges": [[0.0, 10.0]],
    "centres": [5.0],
    "scales": [2.0],
    "categories": {"sex": ["F", "M"]},
    "dropout": 0.2,
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes of two hospitals; the marker is high with a spot, and one case has no row."""
    folder = drawn_cases.volumes(tmp_path_factory.mktemp("tables") / "data", ("east", "west"))
    with (folder / "index.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    made = [
        {"id": row["id"], "marker": f"{7 if row['label'] == 'spot' else 3}", "sex": "FM"[at % 2] if at % 3 else ""}
        for at, row in enumerate(found)
    ]
    drawn_cases.table(folder / "table.csv", made[1:])
    return folder


@pytest.fixture(scope="module")
def values(drawn: Path, tiny_dino: Path) -> dict[str, Any]:
    recipe = drawn_cases.recipe(tiny_dino, inputs=INPUTS)
    recipe["task"]["head"] = "mean"
    return {
        "name": "tables",
        "baselines": [],
        "data": {"source": "folder", "path": str(drawn), "options": {"ids": "names"}},
        "recipe": recipe,
    }


@pytest.fixture(scope="module")
def finished(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> run.Result:
    what = {**values, "partition": {"without_table": ["west"]}, "baselines": ["image-alone", "table-alone"]}
    return run.simulate(what, output=tmp_path_factory.mktemp("runs") / "tables")


def _site(values: dict[str, Any], **partition: Any) -> sites.Site:
    hospital = experiment.hospitals(experiment.parse({**values, "partition": partition}, "tables"))[0]
    return sites.Site(hospital.name, hospital, simulated=True)


def test_a_site_without_a_table_takes_part(finished: run.Result, values: dict[str, Any]) -> None:
    arms = finished.summary["arms"]
    for name in ("federated", "image-alone", "table-alone"):
        assert set(arms[name]["sites"]) == {"east", "west"}
    with (finished.path / "samples.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "probability_1" and row["arm"] == "table-alone"]
    west = {row["value"] for row in rows if row["sample"].startswith("west")}
    assert len(west) == 1, "without row and image all are answered alike"
    assert len({row["value"] for row in rows}) > 2
    plain = {name: value for name, value in values["recipe"].items() if name != "inputs"}
    wanting = experiment.parse({**values, "baselines": ["table-alone"], "recipe": plain}, "tables")
    assert "'table-alone' is for a table beside the images" in str(baselines.faults(wanting))
    with pytest.raises(errors.ConfigError, match="no such hospital 'wets'; nearest: 'west'"):
        _site(values, without_table=["wets"])
    assert {sample.inputs for sample in _site(values, without_table=["east"]).split("train")} == {()}


def test_a_run_goes_on_with_the_rows_that_it_began_with_alone(finished: run.Result, drawn: Path) -> None:
    table = drawn / "table.csv"
    before = table.read_text()
    table.write_text(before.replace("east-1,7", "east-1,6"))
    try:
        with pytest.raises(errors.CheckpointError, match="not those this run began with"):
            run.resume(finished.path)
    finally:
        table.write_text(before)


def test_prediction_gives_what_was_scored(finished: run.Result, drawn: Path, tmp_path: Path) -> None:
    with (finished.path / "samples.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "probability_1" and row["arm"] == "federated"]
    scored = {row["sample"]: float(row["value"]) for row in rows}
    summaries = {
        table: predict.predict(finished.path / "adapter", drawn / "images", tmp_path / Path(table).stem, table=table)
        for table in (str(drawn / "table.csv"), predict.NO_TABLE)
    }
    given, without = (
        {row["id"]: row["probabilities"]["spot"] for row in summary["inputs"]} for summary in summaries.values()
    )
    for name, value in scored.items():
        assert (given if name.startswith("east") else without)[name] == pytest.approx(value, abs=1e-5)
    assert given["east-6"] != pytest.approx(without["east-6"], abs=1e-4)
    assert summaries[str(drawn / "table.csv")]["notes"] == {predict.WITHOUT_ROW: ["east-0"]}
    assert len(summaries[predict.NO_TABLE]["notes"][predict.WITHOUT_ROW]) == 16


def test_a_table_is_asked_for_and_must_fit(finished: run.Result, drawn: Path, tmp_path: Path) -> None:
    adapter, images = finished.path / "adapter", drawn / "images"
    with pytest.raises(errors.ConfigError, match=r"columns marker, sex; give it, or --table none"):
        predict.run(adapter, images, tmp_path / "out")
    for text, words in (
        ("id,marker,sex\nother,3,F\n", "no id is the name of an input"),
        ("id,marker,sex\neast-1,30,F\n", "column 'marker': 30 lies outside of 0 to 10"),
        ("id,marker\neast-1,3\n", "sex"),
    ):
        (tmp_path / "table.csv").write_text(text)
        with pytest.raises(errors.DataError, match=words):
            predict.run(adapter, images, tmp_path / "out", table=tmp_path / "table.csv")


@pytest.mark.slow
def test_exports_carry_the_table_or_refuse(finished: run.Result, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    adapter = finished.path / "adapter"
    for form in ("hf", "monai", "peft"):
        with pytest.raises(errors.ConfigError):
            forms.export_adapter(adapter, tmp_path / form, form)
    made = forms.export_adapter(adapter, tmp_path / "onnx", "onnx")
    assert made["difference"] < 1e-4
    model = export.load_adapter(adapter)
    vectors = torch.randn(4, model.backbone.width)
    row = torch.tensor([7.0, float("nan")])
    given = {"vectors": vectors, "places": torch.arange(4), "table": row}
    logits, _ = graph.outputs(tmp_path / "onnx" / case_graph.HEAD, given)
    parts = case_heads.Parts((tuple(range(4)),), vectors)
    assert torch.allclose(logits, model(torch.empty(0), None, None, parts, row[None])[0], atol=1e-4)
    assert "`marker`: a number from 0 to 10" in (tmp_path / "onnx" / "README.md").read_text()


@pytest.mark.slow
def test_single_images_take_a_table_in_training_prediction_and_onnx(
    values: dict[str, Any], drawn: Path, tmp_path: Path
) -> None:
    recipe = {**values["recipe"], "task": {"kind": "classification"}, "rounds": 1}
    made = run.simulate({**values, "recipe": recipe}, output=tmp_path / "run")
    for form in ("hf", "monai", "onnx-int8", "peft"):
        with pytest.raises(errors.ConfigError, match="takes a table beside the image"):
            forms.export_adapter(made.path / "adapter", tmp_path / form, form)
    table = tmp_path / "table.csv"
    with (drawn / "table.csv").open(newline="", encoding="utf-8") as file:
        told = [{**row, "image": "none"} for row in csv.DictReader(file)]
    drawn_cases.table(table, [*told, {**told[0], "id": "visit", "image": "none"}])
    forms.export_adapter(made.path / "adapter", tmp_path / "onnx", "onnx")
    rows = []
    for name, options in (("torch", {}), ("graph", {"graph": tmp_path / "onnx"})):
        summary = predict.predict(made.path / "adapter", drawn / "images", tmp_path / name, table=table, **options)
        rows.append([row["probabilities"]["spot"] for row in summary["inputs"]])
        assert summary["notes"][predict.NOT_TAKEN] == ["visit"]
    assert np.allclose(*rows, atol=1e-4)


def test_a_row_or_an_image_is_hidden_by_its_own_draw(values: dict[str, Any], drawn: Path) -> None:
    """Arms and engines hide the same rows, whoever is beside; and in evaluation none is hidden."""
    what = experiment.parse(values, "tables")
    model = adapted_model.AdaptedModel(what.recipe)
    site = _site(values)
    train = site.split("train")
    hidden = [
        [site.example(model, sample, 0, ("epoch", epoch)).hidden for epoch in range(60)]
        for sample in train
        if sample.inputs
    ]
    both = model.under(experiment.parse(_bare(values, drawn), "tables").recipe)
    shown = [site.example(both, train[1], 0, ("epoch", epoch)) for epoch in range(60)]
    assert [example.hidden for example in shown] == hidden[0], (
        "the rows that are hidden are those without such a recipe"
    )
    assert 0.1 < np.mean([example.sample.without_image for example in shown]) < 0.3
    assert not any(example.hidden and example.sample.without_image for example in shown)
    assert 0.1 < np.mean(hidden) < 0.3
    assert hidden[0] == [site.example(model, train[1], 1, ("epoch", epoch)).hidden for epoch in range(60)]
    assert not site.example(model, train[0], 0, ("epoch", 1)).hidden, "there is no row to hide"
    shown = [site.example(model, sample, 0, ("epoch", 0)) for sample in train[1:3]]
    rows = sites.collate(shown, model)[-1]
    assert rows is not None
    assert bool(torch.isnan(rows[0]).all()) == shown[0].hidden
    answers = [evaluator.answer(model, site, train[1]) for _ in range(2)]
    assert torch.equal(*answers)
    assert {len(example.sample.inputs) for example in dp_trainer.made(model)} == {2}
    shapes = adapted_model.AdaptedModel(what.recipe, with_weights=False)
    assert memory._saved(shapes, torch.empty(2 * memory.images_a_sample(shapes), 3, 28, 28, device="meta"))[1] > 0


@pytest.fixture(scope="module")
def bare(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same volumes, and beside them two trained and two tested rows of the east that have no image."""
    folder = tmp_path_factory.mktemp("bare") / "data"
    shutil.copytree(drawn, folder)
    for name, more in (("index.csv", {"image": ""}), ("table.csv", {})):
        with (folder / name).open(newline="", encoding="utf-8") as file:
            rows = [{**row, **more} for row in csv.DictReader(file)]
        for at in range(4):
            key, label = f"row-{at}", ("plain", "spot")[at % 2]
            of_labels = {"id": key, "label": label, "patient": key, "site": "east", "image": "none"}
            of_labels["split"] = "train" if at < 2 else "test"
            rows.append(of_labels if name == "index.csv" else {"id": key, "marker": f"{3 + 4 * (at % 2)}", "sex": "F"})
        drawn_cases.table(folder / name, rows)
    return folder


def _bare(values: dict[str, Any], folder: Path, **recipe: Any) -> dict[str, Any]:
    inputs = {**INPUTS, "images_missing": True}
    data = {**values["data"], "path": str(folder)}
    return {**values, "data": data, "recipe": {**values["recipe"], "inputs": inputs, **recipe}}


def test_rows_without_an_image_change_nothing_where_the_recipe_takes_none(
    values: dict[str, Any], drawn: Path, bare: Path
) -> None:
    """Training has the same bits as if nobody had written those rows down."""
    shown = []
    for folder in (drawn, bare):
        site = _site({**values, "data": {**values["data"], "path": str(folder)}})
        model = adapted_model.AdaptedModel(experiment.parse(values, "tables").recipe)
        update = trainer.train(model, site, model.initial(), 1)
        shown.append((update.state.fingerprint, update.num_examples))
    assert shown[0] == shown[1]


@pytest.mark.parametrize("kind", ["case-classification", "classification"])
def test_a_site_without_images_moves_the_head_alone(values: dict[str, Any], bare: Path, kind: str) -> None:
    """Not by decay either; and what an image would have held makes no difference."""
    task = {"kind": kind} | ({"head": "mst"} if kind == "case-classification" else {})
    optimiser = {**values["recipe"]["optimiser"], "weight_decay": 0.1}
    adapter = {"kind": "lora", "layers": [3]}
    what = _bare(values, bare, task=task, optimiser=optimiser, adapter=adapter)
    site = _site(what, without_images=["east"])
    assert len(site.split("train")) == 5, "three volumes with a row, and two rows"
    assert all(sample.without_image for sample in site.split("train"))
    model = adapted_model.AdaptedModel(experiment.parse(what, "tables").recipe)
    base = model.initial()
    moved = trainer.train(model, site, base, 1).state
    names = {name for name in base if not np.array_equal(base[name], moved[name])}
    assert names
    assert all("classify" in name or "fusion" in name for name in names)
    with pytest.raises(errors.DataError, match="has no image, and one is read"):
        site.hospital.read(site.split("train")[0])


def test_a_site_with_neither_images_nor_labels_moves_the_head_alone(values: dict[str, Any], bare: Path) -> None:
    """What the adapter makes of a row without an image is its pseudo-label."""
    unlabelled = {"threshold": 0.5, "weight": 0.5, "warmup_rounds": 1}
    what = _bare(values, bare, unlabelled=unlabelled, adapter={"kind": "lora", "layers": [3]})
    site = _site(what, without_images=["east"], unlabelled=["east"])
    assert site.without_labels
    model = adapted_model.AdaptedModel(experiment.parse(what, "tables").recipe)
    base = model.initial()
    taught = consistency.taught(model, site, base, 2).site.split("train")
    assert len(taught) == 5
    for sample in taught:
        assert sample.without_image
        assert sample.label == int(evaluator.answer(model, site, sample).argmax())
    moved = trainer.train(model, site, base, 2).state
    names = {name for name in base if not np.array_equal(base[name], moved[name])}
    assert names
    assert all("classify" in name or "fusion" in name for name in names)


@pytest.mark.slow
def test_cases_without_an_image_are_trained_scored_and_predicted(
    values: dict[str, Any], bare: Path, tmp_path: Path
) -> None:
    """At a site that has both, and at one that has rows alone; ONNX answers for them too."""
    what = {**_bare(values, bare), "partition": {"without_images": ["west"]}, "baselines": ["pooled", "table-alone"]}
    made = run.simulate(what, output=tmp_path / "run")
    with (made.path / "samples.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "probability_1" and row["arm"] == "federated"]
    scored = {row["sample"]: float(row["value"]) for row in rows}
    assert {"row-2", "row-3", "east-6", "west-6"} <= set(scored)
    table = tmp_path / "table.csv"
    with (bare / "table.csv").open(newline="", encoding="utf-8") as file:
        told = [{**row, "image": "none" if row["id"].startswith("row") else ""} for row in csv.DictReader(file)]
    drawn_cases.table(table, told)
    summary = predict.predict(made.path / "adapter", bare / "images", tmp_path / "out", table=table)
    given = {row["id"]: row for row in summary["inputs"]}
    for name in ("row-2", "row-3", "east-6"):
        assert given[name]["probabilities"]["spot"] == pytest.approx(scored[name], abs=1e-5)
    assert [name for name, row in given.items() if row.get("image") == "none"] == [f"row-{at}" for at in range(4)]
    assert summary["notes"] == {
        predict.WITHOUT_ROW: ["east-0"],
        predict.WITHOUT_IMAGE: [f"row-{at}" for at in range(4)],
    }
    assert given["west-6"]["probabilities"]["spot"] != pytest.approx(scored["west-6"], abs=1e-4)
    (tmp_path / "empty").mkdir()
    alone = predict.predict(made.path / "adapter", tmp_path / "empty", tmp_path / "alone", table=table)
    assert [row["id"] for row in alone["inputs"]] == [f"row-{at}" for at in range(4)]
    pytest.importorskip("onnxscript")
    assert forms.export_adapter(made.path / "adapter", tmp_path / "onnx", "onnx")["difference"] < 1e-4
    assert "`table`: float32 (3,), NaN" in (tmp_path / "onnx" / "README.md").read_text()
    wanting = experiment.parse({**what, "baselines": ["image-alone"]}, "tables")
    assert "'image-alone' has no answer for cases without an image" in str(baselines.faults(wanting))


@pytest.mark.slow
def test_single_images_and_rows_without_one_give_one_graph(values: dict[str, Any], bare: Path, tmp_path: Path) -> None:
    made = run.simulate({**_bare(values, bare, task={"kind": "classification"}, rounds=1)}, output=tmp_path / "run")
    table = tmp_path / "table.csv"
    drawn_cases.table(table, [{"id": "r", "marker": "7", "sex": "M", "image": "none"}])
    pytest.importorskip("onnxscript")
    forms.export_adapter(made.path / "adapter", tmp_path / "onnx", "onnx")
    (tmp_path / "empty").mkdir()
    chances = []
    for name, options in (("torch", {}), ("graph", {"graph": tmp_path / "onnx"})):
        summary = predict.predict(made.path / "adapter", tmp_path / "empty", tmp_path / name, table=table, **options)
        chances += [row["probabilities"]["spot"] for row in summary["inputs"]]
    assert len(chances) == 2
    assert chances[0] == pytest.approx(chances[1], abs=1e-4)


@pytest.mark.parametrize(
    ("partition", "missing", "words"),
    [
        ({"without_images": ["wets"]}, True, "no such hospital 'wets'; nearest: 'west'"),
        ({"without_images": ["west"]}, False, "the recipe takes no case without an image"),
        ({"without_images": ["west"], "without_table": ["west"]}, True, "'west' is in partition.without_table too"),
    ],
)
def test_hospitals_without_images_must_fit(
    values: dict[str, Any], bare: Path, partition: dict[str, Any], missing: bool, words: str
) -> None:
    what = _bare(values, bare)
    what["recipe"] = {**what["recipe"], "inputs": {**INPUTS, "images_missing": missing}}
    with pytest.raises(errors.ConfigError, match=words):
        _site(what, **partition)
