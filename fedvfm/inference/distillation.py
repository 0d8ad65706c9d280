"""A smaller model from a trained one: a student backbone with an adapter of its own learns a teacher's answers.

No label is needed: pictures and volumes of the site, or public ones, are enough. What comes out is an adapter folder as
any other, whose card says which adapter it was distilled from; the terms of use of both backbones hold for it.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedvfm import errors, seeding
from fedvfm.backbones import licences, weights
from fedvfm.config import overrides, privacy, schema
from fedvfm.data import bags, labels, transforms
from fedvfm.data import sample as samples
from fedvfm.data.decoding import decoder
from fedvfm.data.sources import table as sources
from fedvfm.inference import agreement, delivery, export, images, output, student_training
from fedvfm.model import adapted_model, adapter_folder, sliding_window
from fedvfm.model import device as devices
from fedvfm.report import progress
from fedvfm.storage import storage
from fedvfm.tasks import across_slices, segmentation

RECORD = export.DISTILLED
LEAST = 5
"""Inputs that are needed: of so many some are held back, to say how near the student comes on what it did not see."""
OWN_DATA = {"augment", "input_size", "mean", "std", "views"}
"""Of the data contract what a student may have otherwise than its teacher; it is not augmented."""
HELD = 0.2
"""Share of the inputs that are held back."""


def run(
    adapter: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    student: str,
    *,
    sets: Sequence[str] = (),
    epochs: int = 20,
    settings: student_training.Settings | None = None,
    most: int = 2000,
    score: str | os.PathLike[str] | None = None,
    backbone: str | None = None,
    device: str = "cpu",
    observer: progress.Observer = progress.silent,
) -> dict[str, Any]:
    """Distil an adapter into another backbone, and say how near it comes; also in ``distilled.json``.

    The student computes in float32. Order and first weights depend on the seed alone, so that on machines of one kind
    with as many threads the same adapter comes out. A run that is stopped leaves nothing.

    Args:
        adapter: folder of the teacher.
        data: file or folder with pictures and volumes, as for prediction; labels are not looked at.
        output_folder: must not exist or be empty; it is whole or not there.
        student: a backbone's name.
        sets: ``key.path=value`` of the student's recipe, which is otherwise the teacher's where that concerns the task
            and the images, and the defaults.
        epochs: passes over the images.
        settings: how it is fitted.
        most: images and slices that are taken at most, evenly spaced.
        score: a folder with labelled images, in a layout that sites train from: teacher and student are scored on it.
        backbone: another place of the teacher's backbone.
        device: where to compute.
        observer: told of every image and pass.

    Raises:
        ConfigError: if this teacher cannot be distilled, or the student cannot do its task.
        LicenceForbids: if nothing made of the teacher's weights may be passed on.
        DataError: if the images are too few or cannot be used.
        CheckpointError, WeightsError: if teacher or backbones cannot be used.
        TrainingError: if a loss is not finite.
        OutputInUse: if the output folder is not free.
    """
    settings = settings or student_training.Settings()
    _require_numbers(epochs, most)
    folder, place = Path(output_folder), devices.choose(device)
    output.require_free(folder)
    decoder.limit(schema.DecodingLimits())
    teacher = export.load_adapter(adapter, device=place, backbone=backbone)
    _require_teacher(teacher)
    recipe = recipe_of(teacher.recipe, student, sets, epochs, settings.seed)
    model = _student(recipe, place)
    both = {"teacher": teacher, "student": model}
    reader = images.Images(model.recipe.data)
    chosen = images.evenly(reader.places(Path(data), "--data"), most)
    owners = images.owners(Path(data), chosen)
    fitted, held = _held_back(chosen, owners, settings.seed)
    scored = {} if score is None else {name: _labelled(Path(score), own) for name, own in both.items()}
    with output.whole(folder) as unfinished, tempfile.TemporaryDirectory(prefix="fedvfm-distil-") as beside:
        known = student_training.targets(
            teacher,
            model,
            reader,
            chosen,
            Path(beside),
            with_features=bool(settings.features) and not model.frozen_whole,
            observer=observer,
        )
        taught = [torch.from_numpy(known.answers[at].astype("float32")) for at in held]
        before = _near(model, student_training.answers(model, known, held), taught)[1]
        losses = student_training.fit(model, known, fitted, settings, observer)
        name, near = _near(model, student_training.answers(model, known, held), taught)
        facts: dict[str, Any] = {
            "teacher": {
                "fingerprint": teacher.read().fingerprint,
                "recipe": teacher.recipe_hash,
                "backbone": {"name": teacher.recipe.backbone.name, "sha256": teacher.backbone.sha256},
                "parameters": teacher.backbone_parameters,
                "privacy": teacher.recipe.privacy.mechanism,
            },
            "student": {
                "backbone": {"name": student, "sha256": model.backbone.sha256},
                "parameters": model.backbone_parameters,
            },
            "images": {
                "fitted": len(fitted),
                "held": len(held),
                "inputs": (inputs := len({place.item.name for place in chosen})),
                "of_known_patients": len(owners),
                "held_by": "patient" if len(owners) == inputs else "input",
            },
            "settings": {
                "temperature": settings.temperature,
                "features": settings.features if known.features is not None else 0.0,
                "seed": settings.seed,
                "epochs": epochs,
            },
            "loss": {"first": losses[0], "last": losses[-1]},
            "agreement": {"by": name, "before": before, "after": near},
            "scores": {name: _scored(source, both[name]) for name, source in scored.items()},
        }
        model.licence = model.licence + teacher.licence
        export.save(model, unfinished, {"experiment": "distilled"}, note=_note(facts))
        card = unfinished / adapter_folder.CARD
        storage.write_text(card, card.read_text(encoding="utf-8") + _section(facts, teacher))
        storage.write_text(unfinished / RECORD, json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return {"folder": str(folder), "fingerprint": model.read().fingerprint, **facts}


def recipe_of(teacher: schema.Recipe, student: str, sets: Sequence[str], epochs: int, seed: int) -> schema.Recipe:
    """The student's recipe: task and images of the teacher, all else by default or as set.

    Raises:
        ConfigError: listing every fault.
    """
    task = teacher.task
    kept = {"kind": task.kind, "ce_weight": task.ce_weight, "dice_weight": task.dice_weight, "dice": task.dice}
    kept["options"] = {name: task.options[name] for name in segmentation.OF_ANY_HEAD if name in task.options}
    values: dict[str, Any] = {
        "rounds": 1,
        "seed": seed,
        "precision": "float32",
        "backbone": {"name": student},
        "task": kept,
        "target": teacher.target.model_dump(mode="json"),
        "data": teacher.data.model_dump(mode="json"),
        "optimiser": {"local_epochs": epochs, "batch_size": 8},
    }
    values = overrides.apply(values, sets)
    recipe = schema.parse(schema.Recipe, values, "student")
    wrong = []
    keys = schema.DataContract.model_fields
    unlike = {key for key in keys if getattr(recipe.data, key) != getattr(teacher.data, key)}
    if unlike - OWN_DATA or recipe.target != teacher.target:
        wrong.append(
            f"data.{', data.'.join(sorted(unlike - OWN_DATA)) or 'target'}: these are the teacher's; a student sees "
            "what it sees and answers what it is told"
        )
    if recipe.task.kind != task.kind:
        wrong.append(f"task.kind = '{recipe.task.kind}': the teacher's is '{task.kind}'")
    if recipe.precision != "float32":
        wrong.append("precision: a student is fitted in float32, so that the same seed gives the same adapter")
    if recipe.data.fit != "resize" or teacher.data.fit != "resize":
        wrong.append("data.fit = 'native': teacher and student must see the same whole image; both need fit = 'resize'")
    if recipe.task.prompt != "none":
        wrong.append(f"task.prompt = '{recipe.task.prompt}': a student answers without prompts; leave it out")
    if recipe.privacy.mechanism != privacy.NO_MECHANISM:
        wrong.append("privacy: distillation adds no noise; leave it out")
    if recipe.inputs.columns or recipe.words is not None:
        wrong.append("inputs and words: a student sees images alone; leave them out")
    if recipe.optimiser.name != "adamw":
        wrong.append("optimiser.name: a student is fitted with adamw; leave it out")
    if wrong:
        raise errors.ConfigError("student", wrong)
    return recipe


def _require_numbers(epochs: int, most: int) -> None:
    wrong = [] if 1 <= epochs <= 10_000 else [f"--epochs {epochs}: give a number from 1 to 10000"]
    wrong += [] if LEAST <= most <= 1_000_000 else [f"--most {most}: give a number from {LEAST} to 1000000"]
    if wrong:
        raise errors.ConfigError("distil", wrong)


def _require_teacher(teacher: adapted_model.AdaptedModel) -> None:
    """Refuse teachers whose answers need more than an image, and weights that nothing may be made of.

    Raises:
        ConfigError, LicenceForbids: naming the remedy.
    """
    delivery.require_images(teacher, "distil")
    delivery.require_no_boxes(teacher, "distil")
    delivery.require_slices(teacher, "distil")
    delivery.require_tableless(teacher, "distil")
    delivery.require_promptless(teacher, "distil")
    instead = "the adapter as it is"
    licences.require_derivatives(teacher.licence, teacher.recipe.backbone.name, "distil", instead)


def _student(recipe: schema.Recipe, device: str) -> adapted_model.AdaptedModel:
    """The student at its start.

    Raises:
        ConfigError: listing what it cannot do.
        WeightsError: if its backbone is not here; it is never fetched.
    """
    _, faults = adapted_model.examine(recipe)
    if faults:
        raise errors.ConfigError("student", [f"{fault}. Change the student's recipe with --set" for fault in faults])
    weights.require_here(recipe.backbone)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seeding.torch_seed(recipe.seed, "distil", "model"))
        model = adapted_model.AdaptedModel(recipe, device=device)
    model.write(model.initial())
    return model.eval()


def _held_back(places: Sequence[images.Place], owners: Mapping[str, str], seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the images that are fitted, and of those held back, drawn by the seed.

    All images of a patient are on one side; an input that does not say whose it is counts as a patient.

    Raises:
        DataError: if there are too few inputs, or all are of one patient.
    """
    names = list(dict.fromkeys(place.item.name for place in places))
    if len(names) < LEAST:
        raise errors.DataError(
            f"--data: {len(names)} pictures or volumes; at least {LEAST} are needed, of which some are held back to "
            "say how near the student comes. Give more"
        )
    persons = list(dict.fromkeys(owners.get(name, name) for name in names))
    if len(persons) < 2:
        raise errors.DataError(
            "--data: all images are of one patient, so none could be held back that the student does not see. Give "
            "images of several"
        )
    drawn = seeding.stream(seed, "distil", "held").permutation(len(persons))[: max(1, round(HELD * len(persons)))]
    apart = {persons[at] for at in drawn}
    is_held = [owners.get(place.item.name, place.item.name) in apart for place in places]
    return [at for at, yes in enumerate(is_held) if not yes], [at for at, yes in enumerate(is_held) if yes]


