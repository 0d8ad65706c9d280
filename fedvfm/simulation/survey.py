"""A survey of the virtual hospitals of an experiment: what a federation of them would tell before training.

The same pass, withholding, noise and merging as at real sites. Nothing is approved, as nobody is there to; noise comes
from the experiment's seed, so nothing is private with it and no ledger is charged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.config import survey as surveys
from fedvfm.data import bags
from fedvfm.report import progress
from fedvfm.simulation import experiment as experiments
from fedvfm.survey import answer, collection, draft, layout, noise, proposal, results

if TYPE_CHECKING:
    from fedvfm.data.partition import virtual_hospitals

SIMULATED = "Virtual hospitals on one machine"
SEEDED = f"{SIMULATED}; the noise is drawn from a seed, so it protects nobody."


def of_experiment(experiment: schema.Experiment) -> surveys.Survey:
    """The survey that asks for all that fits an experiment's task."""
    recipe = experiment.recipe
    return draft.default(bags.data_of(recipe.task.kind), recipe.data, recipe.inputs)


def ask(
    survey: surveys.Survey, hospital: virtual_hospitals.Hospital, seed: int, observer: progress.Observer
) -> answer.Answer:
    """What one virtual hospital answers.

    Raises:
        PolicyRefused: "policy-units" if it has too few patients.
        DataError: for an image that cannot be used.
    """
    samples = collection.imaged(bags.images_of(each for name in collection.SEEN for each in hospital.splits[name]))
    grouped = collection.patients(samples, hospital.source)
    answer.require_enough(len(grouped), survey.least_patients)
    totals = collection.totals(survey, grouped, hospital.read)
    observer("note", text=f"{hospital.name}: {len(grouped)} patients")
    event = noise.event(survey)
    if event is None:
        return answer.of_totals(survey, hospital.name, totals, survey.least_patients)
    sizes = noise.sigmas(layout.groups(survey), event.noise_multiplier)
    values = noise.added(totals.sums(), sizes, seed, hospital.name)
    return answer.Answer(
        survey=survey.hash, site=hospital.name, least=survey.least_patients, values=values, sigmas=sizes
    )


def run(
    experiment: schema.Experiment,
    folder: Path,
    survey: surveys.Survey | None = None,
    largest: int = proposal.LARGEST,
    observer: progress.Observer = progress.silent,
) -> tuple[answer.Merged, proposal.Proposal, list[Path]]:
    """Ask every virtual hospital and write the result; see :mod:`fedvfm.survey.results`.

    Args:
        experiment: whose hospitals.
        folder: of the result.
        survey: what is asked; None asks for all that fits the experiment's task.
        largest: (pixels) bound of the proposed input.
        observer: told of progress.

    Raises:
        ConfigError: if the survey does not fit the experiment's data.
        PolicyRefused: if every hospital has too few patients.
        OutputInUse: if the folder holds anything.
    """
    results.require_free(folder)
    if experiment.recipe.target.of_columns:
        fault = "recipe.target is of columns of the table; a survey knows masks and one class an image alone"
        raise errors.ConfigError("survey", [fault])
    asked = survey or of_experiment(experiment)
    kind = bags.data_of(experiment.recipe.task.kind)
    if (asked.task, asked.class_names) != (kind, experiment.recipe.data.class_names):
        fault = (
            f"it asks for {asked.task} of {', '.join(asked.class_names)}; the experiment is {kind} of "
            f"{', '.join(experiment.recipe.data.class_names)}"
        )
        raise errors.ConfigError("survey", [fault])
    same = collection.contract(asked).model_dump(include={"plane", "channels", "modality", "intensity"})
    changes: dict[str, Any] = {"data": experiment.recipe.data.model_copy(update={**same, "window": None, "stack": 1})}
    if asked.columns:
        own = collection.inputs(asked).model_dump(include={"numbers", "units", "ranges", "centres", "scales"})
        changes["inputs"] = experiment.recipe.inputs.model_copy(update=own)
    recipe = experiment.recipe.model_copy(update=changes)
    hospitals = experiments.hospitals(experiment.model_copy(update={"recipe": recipe}))
    partly = [f"{own.name}: {fault}" for own in hospitals for fault in collection.label_faults(asked, own.labelled)]
    if partly:
        raise errors.ConfigError("survey", partly)
    answers = _answers(asked, hospitals, recipe, observer)
    result = answer.merged(asked, answers)
    backbone = experiment.recipe.backbone.name
    proposed = proposal.of_answers(asked, answers, backbone, largest, experiment.recipe.task.kind)
    note = f"{SIMULATED}." if asked.privacy is None else SEEDED
    return result, proposed, results.write(folder, result, proposed, backbone, note)


def _answers(
    survey: surveys.Survey,
    hospitals: Sequence[virtual_hospitals.Hospital],
    recipe: schema.Recipe,
    observer: progress.Observer,
) -> list[answer.Answer]:
    """Of all hospitals with patients enough.

    Raises:
        PolicyRefused: if none has.
    """
    answers: list[answer.Answer] = []
    refused: errors.PolicyRefused | None = None
    for hospital in hospitals:
        try:
            answers.append(ask(survey, hospital, recipe.seed, observer))
        except errors.PolicyRefused as refusal:
            refused = refusal
            observer("note", text=f"{hospital.name} refuses: {refusal}")
    if refused is not None and not answers:
        raise refused
    return answers
