"""A student learns a teacher's answers without labels, the same from the same seed, and says where they are from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import fedvfm
from fedvfm import errors
from fedvfm.config import schema
from fedvfm.inference import distillation, export, images, student_training
from fedvfm.model import adapted_model
from fedvfm.state import state
from fedvfm.tasks import metrics
from tests.data import dicom_writer as writer
from tests.inference.conftest import Saver

TINY = ("adapter.rank=2", "optimiser.learning_rate=5e-3")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled")
    rows, columns = np.mgrid[:30, :40]
    for at in range(10):
        wave = np.sin(rows / (2 + at % 5)) * 90 + np.cos((columns + 3 * at) / (3 + at % 4)) * 30 + 128
        Image.fromarray(wave.astype(np.uint8)).save(folder / f"{at:02d}.png")
    return folder


def distilled(adapter: Path, pictures: Path, out: Path, student: Any, **more: Any) -> dict[str, Any]:
    more = {"sets": TINY, "epochs": 6} | more
    return distillation.run(adapter, pictures, out, str(student), **more)


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_student_comes_near_its_teacher(
    saved: Saver, tiny_dino: Path, pictures: Path, tmp_path: Path, task: str
) -> None:
    adapter = saved(task)
    teacher = fedvfm.load_adapter(adapter)
    made = distilled(adapter, pictures, tmp_path / "out", tiny_dino, settings=student_training.Settings(seed=3))
    assert made["loss"]["last"] < 0.8 * made["loss"]["first"]
    assert (made["images"]["fitted"], made["images"]["held"]) == (8, 2)
    if task == "segmentation":
        assert made["agreement"]["after"] > made["agreement"]["before"]
    assert fedvfm.load_adapter(adapter).read().fingerprint == teacher.read().fingerprint  # weights are not shared
    student = fedvfm.load_adapter(tmp_path / "out")
    assert student.read().fingerprint == made["fingerprint"]
    assert student.recipe.optimiser.local_epochs == 6
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"**Distilled from adapter {teacher.read().fingerprint}" in card
    assert "## Distilled from" in card
    assert json.loads((tmp_path / "out" / "distilled.json").read_text())["teacher"]["recipe"] == teacher.recipe_hash
    again = distilled(adapter, pictures, tmp_path / "again", tiny_dino, settings=student_training.Settings(seed=3))
    assert again["fingerprint"] == made["fingerprint"]
    told = fedvfm.predict(tmp_path / "out", pictures, tmp_path / "predicted")
    assert len(told["inputs"]) == 10


def test_a_student_answers_slices_as_its_teacher_does(saved: Saver, tiny_dino: Path, tmp_path: Path) -> None:
    """Mixed with their neighbours, in its own scores too: those of the volumes that predict writes."""
    task = {"kind": "segmentation", "options": {"neighbours": 0.3, "smooth": 1e-9}}
    model = fedvfm.load_adapter(saved(task))
    recipe = distillation.recipe_of(model.recipe, str(tiny_dino), TINY, 1, 0)
    assert dict(recipe.task.options) == {"neighbours": 0.3, "smooth": 1e-9}
    values = np.random.default_rng(0).normal(100, 40, (20, 24, 6)).astype(np.float32)
    labels = (np.random.default_rng(1).random(values.shape) * 3).astype(np.uint8)
    image = tmp_path / "own" / "imagesTr" / "a_0000.nii.gz"
    for path, array in ((image, values), (tmp_path / "own" / "labelsTr" / "a.nii.gz", labels)):
        path.parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    classes = {name: number for number, name in enumerate(model.recipe.data.class_names)}
    settings = {"channel_names": {"0": "MR"}, "labels": classes, "numTraining": 1}
    (tmp_path / "own" / "dataset.json").write_text(json.dumps(settings))
    source = distillation._labelled(tmp_path / "own", model)
    scored = distillation._scored(source, model)
    fedvfm.predict(saved(task), image, tmp_path / "out")
    (written,) = (tmp_path / "out").glob("*.nii.gz")
    given = np.asanyarray(nibabel.load(written).dataobj)
    names = model.recipe.data.class_names
    expected = metrics.SegmentationScores(names)
    expected.add("a", given.astype(np.int64), labels.astype(np.int64), (1.0, 1.0, 1.0))
    assert scored["dice"] == pytest.approx(expected.value()["dice"])


def test_licences_join_and_private_teachers_are_named(
    saved: Saver, tiny_dino: Path, pictures: Path, tmp_path: Path
) -> None:
    from tests.inference.test_export_formats import under

    adapter = under(saved(), tmp_path / "adapter", "CC-BY-NC-4.0")
    about = json.loads((adapter / "fedvfm.json").read_text())
    made = distilled(adapter, pictures, tmp_path / "out", tiny_dino, epochs=1)
    assert made["teacher"]["fingerprint"] == about["fingerprint"]
    assert "non-commercial" in fedvfm.load_adapter(tmp_path / "out").licence.limits
    assert "licence of that backbone: CC-BY-NC-4.0 (non-commercial)" in (tmp_path / "out" / "README.md").read_text()
    facts = {**made, "teacher": {**made["teacher"], "privacy": "dp-sgd"}}
    assert "not covered by that epsilon" in distillation._section(facts, fedvfm.load_adapter(adapter))
    forbidden = under(saved(), tmp_path / "forbidden", "CC-BY-NC-ND-4.0")
    with pytest.raises(errors.LicenceForbids, match="no-derivatives"):
        distilled(forbidden, pictures, tmp_path / "no", tiny_dino)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"epochs": 0}, "--epochs 0: give a number from 1"),
        ({"sets": ["data.stack=3"]}, "data.stack: these are the teacher's"),
        ({"sets": ["task.prompt='box'"]}, "a student answers without prompts"),
        ({"sets": ["precision='auto'"]}, "fitted in float32"),
        ({"sets": ["data.input_size=[27, 28]"]}, "Change the student's recipe with --set"),
        ({"student": "no-such-backbone"}, "no-such-backbone"),
    ],
)
def test_what_cannot_be_distilled(
    saved: Saver, tiny_dino: Path, pictures: Path, tmp_path: Path, more: dict[str, Any], match: str
) -> None:
    more = {"student": tiny_dino, **more}
    with pytest.raises(errors.ConfigError, match=match):
        distilled(saved(), pictures, tmp_path / "out", more.pop("student"), **more)
    assert not (tmp_path / "out").exists()


def test_values_stay_whole_and_their_difference_is_told(
    tiny_dino: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values beyond what half precision holds; images lie as a site has them, beside masks."""
    target = {"kind": "regression", "scales": [9e4], "centres": [2.5e5], "ranges": [[0.0, 1e6]], "units": ["mm3"]}
    values = {
        "backbone": {"name": str(tiny_dino)},
        "adapter": {"rank": 2},
        "task": {"kind": "classification"},
        "target": target,
        "data": {"class_names": ["volume"], "input_size": [28, 28]},
    }
    model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"))
    rng, start = np.random.default_rng(1), model.initial()
    model.write(
        state.AdapterState({name: a + rng.normal(0, 0.3, a.shape).astype(np.float32) for name, a in start.items()})
    )
    export.save(model.eval(), tmp_path / "adapter", {})
    for name in ("images", "masks"):
        shutil.copytree(pictures, tmp_path / "site" / name)
    known, largest = student_training.targets, []

    def kept(*given: Any, **more: Any) -> student_training.Targets:
        made = known(*given, **more)
        largest.append(float(made.answers.max()))
        return made

    monkeypatch.setattr(student_training, "targets", kept)
    made = distilled(tmp_path / "adapter", tmp_path / "site", tmp_path / "out", tiny_dino)
    assert largest[0] > 1e5
    assert made["images"]["inputs"] == 10
    near = made["agreement"]
    assert near["by"] == "mean_difference"
    assert 0 < near["after"] < near["before"]