def _near(model: adapted_model.AdaptedModel, own: Sequence[Tensor], taught: Sequence[Tensor]) -> tuple[str, float]:
    """What is compared, and how near the student comes; of answers that are no classes "mean_difference", 0 the same.

    Raises:
        DataError: as :func:`fedvfm.inference.agreement.measure`.
    """
    same = agreement.measure(model, own, taught, "--data")
    return (same.name, same.share) if same.name else ("mean_difference", agreement.apart(model, own, taught))


def _labelled(folder: Path, model: adapted_model.AdaptedModel) -> samples.Source:
    """Labelled images as a model takes them; asked for before anything is computed.

    Raises:
        ConfigError, DataError: if they are not the task's.
    """
    plain = sources.make(schema.SourceConfig(source="folder", path=str(folder)), model.recipe.data)
    source = bags.of(plain, model.recipe)
    faults = labels.faults(model.recipe, source.info)
    if faults:
        raise errors.ConfigError(f"--score {folder}", faults)
    return source


def _scored(source: samples.Source, model: adapted_model.AdaptedModel) -> dict[str, Any]:
    """A model's metrics on labelled images.

    Raises:
        DataError: if one cannot be read.
    """
    contract, scores = model.recipe.data, model.task.scores(surface=False)
    run = sliding_window.alone(model)

    def answered() -> Iterator[tuple[tuple[samples.Sample, transforms.Prepared], samples.Part | None, Tensor]]:
        for sample in source.samples():
            pixels = source.read(sample)
            ready = transforms.prepare(pixels, contract, len(contract.class_names), multiple=model.backbone.patch)
            yield (sample, ready), sample.part, sliding_window.logits(model, ready.image, run)

    for (sample, ready), logits in across_slices.mixed(answered(), model.task.neighbours):
        model.task.score(scores, sample.id, logits, ready, sample.truth)
    return {"samples": len(scores), **scores.value()}


