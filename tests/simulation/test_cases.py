"""Cases through the real simulation: trained, scored, predicted as scored, and refused where nothing is built."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from fedvfm import errors
from fedvfm.client.training import evaluator
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import overlay
from fedvfm.inference import export, forms, graph, predict
from fedvfm.model import adapted_model, feature_cache, memory
from fedvfm.simulation import experiment, inspection, run
from fedvfm.tasks import case_heads
from tests.data import dicom_writer as writer
from tests.data.test_several_images import views
from tests.simulation import drawn_cases

MIB = 1 << 20


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn_cases.volumes(tmp_path_factory.mktemp("cases") / "data", ("east", "west"))


@pytest.fixture(scope="module")
def values(drawn: Path, tiny_dino: Path) -> dict[str, Any]:
    return {
        "name": "cases",
        "baselines": [],
        "data": {"source": "folder", "path": str(drawn)},
        "recipe": drawn_cases.recipe(tiny_dino),
    }


@pytest.fixture(scope="module")
def finished(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> run.Result:
    return run.simulate({**values, "baselines": ["classical"]}, output=tmp_path_factory.mktemp("runs") / "cases")


def _recipe(values: dict[str, Any], **more: Any) -> schema.Recipe:
    return schema.parse(schema.Recipe, {**values["recipe"], **more}, "recipe")


def _site(values: dict[str, Any], cache: int = 0) -> sites.Site:
    what = experiment.parse(values, "cases")
    hospital = experiment.hospitals(what)[0]
    return sites.Site(hospital.name, hospital, cache=feature_cache.FeatureCache(cache), simulated=True)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_counts_cases_and_not_images(finished: run.Result) -> None:
    arms = finished.summary["arms"]
    assert {site: row["num_examples"] for site, row in arms["federated"]["sites"].items()} == {"east": 2, "west": 2}
    assert arms["classical"]["sites"]["east"]["num_examples"] == 2
    journal = (finished.path / "journal.jsonl").read_text()
    assert set(re.findall(r'"(?:num_)?examples": (\d+)', journal.splitlines()[0])) <= {"2", "4"}, "cases, not slices"
    page = (finished.path / "report.html").read_text()
    assert "image 1 of" in page or "weight" in page


def test_prediction_gives_what_was_scored(finished: run.Result, drawn: Path, tmp_path: Path) -> None:
    rows = [row for row in _rows(finished.path / "samples.csv") if row["arm"] == "federated"]
    scored = {row["sample"]: float(row["value"]) for row in rows if row["metric"] == "probability_1"}
    names = {f"image-{at:04d}": path for at, path in enumerate(sorted((drawn / "images").iterdir()), 1)}
    tested = min(scored)
    summary = predict.predict(finished.path / "adapter", names[tested], tmp_path / "out", overlays=True)
    (row,) = summary["inputs"]
    assert row["probabilities"]["spot"] == pytest.approx(scored[tested], abs=1e-5)
    parts = _rows(tmp_path / "out" / "parts.csv")
    assert [part["part"].rpartition("/")[2] for part in parts] == [f"z{at:03d}" for at in range(len(parts))]
    assert sum(float(part["weight"]) for part in parts) == pytest.approx(1, abs=1e-4)
    shown = list((tmp_path / "out" / "overlays").rglob("*.png"))
    assert len(shown) == predict.HEAVIEST
    for path in shown:
        with Image.open(path) as picture:
            # A quadratic slice, and three lines of text below it.
            assert picture.size[1] - picture.size[0] == 3 * overlay.LINE + 2 * overlay.MARGIN
            below = np.asarray(picture.convert("L"))[picture.size[0] :]
            assert below.min() < 100 < 250 < np.median(below)
    painted = nibabel.load(next((tmp_path / "out" / "overlays").glob("*.nii.gz")))
    assert np.allclose(painted.affine, nibabel.load(names[tested]).affine)
    heaviest = max(range(len(parts)), key=lambda at: float(parts[at]["weight"]))
    assert [int(level) for level in np.asarray(painted.dataobj)[0, 0]][heaviest] == 255


def test_pictures_of_a_folder_are_predicted_as_one_case(finished: run.Result, tmp_path: Path) -> None:
    drawn_cases.pictures(tmp_path / "in", ("east",), images=10)
    summary = predict.predict(finished.path / "adapter", tmp_path / "in" / "cases", tmp_path / "out")
    assert [row["id"] for row in summary["inputs"]] == [f"east-{at}" for at in range(8)]
    assert [part["id"] for part in summary["inputs"][0]["parts"]] == [f"east-0/view-{at}" for at in range(1, 11)]


def test_several_volumes_of_one_case_have_one_answer(
    finished: run.Result, values: dict[str, Any], drawn: Path, tmp_path: Path
) -> None:
    """As they are scored when they train as one case."""
    rows = [{"id": path.name.removesuffix(".nii.gz"), "case": ""} for path in sorted((drawn / "images").iterdir())]
    for at, row in enumerate(rows):
        row["case"] = f"pair-{at // 2}"
    drawn_cases.table(tmp_path / "cases.csv", rows)
    summary = predict.predict(
        finished.path / "adapter", drawn / "images", tmp_path / "out", cases=tmp_path / "cases.csv"
    )
    assert [row["id"] for row in summary["inputs"]] == [f"pair-{at}" for at in range(len(rows) // 2)]
    site = _site(values)
    members = [image for case in site.split("test")[:2] for image in case.images]
    joined = dataclasses.replace(site.split("test")[0], id="pair", images=tuple(members))
    model = export.load_adapter(finished.path / "adapter")
    expected = model.task.answers(evaluator.answer(model, site, joined))
    found = {tuple(round(value, 5) for value in row["probabilities"].values()) for row in summary["inputs"]}
    assert tuple(round(float(value), 5) for value in expected) in found
    drawn_cases.table(tmp_path / "few.csv", rows[1:])
    with pytest.raises(errors.DataError, match="no row for input"):
        predict.run(finished.path / "adapter", drawn / "images", tmp_path / "again", cases=tmp_path / "few.csv")


def _study(folder: Path, *, deep: bool) -> Path:
    """Two radiographs of one study, beside each other or in a folder each; the second one's file."""
    views(folder, (30, 32), (28, 30), StudyInstanceUID=f"1.2.{ord(folder.name)}")
    files = sorted(folder.iterdir())
    for at, file in enumerate(files if deep else ()):
        (folder / str(at)).mkdir()
        files[at] = file.rename(folder / str(at) / file.name)
    return files[1]


