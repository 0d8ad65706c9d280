"""``survey.toml`` as a person starts from it: every key with its meaning, read off the model."""

from __future__ import annotations

import textwrap
import tomllib
from collections.abc import Sequence
from typing import Any

from fedvfm.config import inputs as inputs_config
from fedvfm.config import schema
from fedvfm.config import survey as surveys
from fedvfm.templates import drafts

_CHANGE = " Change: "
CT = {"modality": "CT", "scale": "file", "intensity_range": [-1024.0, 3072.0], "intensity_bins": 256}
"""What a survey of CT asks for in Hounsfield units."""
HEAD = """\
# A survey: which statistics the sites are asked for before anything is trained. Its hash names it, and every site
# approves exactly that hash.
#   fedvfm survey EXPERIMENT --survey survey.toml      tries it on virtual hospitals
#   fedvfm server survey survey.toml                   asks the approved sites of a federation
#
# A key with # before it is left out: its default holds."""


def values_of(task: str, classes: Sequence[str], modality: str = "any") -> dict[str, Any]:
    """What a survey asks for where nobody says otherwise: all that fits the task."""
    fitting = [name for name in surveys.STATISTICS if name != "columns"]
    statistics = [name for name in fitting if name != "foreground" or task == "segmentation"]
    values = {"title": "Before training", "task": task, "class_names": list(classes), "statistics": statistics}
    return values | (CT if modality == "CT" else {} if modality == "any" else {"modality": modality})


def default(task: str, contract: schema.DataContract, inputs: inputs_config.InputsConfig) -> surveys.Survey:
    """The survey for a recipe's data, and for the columns of numbers that it takes beside the images."""
    values = values_of(task, contract.class_names, contract.modality)
    values |= {"plane": contract.plane, "channels": list(contract.channels)}
    if len(contract.channels) == 3:
        values["colours"] = 3
    if inputs.numbers:
        values["statistics"] = [*values["statistics"], "columns"]
        values |= {"columns": inputs.numbers, "column_ranges": inputs.ranges, "column_units": inputs.units}
    return schema.parse(surveys.Survey, values, "survey")


def text(task: str, classes: Sequence[str], modality: str = "any") -> str:
    """The file.

    Raises:
        ConfigError: listing every fault of what was given.
    """
    values = values_of(task, classes, modality)
    parsed = schema.parse(surveys.Survey, values, "survey")
    lines = [HEAD, ""]
    for name, field in surveys.Survey.model_fields.items():
        if name == "privacy":
            continue
        value = parsed.model_dump(mode="json").get(name, field.default)
        default_there = name not in values and not field.is_required()
        lines += _notes(name, field.description or "")
        lines.append(f"{'#' if default_there else ''}{name} = {drafts.literal(value)}")
    lines += ["", *_notes("[privacy]", surveys.Survey.model_fields["privacy"].description or ""), "#[privacy]"]
    for name, value in (("epsilon", 1.0), ("delta", 1e-4)):
        lines += _notes(name, surveys.SurveyPrivacy.model_fields[name].description or "")
        lines.append(f"#{name} = {drafts.literal(value)}")
    content = "\n".join(lines) + "\n"
    schema.parse(surveys.Survey, tomllib.loads(content), "survey")
    return drafts.headed("survey", content)


def _notes(name: str, description: str) -> list[str]:
    words = " ".join(description.split()).partition(_CHANGE)[0]
    return textwrap.wrap(f"{name}: {words}", 118, initial_indent="# ", subsequent_indent="#   ")
