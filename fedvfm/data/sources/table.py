"""The table of data sources, and how a source is made from its configuration."""

from __future__ import annotations

from typing import Any, cast

from fedvfm import errors, registry
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data import sample as data

TABLE = registry.Table(
    "data source",
    {
        "brain-mri": "fedvfm.data.sources.brain_mri:BrainMRI",
        "cells": "fedvfm.data.sources.cells:Cells",
        "folder": "fedvfm.data.sources.folder:Folder",
        "hippocampus": "fedvfm.data.sources.hippocampus:Hippocampus",
        "medmnist": "fedvfm.data.sources.medmnist:MedMNIST",
        "nuclei": "fedvfm.data.sources.nuclei:Nuclei",
    },
)


def survey(source: schema.SourceConfig, faults: list[str], contract: schema.DataContract | None = None) -> data.Source:
    """:func:`make` that goes on with what is usable and adds the faults of the rest to the list, where a source can.

    Raises:
        UnknownName, ConfigError, DataError: where nothing can be read at all.
    """
    made = _entry(source)
    return under(made.tolerant(source, faults) if hasattr(made, "tolerant") else made(source), contract)


def make(source: schema.SourceConfig, contract: schema.DataContract | None = None) -> data.Source:
    """Build the source named ``name`` or ``name:argument`` (``medmnist:pathmnist``); the entry reads its own argument.

    With a recipe's data contract the source shows its images as that asks (plane, stack, window), where it can.

    Raises:
        UnknownName: if the part before the first colon stands in no table.
        ConfigError: for channels by name where the source reads none.
        DataError: if the source's files are missing or do not fit together.
    """
    return under(_entry(source)(source), contract)


def _entry(source: schema.SourceConfig) -> Any:
    name = source.source.partition(":")[0]
    if source.channels and name != "folder":
        raise errors.ConfigError("data", [f"data.channels: source '{name}' does not read it; leave it out"])
    return TABLE.get(name)


def under(source: Any, contract: schema.DataContract | None) -> data.Source:
    """A source as a recipe asks for its images; sources without volumes have no ``under`` and stay as they are.

    Raises:
        DataError: if the recipe asks for what such a source does not have: another plane, neighbours, or volumes.
    """
    if contract is None:
        return cast(data.Source, source)
    if hasattr(source, "under"):
        return cast(data.Source, source.under(contract))
    asked = {
        "stack": contract.stack > 1,
        "depth": contract.depth > 0,
        "plane": contract.plane in ("coronal", "sagittal"),
    }
    wrong = [f"recipe.data.{key} = {getattr(contract, key)!r}" for key, wanted in asked.items() if wanted]
    if wrong:
        raise defect.VOLUME_NEEDED.error(
            f"data source '{source.info.name}': every image is a picture, but {' and '.join(wrong)} needs volumes; "
            "leave it out of the recipe"
        )
    return cast(data.Source, source)