@pytest.mark.parametrize("deep", [False, True])
def test_radiographs_of_a_study_are_predicted_as_one_case(finished: run.Result, tmp_path: Path, *, deep: bool) -> None:
    for name in "ab":
        _study(tmp_path / "in" / name, deep=deep)
    summary = predict.predict(finished.path / "adapter", tmp_path / "in", tmp_path / "out", overlays=True)
    assert [[part["id"] for part in row["parts"]] for row in summary["inputs"]] == [
        ["series-001", "series-002"],
        ["series-003", "series-004"],
    ]


def test_a_study_with_a_damaged_radiograph_has_no_answer(finished: run.Result, tmp_path: Path) -> None:
    _study(tmp_path / "in" / "a", deep=True)
    last = _study(tmp_path / "in" / "b", deep=True)
    last.write_bytes(last.read_bytes()[:-200])
    told = predict.run(finished.path / "adapter", tmp_path / "in", tmp_path / "out")
    assert [row["id"] for row in told["inputs"]] == ["series-001"]
    assert list(told["failed"]) == ["series-003"]
    assert writer.PLANTED not in str(told["failed"])
    assert str(tmp_path / "in") not in str(told["failed"])


def test_two_cases_of_one_name_are_told_apart(finished: run.Result, tmp_path: Path) -> None:
    drawn_cases.pictures(tmp_path, ("east",), images=2)
    drawn_cases.volumes(tmp_path / "other", ("east",))
    (tmp_path / "other" / "images" / "east-0.nii.gz").rename(tmp_path / "cases" / "east-0.nii.gz")
    summary = predict.predict(finished.path / "adapter", tmp_path / "cases", tmp_path / "out")
    names = [row["id"] for row in summary["inputs"]]
    assert names == ["east-0/", *(f"east-{at}" for at in range(1, 8)), "east-0"]