def test_labelled_images_are_asked_for_before_anything_is_computed(
    saved: Saver, tiny_dino: Path, pictures: Path, tmp_path: Path
) -> None:
    events: list[str] = []
    with pytest.raises(errors.DataError, match="no such folder"):
        distilled(
            saved(),
            pictures,
            tmp_path / "out",
            tiny_dino,
            score=tmp_path / "no",
            observer=lambda event, /, **_: events.append(event),
        )
    assert events == []


def test_whose_images_are_held_back(tmp_path: Path) -> None:
    """A table, BIDS and Patient ID say it; of one patient all images are on one side."""
    contract = schema.DataContract(class_names=("rest", "cell"))
    grey = Image.fromarray(np.zeros((8, 8), np.uint8))
    for person in range(6):
        for scan in range(3):
            place = tmp_path / "bids" / f"sub-{person:02d}" / "anat" / f"scan{person}{scan}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            grey.save(place)
    places = images.Images(contract).places(tmp_path / "bids", "--data")
    owners = images.owners(tmp_path / "bids", places)
    assert len(owners) == 18
    for seed in range(5):
        fitted, held = distillation._held_back(places, owners, seed)
        sides = [{owners[places[at].item.name] for at in side} for side in (fitted, held)]
        assert sides[0].isdisjoint(sides[1])
        assert (len(sides[0]), len(held)) == (5, 3)
    (tmp_path / "bids" / "patients.csv").write_text(
        "id,patient\n" + "".join(f"{place.item.name.rpartition('/')[2]},one\n" for place in places[:-1])
    )
    owners = images.owners(tmp_path / "bids", places)
    assert len(set(owners.values())) == 2
    with pytest.raises(errors.DataError, match="all images are of one patient"):
        distillation._held_back(places[:-1], owners, 0)
    assert images.owners(tmp_path, []) == {}