def _note(facts: Mapping[str, Any]) -> str:
    return f"Distilled from adapter {facts['teacher']['fingerprint']} on {facts['teacher']['backbone']['name']}"


def _section(facts: Mapping[str, Any], teacher: adapted_model.AdaptedModel) -> str:
    """The part of the card that says where the student's knowledge comes from."""
    taught, shown, near = facts["teacher"], facts["images"], facts["agreement"]
    lines = [
        "",
        "## Distilled from",
        "",
        f"- adapter `{taught['fingerprint']}` of recipe `{taught['recipe']}`, on {taught['backbone']['name']} "
        f"(sha256 `{taught['backbone']['sha256'] or 'record from the seed'}`), {taught['parameters']:,} numbers",
        f"- licence of that backbone: {teacher.licence}; what it asks for holds here too",
        f"- on {shown['fitted']} images without labels, in {facts['settings']['epochs']} passes",
        f"- on {shown['held']} images of {shown['held_by']}s held back, beside the teacher ({near['by']}): "
        f"{near['after']:.4f}, at the start {near['before']:.4f}",
        *(
            []
            if shown["held_by"] == "patient"
            else [
                f"- of {shown['inputs']} inputs {shown['of_known_patients']} say whose they are: images of one patient "
                "may be on both sides, and the student then looks nearer than it is"
            ]
        ),
        *(
            f"- scored on labels: {name}: "
            + ", ".join(f"{key} {value:.4f}" for key, value in own.items() if key != "samples")
            for name, own in facts["scores"].items()
        ),
    ]
    if taught["privacy"] != privacy.NO_MECHANISM:
        lines.append(
            f"- the teacher was trained with differential privacy ({taught['privacy']}): what its training data adds "
            "here is covered by that statement, since nothing but its answers was used; the images it was distilled on "
            "are not covered by that epsilon, and if they are private, so is this adapter"
        )
    else:
        lines.append("- if the images it was distilled on are private, this adapter is made of private data")
    return "\n".join(lines) + "\n"
