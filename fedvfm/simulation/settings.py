"""The settings of a finished run, by their dotted paths, so that runs of several releases can be set side by side.

An option that did not exist yet when a run was written is what it is where nobody names it: its default.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
from pydantic_core import to_jsonable_python

from fedvfm.config import schema

LEFT_OUT = frozenset(
    [
        *("name", "title", "note", "baselines", "recipe.seed"),
        *(f"personal.{name}" for name in schema.PersonalConfig.model_fields),
        *("workers", "threads", "recipe.threads", "cache_mib", "cache_disk_mib"),
    ]
)


def of(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of an ``experiment.json`` that can change the federated arm, except the seed.

    A data set that was found by its name is the same wherever it lies; earlier runs did not record where.
    """
    found = flat(completed(experiment, schema.Experiment))
    path, source = found.get("data.path"), found.get("data.source")
    by_name = not path or Path(path).name == source
    return {key: value for key, value in found.items() if key not in LEFT_OUT and not (by_name and key == "data.path")}


def completed(values: Mapping[str, Any], model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """The values with the defaults of what they leave out; keys that no release knows any more stay as they are."""
    found = dict(values)
    for name, field in model.model_fields.items():
        inner = field.annotation
        if name not in values and not field.is_required():
            found[name] = to_jsonable_python(field.get_default(call_default_factory=True))
        if isinstance(found.get(name), Mapping) and inspect.isclass(inner) and issubclass(inner, pydantic.BaseModel):
            found[name] = completed(found[name], inner)  # a default leaves out what is not written either
    return found


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted path -> value. A table that holds nothing has no path: it is as if it were not there."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = f"{path}.{key}" if path else key
        found |= flat(value, inner) if isinstance(value, Mapping) else {inner: value}
    return found