@pytest.mark.parametrize("form", ["hf", "onnx-int8", "monai", "peft"])
def test_exports_are_refused_by_name(finished: run.Result, tmp_path: Path, form: str) -> None:
    with pytest.raises(errors.ConfigError, match="cases of many images"):
        forms.export_adapter(finished.path / "adapter", tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", ["attention-mil", "max", "mean", "mst"])
def test_two_graphs_compute_what_the_adapter_does(
    values: dict[str, Any], finished: run.Result, tmp_path: Path, head: str
) -> None:
    lora = {"kind": "lora", "rank": 2, "layers": [3]}
    task = {"kind": "case-classification", "head": head}
    model = adapted_model.AdaptedModel(
        _recipe(values, task=task, adapter=lora if head == "mst" else {"kind": "head-only"})
    )
    model.write(model.initial())
    export.save(model, tmp_path / "adapter", {})
    made = forms.export_adapter(tmp_path / "adapter", tmp_path / "out", "onnx")
    assert set(made["files"]) == {"README.md", "encoder.onnx", "head.onnx"}
    images = torch.rand(6, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    contract = model.recipe.data
    mean, std = (torch.tensor(numbers).reshape(1, 3, 1, 1) for numbers in (contract.mean, contract.std))
    parts = case_heads.Parts((tuple(range(6)),), model.eval().vectors((images - mean) / std).detach())
    (vectors,) = graph.outputs(tmp_path / "out" / "encoder.onnx", {"image": images})
    kept = vectors.half().float() if model.frozen_whole else vectors
    places = torch.arange(6)
    logits, weights = graph.outputs(tmp_path / "out" / "head.onnx", {"vectors": kept, "places": places})
    assert torch.allclose(logits, model(images, None, None, parts)[0], atol=1e-3)
    assert torch.allclose(weights, model.attention(parts), atol=1e-3)


def test_a_graph_of_images_is_not_for_cases(finished: run.Result, drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="--graph"):
        predict.predict(finished.path / "adapter", drawn / "images", tmp_path / "out", graph=tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": {"kind": "case-classification", "head": "linear"}}, "recipe.task.head"),
        ({"task": {"kind": "classification", "head": "mst"}}, "recipe.task.head"),
        ({"task": {"kind": "segmentation", "head": "mst"}}, "recipe.task.head"),
        ({"task": {"kind": "case-classification", "options": {"parts": 0}}}, "options.parts = 0"),
        ({"task": {"kind": "case-classification", "options": {"parts": True}}}, "options.parts = True"),
        ({"task": {"kind": "case-classification", "head": "mean", "options": {"layers": 2}}}, "head 'mean' has none"),
        ({"task": {"kind": "case-classification", "head": "mst", "options": {"layers": 9}}}, "options.layers = 9"),
        ({"task": {"kind": "case-classification", "prompt": "box"}}, "takes no prompts"),
        ({"data": {"class_names": ["plain", "spot"], "input_size": [28, 28], "fit": "native"}}, "recipe.data.fit"),
    ],
)
def test_what_cannot_be_is_refused_by_name(values: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    _, faults = adapted_model.examine(_recipe(values, **changes))
    assert any(words in fault for fault in faults), faults


def test_the_recipe_states_its_head(values: dict[str, Any]) -> None:
    recipe = _recipe(values, task={"kind": "case-classification"})
    assert adapted_model.AdaptedModel(recipe, with_weights=False).recipe.task.head == "attention-mil"


@pytest.mark.parametrize("adapter", [{"kind": "head-only"}, {"kind": "lora", "rank": 2, "layers": [3]}])
@pytest.mark.parametrize("views", [0, 2])
def test_kept_or_computed_the_bits_are_the_same(values: dict[str, Any], adapter: dict[str, Any], views: int) -> None:
    data = {**values["recipe"]["data"], "views": views}
    model = adapted_model.AdaptedModel(_recipe(values, adapter=adapter, data=data))
    made = []
    for cache in (0, 64 * MIB):
        site = _site(values, cache)
        for _ in range(2):
            examples = [site.example(model, one, 0 if views else -1, ("epoch", 0)) for one in site.split("train")[:2]]
            made.append((model(*sites.collate(examples, model)), evaluator.answer(model, site, site.split("test")[0])))
    exact = adapter["kind"] == "head-only"
    for logits, answer in made[1:]:
        for found, first in ((logits, made[0][0]), (answer, made[0][1])):
            assert torch.equal(found, first) if exact else torch.allclose(found, first, atol=1e-5)


def test_a_step_takes_so_many_images_and_evaluation_all(values: dict[str, Any]) -> None:
    task = {"kind": "case-classification", "head": "mst", "options": {"parts": 2}}
    site, model = _site(values), adapted_model.AdaptedModel(_recipe(values, task=task))
    case = site.split("train")[0]
    places = [site.example(model, case, 0, ("epoch", epoch)).places for epoch in range(8)]
    assert {len(own) for own in places} == {2}
    assert len(set(places)) > 1
    assert places == [site.example(model, case, 0, ("epoch", epoch)).places for epoch in range(8)]
    assert all(own == tuple(sorted(own)) for own in places)
    assert evaluator.whole_case(model, site, case).places == (tuple(range(len(case.images))),)


def test_memory_follows_the_images_of_a_step(values: dict[str, Any]) -> None:
    lora = {"kind": "lora", "rank": 2, "layers": [2, 3]}
    sizes = []
    for parts in (2, 8):
        task = {"kind": "case-classification", "head": "mst", "options": {"parts": parts}}
        model = adapted_model.AdaptedModel(_recipe(values, adapter=lora, task=task), with_weights=False)
        sizes.append(memory.activations(model))
    assert 3 < sizes[1] / sizes[0] < 5
    frozen = adapted_model.AdaptedModel(_recipe(values), with_weights=False)
    seen = inspection.inspect(frozen, [_site(values).hospital])
    assert [(one.train, one.evaluated) for one in seen] == [(18, 18)]
    kept = memory.memory(frozen, seen, memory.Places(64))
    assert kept.features * MIB == 2 * 32 * (18 + 18 * 2)
    assert not kept.images


def test_a_case_without_a_label_is_refused(values: dict[str, Any]) -> None:
    model = adapted_model.AdaptedModel(_recipe(values), with_weights=False)
    with pytest.raises(errors.DataError, match="without a label; give every image, or every case, a class"):
        model.task.target(sites.NO_IMAGE, None)


@pytest.mark.slow
def test_a_deployment_gives_the_bits_of_the_in_process_engine(
    values: dict[str, Any], finished: run.Result, tmp_path: Path
) -> None:
    made = run.simulate({**values, "engine": "deployment"}, output=tmp_path / "deployed")
    assert made.summary["fingerprint"] == finished.summary["fingerprint"]
    both = (result.summary["arms"]["federated"]["sites"] for result in (made, finished))
    assert next(both) == next(both)