def test_studies_of_one_patient_id_are_of_one_patient(tmp_path: Path) -> None:
    for name, patient in (("a", "P-1"), ("b", "P-1"), ("c", "P-2")):
        writer.radiograph(tmp_path / f"{name}.dcm", np.zeros((8, 8), np.uint16), PatientID=patient)
    contract = schema.DataContract(class_names=("rest", "cell"))
    owners = images.owners(tmp_path, images.Images(contract).places(tmp_path, "--data"))
    assert owners["series-001"] == owners["series-002"] != owners["series-003"]
    assert "P-1" not in str(owners)


def test_too_few_images_leave_nothing(saved: Saver, tiny_dino: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for path in sorted(pictures.iterdir())[:4]:
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(errors.DataError, match="4 pictures or volumes; at least 5"):
        distilled(saved(), tmp_path / "in", tmp_path / "out", tiny_dino)
    with pytest.raises(errors.ConfigError, match="--temperature 0"):
        student_training.Settings(temperature=0)

    def stop(event: str, /, **fields: Any) -> None:
        if str(fields.get("name", "")).startswith("student"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilled(saved(), pictures, tmp_path / "out", tiny_dino, observer=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("kind", ["class", "multi-label", "regression"])
def test_the_loss_is_zero_where_answers_are_the_teachers(kind: str) -> None:
    target: dict[str, Any] = {"kind": kind}
    if kind == "regression":
        target |= {"scales": [1.0, 2.0, 3.0], "centres": [0.0] * 3, "ranges": [[-9.0, 9.0]] * 3, "units": ["mm"] * 3}
    values = {
        "backbone": {"name": "dinov2-small"},
        "task": {"kind": "classification"},
        "target": target,
        "data": {"class_names": ["a", "b", "c"], "input_size": [28, 28]},
    }
    recipe = schema.parse(schema.Recipe, values, "recipe")
    told = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * 4
    assert float(student_training.of_answers(told, told, recipe, 2.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(student_training.of_answers(told + torch.tensor([1.0, -1.0, 0]), told, recipe, 2.0)) > 0.01


def test_the_loss_of_masks_is_zero_for_the_same_masks_alone() -> None:
    values = {"backbone": {"name": "dinov2-small"}, "data": {"class_names": ["a", "b"], "input_size": [28, 28]}}
    recipe = schema.parse(schema.Recipe, values, "recipe")
    told = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    assert float(student_training.of_answers(told, told, recipe, 3.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(student_training.of_answers(-told, told, recipe, 3.0)) > 0.1


def test_whole_volumes_are_refused_where_images_are_taken() -> None:
    from types import SimpleNamespace

    from fedvfm.inference import delivery

    seen: Any = SimpleNamespace(recipe=SimpleNamespace(data=SimpleNamespace(depth=8)))
    with pytest.raises(errors.ConfigError, match=r"whole volumes \(recipe.data.depth = 8\)"):
        delivery.require_slices(seen, "distil")
