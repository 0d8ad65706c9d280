"""The table of data sources, and how a source is made from its configuration."""

from __future__ import annotations

from typing import cast

from fedvfm import config, registry
from fedvfm.data import sample as data

TABLE = registry.Table(
    "data source",
    {
        "brain-mri": "fedvfm.data.sources.brain_mri:BrainMRI",
        "cells": "fedvfm.data.sources.cells:Cells",
        "folder": "fedvfm.data.sources.folder:Folder",
        "medmnist": "fedvfm.data.sources.medmnist:MedMNIST",
        "nuclei": "fedvfm.data.sources.nuclei:Nuclei",
    },
)


def make(source: config.SourceConfig) -> data.Source:
    """Build the source named ``name`` or ``name:argument`` (``medmnist:pathmnist``); the entry reads its own argument.

    Raises:
        UnknownName: if the part before the first colon stands in no table.
        DataError: if the source's files are missing or do not fit together.
    """
    name = source.source.partition(":")[0]
    return cast(data.Source, TABLE.get(name)(source))
